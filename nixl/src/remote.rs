//! A peer whose metadata is loaded.

use std::cell::Cell;
use std::ffi::CString;
use std::fmt;
use std::rc::Rc;

use crate::agent::{AgentInner, made, take_string};
use crate::error::check;
use crate::list::{RemoteList, Row};
use crate::memory::Memory;
use crate::{Error, metadata};

/// A loaded, connected peer. The last clone disconnects when it is dropped.
#[derive(Clone, Debug)]
pub struct Remote(Rc<RemoteInner>);

impl Remote {
    /// NIXL keeps one entry per agent name, and its prepared lists point into that entry without
    /// counting. So there is one [`RemoteInner`] per entry: a second load of a healthy peer shares it,
    /// and the entry of a failed one is dropped only when no request can look into it any more.
    pub(crate) fn load(agent: &Rc<AgentInner>, blob: &[u8]) -> Result<Self, Error> {
        let name = metadata::agent_name(blob)
            .and_then(|name| CString::new(name).ok())
            .ok_or(Error::Invalid {
                call: "load_remote_md",
            })?;
        // A peer that sends our own metadata back would have us write into our own memory.
        if name.as_bytes() == agent.name().as_bytes() {
            return Err(Error::Taken {
                agent: agent.name().to_owned(),
            });
        }
        let known = agent
            .remotes
            .borrow()
            .get(&name)
            .and_then(std::rc::Weak::upgrade);
        if let Some(known) = known {
            if known.broken.get() {
                known.make_way()?;
            } else if *known.metadata == *blob {
                return Ok(Self(known));
            } else {
                return Err(Error::Taken {
                    agent: known.name.to_string_lossy().into_owned(),
                });
            }
        }
        // SAFETY: live agent; `blob` is read during the call only, the out-pointer is valid.
        let loaded = made("load_remote_md", |out| unsafe {
            agent
                .api
                .nixl_capi_load_remote_md(agent.raw(), blob.as_ptr().cast(), blob.len(), out)
        })
        .map(take_string)?;
        if loaded != name {
            // The library read another name than we did, so what is known of `name` says nothing.
            return Err(Error::Invalid {
                call: "load_remote_md",
            });
        }
        // From here on dropping `inner` undoes the load.
        let inner = Rc::new(RemoteInner {
            agent: Rc::clone(agent),
            name: loaded,
            metadata: blob.into(),
            broken: Cell::new(false),
            running: Cell::new(0),
        });
        agent
            .remotes
            .borrow_mut()
            .insert(inner.name.clone(), Rc::downgrade(&inner));
        // SAFETY: live agent and options, NUL-terminated name.
        let status = unsafe {
            agent.api.nixl_capi_agent_make_connection(
                agent.raw(),
                inner.name.as_ptr(),
                agent.options.as_ptr(),
            )
        };
        check("agent_make_connection", status)?;
        Ok(Self(inner))
    }

    /// Looks up pieces of the peer's memory for transfers that name them by index.
    ///
    /// # Errors
    /// A piece outside what the peer registered, or with another device id.
    pub fn prepare(&self, kind: Memory, rows: &[Row]) -> Result<RemoteList, Error> {
        self.0.usable()?;
        RemoteList::new(Rc::clone(&self.0), kind, rows)
    }

    /// A transfer failed; nothing more can be sent until the peer is loaded anew.
    pub fn is_broken(&self) -> bool {
        self.0.broken.get()
    }
}

pub(crate) struct RemoteInner {
    pub(crate) agent: Rc<AgentInner>,
    pub(crate) name: CString,
    metadata: Box<[u8]>,
    /// Once a transfer has failed NIXL may have dropped its entry by itself, which leaves the
    /// prepared lists dangling: they are never used again.
    pub(crate) broken: Cell<bool>,
    /// Requests that may still look into the entry.
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

    /// Frees the name for a new load.
    fn make_way(&self) -> Result<(), Error> {
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
            api.nixl_capi_create_xfer_dlist(Memory::Dram.raw(), out)
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
            // NIXL dropped it by itself when the connection failed.
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
        // The name may belong to a successor: then NIXL's entry is the successor's.
        let own = remotes
            .get(&self.name)
            .is_some_and(|entry| std::ptr::eq(entry.as_ptr(), self));
        if !own {
            return;
        }
        remotes.remove(&self.name);
        drop(remotes);
        if let Err(error) = self.invalidate() {
            tracing::warn!(peer = ?self.name, %error, "nixl peer not dropped cleanly");
        }
    }
}
