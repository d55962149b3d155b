//! Writes from registered memory into the memory of a peer.

use std::fmt;
use std::mem;
use std::ptr::NonNull;
use std::rc::Rc;
use std::time::Duration;

use nixl_sys::{
    nixl_capi_estimate, nixl_capi_operation, nixl_capi_options, nixl_capi_request,
    nixl_capi_status as Status,
};

use crate::error::{Error, check, error};
use crate::handle::made;
use crate::inner::AgentInner;
use crate::list::{LocalList, RemoteList};

/// Treatment of neighbouring ranges, which follow each other without a gap in the memory of both
/// sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merge {
    /// NIXL joins neighbouring ranges into one descriptor. Merging is best if each descriptor needs extra time
    /// (NVLink: 5 µs).
    Neighbours,
    /// NIXL sends each range separately. Separate ranges are best if large descriptors are slow (UCX over TCP).
    Nothing,
}

impl Merge {
    fn options(self, agent: &AgentInner) -> *mut nixl_capi_options {
        match self {
            Self::Neighbours => agent.options.as_ptr(),
            Self::Nothing => agent.split.as_ptr(),
        }
    }
}

/// The progress of a transfer.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub enum State {
    /// The transfer has not ended.
    Running,
    /// The transfer has ended, and every byte is visible at the peer. Also the state before the first
    /// post.
    Done,
    /// The transfer has failed. The backend will not access the memory of either side any more.
    Failed(Error),
    /// Another transfer on the same connection failed, and NIXL dropped the connection. NIXL no longer
    /// reports the state of this transfer: bytes may or may not still arrive.
    Lost,
}

/// A write of local ranges into ranges of one peer.
///
/// A transfer keeps its lists and their registered memory until it is dropped. A transfer that is dropped while it
/// runs is leaked together with its memory (see the crate's documentation).
pub struct Transfer {
    local: Rc<LocalList>,
    remote: Rc<RemoteList>,
    request: NonNull<nixl_capi_request>,
    state: State,
}

impl Transfer {
    /// Makes a write of range `locals[i]` of `local` into range `remotes[i]` of `remote`, for each `i`.
    ///
    /// # Errors
    /// Fails if the index lists are empty or have different lengths, if an index is out of range,
    /// if two paired ranges have different lengths, or if the lists belong to different agents.
    /// Fails with [`Error::Broken`] if the connection has failed. No bytes were sent.
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
        // SAFETY: live agent, lists and options. NIXL checks counts, indices and lengths, and copies
        // the indices. The remote is not broken, so NIXL's entry for it is loaded.
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
                merge.options(agent),
            )
        })?;
        Ok(Self {
            local: Rc::clone(local),
            remote: Rc::clone(remote),
            request,
            state: State::Done,
        })
    }

    /// Starts the write. A write that is [`State::Done`] may be started again.
    ///
    /// If the CPU copies the bytes (shared memory), the copy happens during this call.
    ///
    /// # Errors
    /// Fails if the write cannot be started or is already running. Fails with [`Error::Broken`] if the connection has
    /// failed. NIXL may have sent a part of the bytes.
    pub fn post(&mut self) -> Result<State, Error> {
        self.remote.remote.usable()?;
        if self.state == State::Running {
            return Err(Error::Invalid {
                call: "post_xfer_req",
            });
        }
        let agent = self.local.list.agent();
        // SAFETY: live agent and request; the memory of both lists stays registered while the lists
        // live.
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

    /// Lets the backend work and returns the state. For a transfer that has ended, only returns its last state.
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
            // NIXL returns this status without asking the backend, so the request may still run.
            Status::NIXL_CAPI_NOT_FOUND => self.enter(State::Lost),
            other => self.enter(State::Failed(error("get_xfer_status", other))),
        }
    }

    /// Returns the duration that the backend predicts for this transfer, from a model of the
    /// network.
    ///
    /// The prediction is the only information from UCX about the transport that it chose. The prediction is not a
    /// measurement: if UCX cannot read the speed of a network device (loopback), it assumes 100 Mbit/s.
    ///
    /// # Errors
    /// Fails if the library cannot predict the duration. Fails with [`Error::Broken`] if the
    /// connection has failed.
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

    /// Marks the connection as failed. A caller uses this function when it stops waiting for this
    /// transfer.
    ///
    /// After this call no transfer can be made or posted on the connection. The peer can be loaded
    /// again after its running transfers have ended.
    pub fn distrust(&self) {
        self.remote.remote.broken.set(true);
    }

    /// Changes the state and updates the remote: its number of running requests, and `broken` after a
    /// failure.
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
                "a running transfer was dropped: its memory stays registered until the process ends"
            );
            // These two references are never dropped. So the lists, the registration and the agent
            // exist until the process ends, because the hardware may still read the memory.
            mem::forget((Rc::clone(&self.local), Rc::clone(&self.remote)));
            return;
        }
        let agent = self.local.list.agent();
        // SAFETY: live agent. The request has ended or was never posted; it is released once.
        let status = unsafe {
            agent
                .api
                .nixl_capi_release_xfer_req(agent.raw(), self.request.as_ptr())
        };
        match check("release_xfer_req", status) {
            // SAFETY: the call above released the library's part of the request. Only the handle
            // remains.
            Ok(()) => unsafe {
                agent.api.nixl_capi_destroy_xfer_req(self.request.as_ptr());
            },
            // The handle leaks, because the handle of an unreleased request must not be destroyed.
            Err(error) => tracing::warn!(%error, "cannot release a nixl request"),
        }
    }
}
