//! A peer whose metadata is loaded.

use std::cell::Cell;
use std::ffi::CString;
use std::rc::Rc;

use crate::error::{Error, check};
use crate::handle::{made, take_string};
use crate::inner::{AgentInner, RemoteInner};
use crate::list::{RemoteList, Row};
use crate::memory::Memory;
use crate::metadata;

/// A loaded, connected peer. Dropping the last clone closes the connection.
#[derive(Clone, Debug)]
pub struct Remote(Rc<RemoteInner>);

impl Remote {
    /// Loads metadata and connects, or shares the connection if the peer is loaded already.
    ///
    /// NIXL keeps one entry per agent name, and its prepared lists point into that entry without
    /// counting references. So there is one [`RemoteInner`] per entry. If a healthy peer is loaded
    /// a second time, both loads share the entry. The entry of a failed peer is dropped only when
    /// no request can read the entry any more: otherwise a request would have dangling pointers.
    pub(crate) fn load(agent: &Rc<AgentInner>, blob: &[u8]) -> Result<Self, Error> {
        let name = metadata::agent_name(blob)
            .and_then(|name| CString::new(name).ok())
            .ok_or(Error::Invalid {
                call: "load_remote_md",
            })?;
        // If a peer sends our own metadata as its metadata, a write to the peer would overwrite our
        // own memory.
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
        // If the name is already loaded, NIXL would replace its entry, and the lists of the earlier
        // peer would have dangling pointers.
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
        // SAFETY: live agent and valid out-pointer; NIXL reads `blob` only during the call.
        let loaded = made("load_remote_md", |out| unsafe {
            agent
                .api
                .nixl_capi_load_remote_md(agent.raw(), blob.as_ptr().cast(), blob.len(), out)
        })
        .map(take_string)?;
        if loaded != name {
            // The library has read another name than `metadata::agent_name`. So the load may have
            // replaced an entry that the code above did not check.
            return Err(Error::Invalid {
                call: "load_remote_md",
            });
        }
        // From here on, the drop of `inner` reverses the load.
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

    /// Looks up ranges of the peer's memory. Transfers then name a range by its index.
    ///
    /// # Errors
    /// Fails if a range lies outside the memory that the peer registered, or has another device id.
    pub fn prepare(&self, kind: Memory, rows: &[Row]) -> Result<RemoteList, Error> {
        self.0.usable()?;
        RemoteList::new(Rc::clone(&self.0), kind, rows)
    }

    /// Returns true if a transfer to the peer has failed. No transfer can then be made or posted
    /// until the peer is loaded again.
    pub fn is_broken(&self) -> bool {
        self.0.broken.get()
    }
}
