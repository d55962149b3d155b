//! The agent's handles and the peers that it has loaded: the state that all other types share.
//!
//! [`AgentInner`] and [`RemoteInner`] refer to each other: each peer keeps its agent alive, and the
//! agent finds its peers by name. Both types are in one file, so that no two files of this crate
//! import each other.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::CString;
use std::fmt;
use std::ptr::NonNull;
use std::rc::{Rc, Weak};

use nixl_sys::{
    Api, nixl_capi_agent, nixl_capi_backend, nixl_capi_memory, nixl_capi_notifications,
    nixl_capi_options,
};

use crate::error::{Error, check};
use crate::handle::made;

/// The handles of one agent. [`Drop`] destroys them in the necessary order, which does not depend
/// on the order of the fields.
pub(crate) struct AgentInner {
    pub(crate) api: &'static Api,
    pub(crate) name: String,
    pub(crate) agent: NonNull<nixl_capi_agent>,
    pub(crate) backend: NonNull<nixl_capi_backend>,
    /// Options that name the backend and let NIXL merge neighbouring descriptors.
    pub(crate) options: NonNull<nixl_capi_options>,
    /// Options that name the backend and prevent NIXL from merging neighbouring descriptors.
    pub(crate) split: NonNull<nixl_capi_options>,
    pub(crate) notifications: NonNull<nixl_capi_notifications>,
    /// The loaded peers by name. The references are weak, because the users of a peer own the peer.
    pub(crate) remotes: RefCell<HashMap<CString, Weak<RemoteInner>>>,
}

impl AgentInner {
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn raw(&self) -> *mut nixl_capi_agent {
        self.agent.as_ptr()
    }
}

impl fmt::Debug for AgentInner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Agent")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Drop for AgentInner {
    fn drop(&mut self) {
        // SAFETY: each handle was made by `Agent::new` and is destroyed once.
        // Registrations, remotes, lists and requests hold a counted reference to the agent, so none
        // of them is left. The agent is destroyed last, because the options and the backend's handle
        // point into it.
        let status = unsafe {
            self.api
                .nixl_capi_destroy_notif_map(self.notifications.as_ptr());
            self.api.nixl_capi_destroy_opt_args(self.split.as_ptr());
            self.api.nixl_capi_destroy_opt_args(self.options.as_ptr());
            self.api.nixl_capi_destroy_backend(self.backend.as_ptr());
            self.api.nixl_capi_destroy_agent(self.agent.as_ptr())
        };
        if let Err(error) = check("destroy_agent", status) {
            tracing::warn!(agent = self.name, %error, "cannot destroy the nixl agent");
        }
    }
}

/// One entry of NIXL's table of loaded peers.
pub(crate) struct RemoteInner {
    pub(crate) agent: Rc<AgentInner>,
    pub(crate) name: CString,
    pub(crate) metadata: Box<[u8]>,
    /// True after a transfer to this peer has failed. NIXL may then have dropped the entry by
    /// itself. The prepared lists would then have dangling pointers, so this crate never uses them
    /// again.
    pub(crate) broken: Cell<bool>,
    /// Number of requests that may still read the entry.
    pub(crate) running: Cell<usize>,
}

impl RemoteInner {
    pub(crate) fn usable(&self) -> Result<(), Error> {
        if self.broken.get() {
            return Err(Error::Broken {
                agent: self.name.to_string_lossy().into_owned(),
            });
        }
        Ok(())
    }

    /// Removes the entry from NIXL, so that new metadata can be loaded under its name.
    pub(crate) fn make_way(&self) -> Result<(), Error> {
        if !self.is_loaded()? {
            return Ok(());
        }
        if self.running.get() > 0 {
            return Err(Error::Busy {
                agent: self.name.to_string_lossy().into_owned(),
                running: self.running.get(),
            });
        }
        self.invalidate()
    }

    fn is_loaded(&self) -> Result<bool, Error> {
        let api = self.agent.api;
        // SAFETY: the out-pointer is valid.
        let none = made("create_xfer_dlist", |out| unsafe {
            api.nixl_capi_create_xfer_dlist(nixl_capi_memory::NIXL_CAPI_DRAM, out)
        })?;
        // SAFETY: live agent and list, NUL-terminated name.
        let status = unsafe {
            api.nixl_capi_check_remote_md(self.agent.raw(), self.name.as_ptr(), none.as_ptr())
        };
        // SAFETY: made above.
        unsafe { api.nixl_capi_destroy_xfer_dlist(none.as_ptr()) };
        match check("check_remote_md", status) {
            Ok(()) => Ok(true),
            Err(Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn invalidate(&self) -> Result<(), Error> {
        // SAFETY: live agent, NUL-terminated name; no request uses the entry.
        let status = unsafe {
            self.agent
                .api
                .nixl_capi_invalidate_remote_md(self.agent.raw(), self.name.as_ptr())
        };
        match check("invalidate_remote_md", status) {
            // NIXL dropped the entry by itself when the connection failed.
            Err(Error::NotFound { .. }) => Ok(()),
            other => other,
        }
    }
}

impl fmt::Debug for RemoteInner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Remote")
            .field("name", &self.name)
            .field("broken", &self.broken)
            .field("running", &self.running)
            .finish_non_exhaustive()
    }
}

impl Drop for RemoteInner {
    fn drop(&mut self) {
        let mut remotes = self.agent.remotes.borrow_mut();
        // A new connection may use the name already. NIXL's entry then belongs to the new
        // connection and must not be invalidated.
        let own = remotes
            .get(&self.name)
            .is_some_and(|entry| std::ptr::eq(entry.as_ptr(), self));
        if !own {
            return;
        }
        remotes.remove(&self.name);
        drop(remotes);
        if let Err(error) = self.invalidate() {
            tracing::warn!(peer = ?self.name, %error, "cannot disconnect a nixl peer");
        }
    }
}
