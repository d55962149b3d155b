//! Proves that a vanished sender cannot write any more. A slot is reused only after this module has the proof
//! (design: fenced before reuse).
//!
//! If this process itself writes into the slot, closing the slot is the proof, and this module is not used.
//! On other wires the proof has two parts: the sender's process has ended, and a grace period for the writes
//! in flight is over:
//!
//! - For a sender on this host, this module watches the process through a process descriptor. The descriptor is
//!   opened at the handshake, so a later process with the same id is not mistaken for the sender.
//! - For a sender on another host, its successor process proves that the sender has ended
//!   ([`crate::peer::process_lock`]). For a sender on another host the grace period is far longer: over TCP,
//!   the kernel still sends the data of a process that has ended, even after an interruption of the network.
//!
//! Until there is proof, the sender's slots stay in quarantine, which metrics and logs show.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use protocol::LeaseId;
use protocol::message::Hello;
use protocol::receiver::SenderId;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::unix::AsyncFd;
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::net::host_id;
use crate::peer::process_lock::{MAX_PROOFS, ProofHash, proof_hash_of};

/// The known senders, and the steps that now run to prove that a sender has ended.
#[derive(Debug)]
pub(super) struct WriteFences {
    senders: BTreeMap<SenderId, Known>,
    next: u64,
    /// The senders with a watched process. One watch is enough for all leases of a sender, because the end of
    /// the process is proof for all of them.
    watched: BTreeSet<SenderId>,
    steps: JoinSet<Step>,
    /// The number of grace periods that run.
    settling: usize,
    /// The grace period for senders on other hosts.
    grace: Duration,
}

/// The facts that this receiver knows about a sender, some of which can prove the sender's end.
#[derive(Debug, Default)]
struct Known {
    /// The host that the sender's hello came from.
    from: String,
    /// The order of the handshakes: an older sender has a smaller number.
    order: u64,
    process: Option<Arc<AsyncFd<OwnedFd>>>,
    proof_hash: Option<ProofHash>,
    life: Life,
}

impl Known {
    fn may_live(&self) -> bool {
        let ended = |process: &Arc<AsyncFd<OwnedFd>>| {
            let mut looks = [PollFd::new(process, PollFlags::IN)];
            poll(&mut looks, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
        };
        self.life == Life::Unknown && !self.process.as_ref().is_some_and(ended)
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Life {
    /// The sender may still write.
    #[default]
    Unknown,
    /// The sender's process has ended; its writes may be in flight.
    Ended,
    /// The grace period is over: no write of the sender can arrive any more.
    Over,
}

#[derive(Debug)]
enum Step {
    /// A process has ended, or cannot be watched.
    Ended(SenderId, io::Result<()>),
    /// The grace period of a sender is over.
    Settled(SenderId),
}

/// A result of [`WriteFences::next`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum News {
    /// A grace period has begun. The wires must now help the writes in flight to arrive.
    Settling,
    /// No write of this sender can arrive any more.
    Over(SenderId),
}

/// The grace period for senders on this host. Data of a dead process that is still in a socket or a copy engine
/// arrives within this time.
const GRACE: Duration = Duration::from_secs(1);
/// Maximum number of watches and grace periods at the same time. Without this limit, a peer could invent
/// names, prove the end of each, and fill the memory. If the limit is reached, the grace period of a further
/// sender begins at a later handshake.
const MAX_STEPS: usize = 4096;
/// Maximum number of remembered senders. When the map is full, the oldest sender of the host with the most
/// senders is forgotten.
const MAX_SENDERS: usize = 1024;

impl WriteFences {
    /// Makes write fences without any sender. `grace` is the grace period for senders on other hosts.
    pub(super) fn new(grace: Duration) -> Self {
        Self {
            senders: BTreeMap::new(),
            next: 0,
            watched: BTreeSet::new(),
            steps: JoinSet::new(),
            settling: 0,
            grace,
        }
    }

    /// Notes a sender's hello, which came from the address `from`. If the hello proves that other senders have
    /// ended, the grace periods of these senders begin. A second hello of the same sender has no other effect.
    pub(super) fn introduce(&mut self, hello: &Hello, from: &str) {
        let sender = SenderId {
            id: hello.id.clone(),
            epoch: hello.epoch,
        };
        for secret in hello.ended.iter().take(MAX_PROOFS) {
            self.vouched(proof_hash_of(secret));
        }
        if !self.senders.contains_key(&sender) {
            let process = (hello.host == host_id::identity())
                .then(|| open(&sender, hello.pid))
                .flatten();
            let proof_hash = ProofHash::try_from(&hello.seal[..]).ok();
            self.look_for_namesakes(&sender, proof_hash);
            let known = Known {
                process,
                proof_hash,
                ..Known::default()
            };
            self.insert(sender, known, from);
        }
    }

    /// Logs a warning if two senders seem to have the same name. The requests of two senders with the same name
    /// do not disturb each other, but the senders' quarantined slots are counted together.
    fn look_for_namesakes(&self, sender: &SenderId, proof_hash: Option<ProofHash>) {
        let other = self.senders.iter().find(|(other, known)| {
            other.id == sender.id && known.proof_hash != proof_hash && known.may_live()
        });
        if let Some((other, _)) = other {
            warn!(
                sender = sender.id, epoch = %sender.epoch, other = %other.epoch,
                "a second sender has this name, and there is no proof that the first has ended: if both run, \
                 give one of them another `sidecar.id`"
            );
        }
    }

    /// Watches a sender's process on this host, if the sender is not known already.
    pub(super) fn watch(&mut self, sender: SenderId, pid: u32, from: &str) {
        if self.senders.contains_key(&sender) {
            return;
        }
        if let Some(process) = open(&sender, pid) {
            let known = Known {
                process: Some(process),
                ..Known::default()
            };
            self.insert(sender, known, from);
        }
    }

    fn insert(&mut self, sender: SenderId, mut known: Known, from: &str) {
        if self.senders.len() >= MAX_SENDERS {
            self.make_room();
        }
        known.from = from
            .rsplit_once(':')
            .map_or(from, |(host, _)| host)
            .to_owned();
        known.order = self.next;
        self.next += 1;
        self.senders.insert(sender, known);
    }

    /// Forgets the oldest sender of the host that has the most senders. So a host that invents names removes
    /// only its own senders. A watch of the forgotten sender continues.
    fn make_room(&mut self) {
        let mut of_host: BTreeMap<&str, usize> = BTreeMap::new();
        for known in self.senders.values() {
            *of_host.entry(&known.from).or_default() += 1;
        }
        let crowd = of_host.into_iter().max_by_key(|(_, senders)| *senders);
        let Some((crowd, _)) = crowd else {
            return;
        };
        let of_crowd = self.senders.iter().filter(|(_, known)| known.from == crowd);
        let oldest = of_crowd.min_by_key(|(_, known)| known.order);
        if let Some(oldest) = oldest.map(|(sender, _)| sender.clone()) {
            self.senders.remove(&oldest);
        }
    }

    /// Begins the grace period of every sender with this proof hash. One process has a sender for each rank
    /// and slot layout.
    fn vouched(&mut self, proof_hash: ProofHash) {
        for (sender, known) in &mut self.senders {
            let room = self.steps.len() < MAX_STEPS;
            if room && known.proof_hash == Some(proof_hash) && known.life == Life::Unknown {
                known.life = Life::Ended;
                info!(
                    sender = sender.id, grace = ?self.grace,
                    "this sender has ended: its next process has proved it"
                );
                self.settling += 1;
                self.steps.spawn(settle(sender.clone(), self.grace));
            }
        }
    }

    /// Seeks a proof that no write can arrive any more in the quarantined slots of a lease.
    pub(super) fn seek(&mut self, sender: SenderId, lease: LeaseId) {
        let known = self.senders.get(&sender);
        match known.map(|known| known.life).unwrap_or_default() {
            Life::Unknown => {}
            // The end of the running grace period is proof for all leases of the sender.
            Life::Ended => return,
            Life::Over => {
                self.settling += 1;
                self.steps.spawn(settle(sender, Duration::ZERO));
                return;
            }
        }
        let Some(process) = known.and_then(|known| known.process.clone()) else {
            warn!(
                sender = sender.id,
                %lease,
                "slots quarantined until the sender or its next process sends a message: the sender runs on another \
                 host, or this process cannot watch it"
            );
            return;
        };
        warn!(sender = sender.id, %lease, "slots quarantined until the sender sends a message or its process ends");
        if !self.watched.insert(sender.clone()) {
            return;
        }
        self.steps.spawn(async move {
            let ended = process.readable().await.map(|_| ());
            Step::Ended(sender, ended)
        });
    }

    /// Returns true while a grace period runs.
    pub(super) fn is_settling(&self) -> bool {
        self.settling > 0
    }

    /// Returns the next result; does not complete while there is no result.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub(super) async fn next(&mut self) -> News {
        loop {
            match self.steps.join_next().await {
                None => std::future::pending().await,
                Some(Ok(Step::Ended(sender, Ok(())))) => {
                    self.watched.remove(&sender);
                    self.settling += 1;
                    self.steps.spawn(settle(sender, GRACE));
                    return News::Settling;
                }
                Some(Ok(Step::Ended(sender, Err(error)))) => {
                    self.watched.remove(&sender);
                    warn!(sender = sender.id, %error, "cannot watch the sender's process");
                }
                Some(Ok(Step::Settled(sender))) => {
                    self.settling -= 1;
                    if let Some(known) = self.senders.get_mut(&sender) {
                        known.life = Life::Over;
                    }
                    info!(
                        sender = sender.id,
                        "the sender's process has ended: slots are free again"
                    );
                    return News::Over(sender);
                }
                Some(Err(panic)) => std::panic::resume_unwind(panic.into_panic()),
            }
        }
    }
}

/// Waits for a grace period in short steps. While this process is stopped, no data arrives, but time passes.
/// Such a pause uses up only one step, so most of the grace period still follows the pause.
async fn settle(sender: SenderId, grace: Duration) -> Step {
    for _ in 0..STEPS {
        tokio::time::sleep(grace / STEPS).await;
    }
    Step::Settled(sender)
}

const STEPS: u32 = 20;

/// Opens a descriptor of a process on this host; `None` if the process cannot be watched.
fn open(sender: &SenderId, pid: u32) -> Option<Arc<AsyncFd<OwnedFd>>> {
    let number = i32::try_from(pid).ok().and_then(Pid::from_raw)?;
    #[expect(
        deprecated,
        reason = "sound for an `OwnedFd`, and the successor is unsafe"
    )]
    let register = AsyncFd::new;
    match pidfd_open(number, PidfdFlags::NONBLOCK)
        .map_err(io::Error::from)
        .and_then(register)
    {
        Ok(descriptor) => Some(Arc::new(descriptor)),
        Err(error) => {
            warn!(sender = sender.id, pid, %error, "cannot watch the sender's process");
            None
        }
    }
}

#[cfg(test)]
mod tests;
