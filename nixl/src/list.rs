//! Lists of descriptors that NIXL looks up once. A transfer then selects descriptors by their
//! indices.
//!
//! If a request is made from two such lists, NIXL can merge neighbouring ranges. For a request from
//! plain descriptors, NIXL looks up each descriptor and merges none. With small descriptors (4 KiB), a
//! request from plain descriptors is 4 times slower.

use std::fmt;
use std::ptr::NonNull;
use std::rc::Rc;

use nixl_sys::nixl_capi_prepared;

use crate::error::{Error, check};
use crate::handle::made;
use crate::inner::{AgentInner, RemoteInner};
use crate::memory::{Memory, Registration};

/// A range of memory as NIXL describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Address in the process that owns the memory.
    pub address: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// Device id; host memory has one, too. NIXL finds the range only with the device id that its owner
    /// used in the registration.
    pub device: u64,
}

/// Ranges of this process's memory.
#[derive(Debug)]
pub struct LocalList {
    // Dropped first, because the list points into the registration.
    pub(crate) list: Prepared,
    _registration: Rc<Registration>,
}

impl LocalList {
    /// Returns the number of ranges.
    #[expect(clippy::len_without_is_empty, reason = "cannot prepare an empty list")]
    pub fn len(&self) -> usize {
        self.list.len
    }
}

impl Registration {
    /// Looks up ranges of this memory, each `(offset, bytes)`. Transfers then name a range by its index.
    ///
    /// # Errors
    /// Fails if there is no range, or if a range is empty or ends beyond the memory.
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
        Ok(LocalList {
            list: Prepared::new(&self.agent, c"", self.kind, &rows)?,
            _registration: Rc::clone(self),
        })
    }
}

/// Ranges of a peer's memory.
#[derive(Debug)]
pub struct RemoteList {
    // Dropped first, because the list points into the peer's metadata.
    pub(crate) list: Prepared,
    pub(crate) remote: Rc<RemoteInner>,
}

impl RemoteList {
    pub(crate) fn new(remote: Rc<RemoteInner>, kind: Memory, rows: &[Row]) -> Result<Self, Error> {
        Ok(Self {
            list: Prepared::new(&remote.agent, &remote.name, kind, rows)?,
            remote,
        })
    }

    /// Returns the number of ranges.
    #[expect(clippy::len_without_is_empty, reason = "cannot prepare an empty list")]
    pub fn len(&self) -> usize {
        self.list.len
    }
}

pub(crate) struct Prepared {
    agent: Rc<AgentInner>,
    handle: NonNull<nixl_capi_prepared>,
    len: usize,
}

impl Prepared {
    /// Looks up `rows` in the memory of `owner`; the empty string names this agent itself.
    fn new(
        agent: &Rc<AgentInner>,
        owner: &std::ffi::CStr,
        kind: Memory,
        rows: &[Row],
    ) -> Result<Self, Error> {
        const INVALID: Error = Error::Invalid {
            call: "prep_xfer_dlist",
        };
        // A transfer selects rows by C ints. A longer list would have rows that no index can reach.
        if rows.is_empty() || i32::try_from(rows.len()).is_err() {
            return Err(INVALID);
        }
        let api = agent.api;
        // SAFETY: the out-pointer is valid.
        let descriptors = made("create_xfer_dlist", |out| unsafe {
            api.nixl_capi_create_xfer_dlist(kind.raw(), out)
        })?;
        let prepare = || {
            for row in rows {
                let address = usize::try_from(row.address).map_err(|_| INVALID)?;
                let bytes = usize::try_from(row.bytes).map_err(|_| INVALID)?;
                // SAFETY: live list; the row is copied.
                let status = unsafe {
                    api.nixl_capi_xfer_dlist_add_desc(
                        descriptors.as_ptr(),
                        address,
                        bytes,
                        row.device,
                    )
                };
                check("xfer_dlist_add_desc", status)?;
            }
            // SAFETY: live agent, list and options, NUL-terminated name.
            // NIXL checks that each row lies in memory that the owner has registered.
            made("prep_xfer_dlist", |out| unsafe {
                api.nixl_capi_prep_xfer_dlist(
                    agent.raw(),
                    owner.as_ptr(),
                    descriptors.as_ptr(),
                    out,
                    agent.options.as_ptr(),
                )
            })
        };
        let handle = prepare();
        // SAFETY: made above; the prepared list is a copy.
        unsafe { api.nixl_capi_destroy_xfer_dlist(descriptors.as_ptr()) };
        Ok(Self {
            agent: Rc::clone(agent),
            handle: handle?,
            len: rows.len(),
        })
    }

    pub(crate) fn agent(&self) -> &Rc<AgentInner> {
        &self.agent
    }

    pub(crate) fn raw(&self) -> *mut nixl_capi_prepared {
        self.handle.as_ptr()
    }
}

impl fmt::Debug for Prepared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Prepared")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        // SAFETY: made by `new` and released once.
        // Each request that uses the list holds a counted reference to the list, so no request is left.
        unsafe {
            self.agent
                .api
                .nixl_capi_release_xfer_dlist_handle(self.agent.raw(), self.raw())
        };
    }
}
