//! Lists of descriptors that were looked up once, so that a transfer only names indices.
//!
//! A request made from two such lists costs NIXL a merge of neighbours; one made from plain
//! descriptors costs a lookup of each and never merges (4 times slower at 4 KiB).

use std::fmt;
use std::ptr::NonNull;
use std::rc::Rc;

use nixl_sys::nixl_capi_prepared;

use crate::Error;
use crate::agent::{AgentInner, made};
use crate::error::check;
use crate::memory::{Memory, Registration};
use crate::remote::RemoteInner;

/// A piece of memory as NIXL names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Address in its owner's process.
    pub address: u64,
    /// Bytes.
    pub bytes: u64,
    /// Device id; must be the one that its owner registered it with, for host memory too.
    pub device: u64,
}

/// Ranges of this process's memory.
#[derive(Debug)]
pub struct LocalList {
    // Dropped first: it points into what the registration looked up.
    pub(crate) list: Prepared,
    _registration: Rc<Registration>,
}

impl LocalList {
    pub(crate) fn new(
        agent: &Rc<AgentInner>,
        registration: Rc<Registration>,
        kind: Memory,
        rows: &[Row],
    ) -> Result<Self, Error> {
        Ok(Self {
            list: Prepared::new(agent, c"", kind, rows)?,
            _registration: registration,
        })
    }

    /// How many ranges.
    #[expect(
        clippy::len_without_is_empty,
        reason = "an empty list cannot be prepared"
    )]
    pub fn len(&self) -> usize {
        self.list.len
    }
}

/// Ranges of a peer's memory.
#[derive(Debug)]
pub struct RemoteList {
    // Dropped first: it points into the peer's metadata.
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

    /// How many ranges.
    #[expect(
        clippy::len_without_is_empty,
        reason = "an empty list cannot be prepared"
    )]
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
    /// `owner` is the empty string for this agent.
    fn new(
        agent: &Rc<AgentInner>,
        owner: &std::ffi::CStr,
        kind: Memory,
        rows: &[Row],
    ) -> Result<Self, Error> {
        const INVALID: Error = Error::Invalid {
            call: "prep_xfer_dlist",
        };
        // Indices are C ints.
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
            // SAFETY: live agent, list and options, NUL-terminated name. NIXL checks every row
            // against the owner's registrations.
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
        // SAFETY: made by `new`, released once; requests made from it hold a counted reference.
        unsafe {
            self.agent
                .api
                .nixl_capi_release_xfer_dlist_handle(self.agent.raw(), self.raw())
        };
    }
}
