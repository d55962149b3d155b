//! Writes.

use std::fmt;
use std::mem;
use std::ptr::NonNull;
use std::rc::Rc;
use std::time::Duration;

use nixl_sys::{
    nixl_capi_estimate, nixl_capi_operation, nixl_capi_request, nixl_capi_status as Status,
};

use crate::Error;
use crate::agent::made;
use crate::error::{check, error};
use crate::list::{LocalList, RemoteList};

/// What NIXL does with ranges that follow each other on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merge {
    /// Makes one of them: best where a descriptor has a price (NVLink: 5 µs).
    Neighbours,
    /// Sends each on its own: best where big ones are slow (UCX over TCP).
    Nothing,
}

/// How far a transfer is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub enum State {
    /// Not ended.
    Running,
    /// Flushed: every byte is visible at the peer.
    Done,
    /// Ended badly, and ended: the backend will not touch the memory of either side any more.
    Failed(Error),
    /// The connection was given up under it, by the failure of another transfer; NIXL answers no
    /// more questions about it. Whether bytes can still arrive is unknown.
    Lost,
}

/// A write of local ranges into ranges of one peer.
///
/// It keeps its lists, and with them the registered memory, until it has ended. See the crate's
/// documentation for what dropping a running one does.
pub struct Transfer {
    local: Rc<LocalList>,
    remote: Rc<RemoteList>,
    request: NonNull<nixl_capi_request>,
    state: State,
}

impl Transfer {
    /// Pairs `locals[i]` of `local` with `remotes[i]` of `remote`.
    ///
    /// # Errors
    /// Unequal or empty index lists, an index out of range, ranges of unequal length, lists of two
    /// agents, or [`Error::Broken`]. Nothing was sent.
    pub fn write(
        local: &Rc<LocalList>,
        locals: &[i32],
        remote: &Rc<RemoteList>,
        remotes: &[i32],
        merge: Merge,
    ) -> Result<Self, Error> {
        remote.remote.usable()?;
        let agent = local.list.agent();
        if !Rc::ptr_eq(agent, remote.list.agent()) {
            return Err(Error::Invalid {
                call: "make_xfer_req",
            });
        }
        // SAFETY: live agent, lists and options; NIXL checks counts, indices and lengths, and copies
        // the indices. The remote's entry is loaded, because the remote is not broken.
        let request = made("make_xfer_req", |out| unsafe {
            agent.api.nixl_capi_make_xfer_req(
                agent.raw(),
                nixl_capi_operation::NIXL_CAPI_WRITE,
                local.list.raw(),
                locals.as_ptr(),
                locals.len(),
                remote.list.raw(),
                remotes.as_ptr(),
                remotes.len(),
                out,
                agent.options(merge),
            )
        })?;
        Ok(Self {
            local: Rc::clone(local),
            remote: Rc::clone(remote),
            request,
            state: State::Done,
        })
    }

    /// Starts it, again if it is [`State::Done`].
    ///
    /// On wires where the CPU copies (shared memory) the copying happens in this call.
    ///
    /// # Errors
    /// It could not be started, or is running, or [`Error::Broken`]. Part of it may have been sent.
    pub fn post(&mut self) -> Result<State, Error> {
        self.remote.remote.usable()?;
        if self.state == State::Running {
            return Err(Error::Invalid {
                call: "post_xfer_req",
            });
        }
        let agent = self.local.list.agent();
        // SAFETY: live agent and request; the memory of both lists is registered while they live.
        let status = unsafe {
            agent.api.nixl_capi_post_xfer_req(
                agent.raw(),
                self.request.as_ptr(),
                agent.options.as_ptr(),
            )
        };
        match status {
            Status::NIXL_CAPI_DONE => Ok(self.enter(State::Done)),
            Status::NIXL_CAPI_RUNNING => Ok(self.enter(State::Running)),
            other => {
                let error = error("post_xfer_req", other);
                let _failed = self.enter(State::Failed(error.clone()));
                Err(error)
            }
        }
    }

    /// Lets the backend work and asks how far it is; of one that is not running, how it ended.
    pub fn poll(&mut self) -> State {
        if self.state != State::Running {
            return self.state.clone();
        }
        let agent = self.local.list.agent();
        // SAFETY: live agent and request.
        let status = unsafe {
            agent
                .api
                .nixl_capi_get_xfer_status(agent.raw(), self.request.as_ptr())
        };
        match status {
            Status::NIXL_CAPI_RUNNING => State::Running,
            Status::NIXL_CAPI_DONE => self.enter(State::Done),
            // Answered before the backend is asked, so it says nothing about the request itself.
            Status::NIXL_CAPI_NOT_FOUND => self.enter(State::Lost),
            other => self.enter(State::Failed(error("get_xfer_status", other))),
        }
    }

    /// How long the backend's model of its wire says that this takes: the only thing that UCX tells
    /// about the wire it chose. Not a measurement; of a network device whose speed it cannot read
    /// (loopback) it assumes 100 Mbit/s.
    ///
    /// # Errors
    /// The library's.
    pub fn estimate(&self) -> Result<Duration, Error> {
        self.remote.remote.usable()?;
        let agent = self.local.list.agent();
        let (mut micros, mut margin) = (0, 0);
        let mut method = nixl_capi_estimate::NIXL_CAPI_ANALYTICAL;
        // SAFETY: live agent, request and options, valid out-pointers.
        let status = unsafe {
            agent.api.nixl_capi_estimate_xfer_cost(
                agent.raw(),
                self.request.as_ptr(),
                agent.options.as_ptr(),
                &mut micros,
                &mut margin,
                &mut method,
            )
        };
        check("estimate_xfer_cost", status)?;
        Ok(Duration::from_micros(micros.try_into().unwrap_or(0)))
    }

    /// Treats the connection as failed, for a caller who will not wait any longer: nothing more is
    /// made or posted on it, and the peer can be loaded anew once its running transfers have ended.
    pub fn distrust(&self) {
        self.remote.remote.broken.set(true);
    }

    /// Keeps the remote's count of running requests and its health with the state.
    fn enter(&mut self, state: State) -> State {
        let remote = &self.remote.remote;
        if self.state == State::Running {
            remote.running.set(remote.running.get() - 1);
        }
        match &state {
            State::Running => remote.running.set(remote.running.get() + 1),
            State::Done => {}
            State::Failed(_) | State::Lost => remote.broken.set(true),
        }
        self.state = state.clone();
        state
    }
}

impl fmt::Debug for Transfer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transfer")
            .field("remote", &self.remote)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        if self.state == State::Running {
            tracing::error!(
                transfer = ?self,
                "running transfer dropped: its memory stays registered until the process ends"
            );
            // The counts never reach zero, so neither lists, nor registration, nor agent go.
            mem::forget((Rc::clone(&self.local), Rc::clone(&self.remote)));
            return;
        }
        let agent = self.local.list.agent();
        // SAFETY: live agent; the request has ended or was never posted, and is released once.
        let status = unsafe {
            agent
                .api
                .nixl_capi_release_xfer_req(agent.raw(), self.request.as_ptr())
        };
        match check("release_xfer_req", status) {
            // SAFETY: released above, so the library's part is gone and only the handle is left.
            Ok(()) => unsafe {
                agent.api.nixl_capi_destroy_xfer_req(self.request.as_ptr());
            },
            // The handle leaks: destroying an unreleased one is an error.
            Err(error) => tracing::warn!(%error, "nixl request not released"),
        }
    }
}
