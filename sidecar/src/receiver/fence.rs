//! Proof that a vanished sender cannot write any more (design: fenced before reuse).
//!
//! Over a wire where this process does the writing, closing the slot is the proof, and this module is
//! not asked. For the others: a sender on this host is watched through its process descriptor, taken
//! when it introduced itself, so that a reused process id cannot deceive; its end plus a grace period
//! for what the kernel or UCX still delivers is the proof. A sender on another host proves it only by
//! its own word; until then its slots stay quarantined, visibly.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use protocol::LeaseId;
use protocol::message::Hello;
use protocol::receiver::SenderId;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::unix::AsyncFd;
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::host;

/// The senders that can be watched, and the proofs that are sought.
#[derive(Debug, Default)]
pub(super) struct Fences {
    processes: BTreeMap<SenderId, Arc<AsyncFd<OwnedFd>>>,
    /// One watch a sender, however many leases it has left: its end proves them all.
    sought: BTreeSet<SenderId>,
    watches: JoinSet<(SenderId, io::Result<()>)>,
}

/// Data that a dead process's kernel sockets or a copy engine may still deliver arrives within this.
const GRACE: Duration = Duration::from_secs(1);
/// Senders whose process is watched; beyond it the oldest epochs are dropped.
const MAX_PROCESSES: usize = 1024;

impl Fences {
    /// A sender has said who it is.
    pub(super) fn introduce(&mut self, hello: &Hello) {
        let sender = SenderId {
            id: hello.id.clone(),
            epoch: hello.epoch,
        };
        if hello.host == host::identity() {
            self.watch(sender, hello.pid);
        }
    }

    /// A sender's process is on this host.
    pub(super) fn watch(&mut self, sender: SenderId, pid: u32) {
        if self.processes.contains_key(&sender) {
            return;
        }
        if self.processes.len() >= MAX_PROCESSES {
            self.processes.pop_first();
        }
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let opened = number.map(|pid| pidfd_open(pid, PidfdFlags::NONBLOCK));
        #[expect(
            deprecated,
            reason = "sound for an `OwnedFd`, and the successor is unsafe"
        )]
        let register = AsyncFd::new;
        match opened.map(|fd| fd.map_err(io::Error::from).and_then(register)) {
            Some(Ok(fd)) => {
                self.processes.insert(sender, Arc::new(fd));
            }
            Some(Err(error)) => {
                warn!(sender = sender.id, pid, %error, "the sender's process cannot be watched");
            }
            None => {}
        }
    }

    /// Seeks a proof for the quarantined slots of a lease.
    pub(super) fn seek(&mut self, sender: SenderId, lease: LeaseId) {
        let Some(process) = self.processes.get(&sender).cloned() else {
            warn!(
                sender = sender.id,
                %lease,
                "slots quarantined until the sender speaks: it runs on another host, or cannot be watched"
            );
            return;
        };
        warn!(sender = sender.id, %lease, "slots quarantined until the sender speaks or its process ends");
        if !self.sought.insert(sender.clone()) {
            return;
        }
        self.watches.spawn(async move {
            let ended = process.readable().await.map(|_| ());
            tokio::time::sleep(GRACE).await;
            (sender, ended)
        });
    }

    /// The next proof; pending while there is none.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub(super) async fn proven(&mut self) -> SenderId {
        loop {
            match self.watches.join_next().await {
                None => std::future::pending().await,
                Some(Ok((sender, Ok(())))) => {
                    info!(
                        sender = sender.id,
                        "the sender's process has ended: slots are free again"
                    );
                    self.sought.remove(&sender);
                    return sender;
                }
                Some(Ok((sender, Err(error)))) => {
                    self.sought.remove(&sender);
                    warn!(sender = sender.id, %error, "the sender's process cannot be watched");
                }
                Some(Err(panic)) => std::panic::resume_unwind(panic.into_panic()),
            }
        }
    }
}
