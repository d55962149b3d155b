//! LMCache's senders as connections: whose they are, and whether they know our slots.
//!
//! LMCache makes the init handshake once in the life of a sender's process. One that made it with the
//! process before us, or before the buffer was cut anew, would write to addresses that are not
//! ours any more: it is told apart here, and never lent a slot.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use protocol::Epoch;
use protocol::receiver::{Route, SenderId};

use crate::net::socket_owner;

/// Who has been told of our slots, and the connections that have been looked at.
#[derive(Debug, Default)]
pub(super) struct LmcachePeers {
    known: BTreeMap<Route, SenderId>,
    shown: BTreeSet<Shown>,
    /// Processes behind connections of the init port: to find one all of /proc is read, so once a connection.
    processes: BTreeMap<Route, Option<u32>>,
}

/// By what a sender is recognized: the process behind its connection, or for one on another host the
/// host and the name that its asynchronous form gives itself.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Shown {
    Process(u32),
    Host(String, String),
}

/// What an alloc connection turned out to be.
#[derive(Debug)]
pub(super) struct LmcachePeer {
    pub(super) sender: SenderId,
    /// Its process, if it runs on this host.
    pub(super) process: Option<u32>,
    /// It knows the slots as they are now.
    pub(super) linked: bool,
}

/// How many senders are remembered; beyond it all are forgotten, and decode sides compute for a while.
const MAX_SHOWN: usize = 4096;

impl LmcachePeers {
    /// A sender has been told of the slots: `name` is what it calls itself, empty if synchronous.
    /// Says whether it is one more.
    pub(super) fn show(&mut self, route: Route, from: &str, to_port: u16, name: &str) -> bool {
        let process = *self
            .processes
            .entry(route)
            .or_insert_with(|| process_behind(from, to_port));
        if self.shown.len() >= MAX_SHOWN {
            self.shown.clear();
        }
        self.shown.insert(Shown::of(process, from, name))
    }

    /// The slots are others now.
    pub(super) fn forget(&mut self) {
        self.shown.clear();
    }

    /// Looks at a connection of the alloc port, once.
    pub(super) fn meet(
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

    pub(super) fn lost(&mut self, route: Route) {
        self.known.remove(&route);
    }

    /// A connection of the init port has ended.
    pub(super) fn lost_init(&mut self, route: Route) {
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

/// The process on this host behind a connection, if there is one.
fn process_behind(from: &str, to_port: u16) -> Option<u32> {
    let address: Option<SocketAddr> = from.parse().ok();
    address.and_then(|address| socket_owner::process_behind(address, to_port))
}

/// Between the two names of an asynchronous sender's identity.
const TO: &str = "-to-";
