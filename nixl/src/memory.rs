//! Memory that takes part in transfers.

use std::fmt;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::Arc;

use nixl_sys::{nixl_capi_memory, nixl_capi_regions};

use crate::Error;
use crate::agent::{AgentInner, made};
use crate::error::check;
use crate::list::{LocalList, Row};

/// Where memory lies.
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

/// Memory that other processes, and hardware, may read and write at any time.
///
/// # Safety
/// While the value lives, `address() .. address() + bytes()` must stay mapped at the same place,
/// readable and writable, and nothing may hold a Rust reference into it.
pub unsafe trait Pinned: fmt::Debug + Send + Sync {
    /// The first byte.
    fn address(&self) -> usize;
    /// How many bytes.
    fn bytes(&self) -> u64;
}

/// Memory that is registered with an agent. Dropping it deregisters, then gives the memory up.
pub struct Registration {
    agent: Rc<AgentInner>,
    regions: NonNull<nixl_capi_regions>,
    memory: Arc<dyn Pinned>,
    kind: Memory,
    device: u64,
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
            // SAFETY: live list; a zero length needs no metadata bytes, but the pointer must not be null.
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
            // SAFETY: live agent, list and options; the memory is mapped (`Pinned`) and `self` keeps it
            // until it is deregistered.
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

    /// Looks up ranges of this memory, `(offset, bytes)` each, for transfers that name them by index.
    ///
    /// # Errors
    /// No range, or one that is empty or reaches beyond the memory.
    pub fn prepare(self: &Rc<Self>, ranges: &[(u64, u64)]) -> Result<LocalList, Error> {
        let base = self.memory.address() as u64;
        let rows = ranges
            .iter()
            .map(|&(offset, bytes)| {
                let end = offset.checked_add(bytes)?;
                (bytes > 0 && end <= self.memory.bytes()).then_some(Row {
                    address: base + offset,
                    bytes,
                    device: self.device,
                })
            })
            .collect::<Option<Vec<_>>>()
            .ok_or(Error::Invalid {
                call: "prep_xfer_dlist",
            })?;
        LocalList::new(&self.agent, Rc::clone(self), self.kind, &rows)
    }

    /// The memory.
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
        // SAFETY: registered by `new` with the same list and options. Lists of this memory hold a
        // counted reference to `self`, and transfers one to their lists, so nothing names it any more.
        let status = unsafe {
            api.nixl_capi_deregister_mem(
                self.agent.raw(),
                self.regions.as_ptr(),
                self.agent.options.as_ptr(),
            )
        };
        if let Err(error) = check("deregister_mem", status) {
            tracing::warn!(%error, "memory not deregistered");
        }
        // SAFETY: made by `new`, destroyed once.
        unsafe { api.nixl_capi_destroy_reg_dlist(self.regions.as_ptr()) };
    }
}
