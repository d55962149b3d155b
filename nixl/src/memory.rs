//! Memory that transfers read and write.

use std::fmt;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::Arc;

use nixl_sys::{nixl_capi_memory, nixl_capi_regions};

use crate::error::{Error, check};
use crate::handle::made;
use crate::inner::AgentInner;

/// Kind of memory: host or GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Memory {
    /// Host memory.
    Dram,
    /// GPU memory.
    Vram,
}

impl Memory {
    pub(crate) fn raw(self) -> nixl_capi_memory {
        match self {
            Self::Dram => nixl_capi_memory::NIXL_CAPI_DRAM,
            Self::Vram => nixl_capi_memory::NIXL_CAPI_VRAM,
        }
    }
}

/// Memory that other processes and hardware may read and write at any time.
///
/// # Safety
/// While the value lives, `address() .. address() + bytes()` must stay mapped at the same place,
/// readable and writable, and nothing may hold a Rust reference into it.
pub unsafe trait Pinned: fmt::Debug + Send + Sync {
    /// Returns the address of the first byte.
    fn address(&self) -> usize;
    /// Returns the length in bytes.
    fn bytes(&self) -> u64;
}

/// Memory that is registered with an agent. Dropping the registration deregisters the memory, then
/// drops it.
pub struct Registration {
    pub(crate) agent: Rc<AgentInner>,
    regions: NonNull<nixl_capi_regions>,
    pub(crate) memory: Arc<dyn Pinned>,
    pub(crate) kind: Memory,
    pub(crate) device: u64,
}

impl Registration {
    pub(crate) fn new(
        agent: Rc<AgentInner>,
        memory: Arc<dyn Pinned>,
        kind: Memory,
        device: u64,
    ) -> Result<Self, Error> {
        let bytes = usize::try_from(memory.bytes()).map_err(|_| Error::Invalid {
            call: "register_mem",
        })?;
        let api = agent.api;
        // SAFETY: the out-pointer is valid.
        let regions = made("create_reg_dlist", |out| unsafe {
            api.nixl_capi_create_reg_dlist(kind.raw(), out)
        })?;
        let register = || {
            // SAFETY: live list. A metadata length of zero needs no bytes, but the pointer must not be
            // null.
            let status = unsafe {
                api.nixl_capi_reg_dlist_add_desc(
                    regions.as_ptr(),
                    memory.address(),
                    bytes,
                    device,
                    c"".as_ptr().cast(),
                    0,
                )
            };
            check("reg_dlist_add_desc", status)?;
            // SAFETY: live agent, list and options.
            // The memory is mapped (`Pinned`), and `self` keeps the memory mapped until `drop` has
            // deregistered it.
            let status = unsafe {
                api.nixl_capi_register_mem(agent.raw(), regions.as_ptr(), agent.options.as_ptr())
            };
            check("register_mem", status)
        };
        if let Err(error) = register() {
            // SAFETY: made above and not registered.
            unsafe { api.nixl_capi_destroy_reg_dlist(regions.as_ptr()) };
            return Err(error);
        }
        Ok(Self {
            agent,
            regions,
            memory,
            kind,
            device,
        })
    }

    /// Returns the registered memory.
    pub fn memory(&self) -> &Arc<dyn Pinned> {
        &self.memory
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration")
            .field("memory", &self.memory)
            .field("kind", &self.kind)
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let api = self.agent.api;
        // SAFETY: `new` registered the memory with the same list and options.
        // Each list of this memory holds a counted reference to `self`, and each transfer holds a
        // counted reference to its lists, so no list and no transfer uses the memory any more.
        let status = unsafe {
            api.nixl_capi_deregister_mem(
                self.agent.raw(),
                self.regions.as_ptr(),
                self.agent.options.as_ptr(),
            )
        };
        if let Err(error) = check("deregister_mem", status) {
            tracing::warn!(%error, "cannot deregister memory with nixl");
        }
        // SAFETY: made by `new`, destroyed once.
        unsafe { api.nixl_capi_destroy_reg_dlist(self.regions.as_ptr()) };
    }
}
