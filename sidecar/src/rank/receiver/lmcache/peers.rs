//! Recognizes LMCache's senders by their connections and tells which of them know the slots' addresses.
//!
//! An LMCache sender makes the init handshake once in the life of its process. If a sender made the handshake
//! with an earlier sidecar process, or with an earlier slot layout, its addresses do not belong to this
//! process's slots. This module recognizes a sender with wrong addresses, so that the sender gets no slot.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use protocol::Epoch;
use protocol::receiver::{Route, SenderId};

use common::socket_owner;

/// The senders that have the slots' addresses, and the connections that were already checked.
#[derive(Debug, Default)]
pub(crate) struct LmcachePeers {
    known: BTreeMap<Route, SenderId>,
    shown: BTreeSet<Shown>,
    /// The process behind each connection of the init port. To find a process, all of /proc is read, so each
    /// connection is looked up only once.
    processes: BTreeMap<Route, Option<u32>>,
}

/// The identity of a sender. For a sender on this host, the identity is the process behind the sender's
/// connection. For a sender on another host, the identity is the host and the name that an asynchronous sender
/// gives itself.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Shown {
    Process(u32),
    Host(String, String),
}

/// The sender behind an alloc connection.
#[derive(Debug)]
pub(crate) struct LmcachePeer {
    pub(crate) sender: SenderId,
    /// The sender's process id; `None` if the process does not run on this host.
    pub(crate) process: Option<u32>,
    /// True if the sender knows the slots' addresses in the present slot layout.
    pub(crate) linked: bool,
}

/// Maximum number of remembered senders. When the set is full, all senders are forgotten. For a while these
/// senders then get no slots, and decode engines compute the KV.
const MAX_SHOWN: usize = 4096;

impl LmcachePeers {
    /// Notes that a sender has the slots' addresses. `name` is the sender's own name, empty for a synchronous
    /// sender. Returns true if the sender was not known before.
    pub(crate) fn show(&mut self, route: Route, from: &str, to_port: u16, name: &str) -> bool {
        let process = *self
            .processes
            .entry(route)
            .or_insert_with(|| process_behind(from, to_port));
        if self.shown.len() >= MAX_SHOWN {
            self.shown.clear();
        }
        self.shown.insert(Shown::of(process, from, name))
    }

    /// Forgets all senders, because the slot layout has changed and their addresses are wrong.
    pub(crate) fn forget(&mut self) {
        self.shown.clear();
    }

    /// Identifies the sender of a new connection of the alloc port; `None` if the connection is already
    /// known.
    pub(crate) fn meet(
        &mut self,
        route: Route,
        from: &str,
        to_port: u16,
        identity: &str,
    ) -> Option<LmcachePeer> {
        if self.known.contains_key(&route) {
            return None;
        }
        let (host, port) = from.rsplit_once(':').unwrap_or((from, ""));
        let name = identity.split_once(TO).map_or("", |(name, _)| name);
        let shown = Shown::of(process_behind(from, to_port), from, name);
        let process = match shown {
            Shown::Process(process) => Some(process),
            Shown::Host(..) => None,
        };
        let who = if name.is_empty() { port } else { name };
        let sender = SenderId {
            id: format!("{host}/{who}"),
            epoch: Epoch(0),
        };
        self.known.insert(route, sender.clone());
        Some(LmcachePeer {
            sender,
            process,
            linked: self.shown.contains(&shown),
        })
    }

    pub(crate) fn lost(&mut self, route: Route) {
        self.known.remove(&route);
    }

    /// Forgets a connection of the init port that has ended.
    pub(crate) fn lost_init(&mut self, route: Route) {
        self.processes.remove(&route);
    }
}

impl Shown {
    fn of(process: Option<u32>, from: &str, name: &str) -> Self {
        match process {
            Some(process) => Self::Process(process),
            None => {
                let host = from.rsplit_once(':').map_or(from, |(host, _)| host);
                Self::Host(host.to_owned(), name.to_owned())
            }
        }
    }
}

/// Returns the id of the process on this host behind a connection; `None` if it runs on another host.
fn process_behind(from: &str, to_port: u16) -> Option<u32> {
    let address: Option<SocketAddr> = from.parse().ok();
    address.and_then(|address| socket_owner::process_behind(address, to_port))
}

/// The text between the two names in an asynchronous sender's identity.
const TO: &str = "-to-";
