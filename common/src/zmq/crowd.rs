//! The connection that a full port ends, so that a newcomer finds room.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::time::Instant;

use protocol::receiver::Route;
use tracing::warn;

use super::{MAX_PEERS, Traffic, rare};

/// A connection of a port.
pub(super) struct Connection<'a> {
    pub(super) route: Route,
    /// The owner for limits: the name in the roster, or the host if the peer has proved no key.
    pub(super) party: &'a str,
    /// True if the peer has sent a message.
    pub(super) known: bool,
    /// Time of the last message, or of the connection's start.
    pub(super) heard: Instant,
}

/// If there are more than [`MAX_PEERS`] connections, returns one connection of the party that has the most, but never
/// the newcomer. Prefers a connection that never sent a message; if there is none, returns the connection that has been
/// silent longest. So a party that opens many connections loses its own connections, and other parties keep theirs.
pub(super) fn victim(connections: &[Connection<'_>], newcomer: Route) -> Option<Route> {
    if connections.len() <= MAX_PEERS {
        return None;
    }
    let mut of: HashMap<&str, usize> = HashMap::new();
    for connection in connections {
        *of.entry(connection.party).or_default() += 1;
    }
    let most = |c: &&Connection<'_>| of.get(c.party).copied().unwrap_or_default();
    let others = connections.iter().filter(|c| c.route != newcomer);
    others
        .min_by_key(|c| (Reverse(most(c)), c.known, c.heard))
        .map(|c| c.route)
}

/// Counts and logs a connection that the port ends.
pub(super) fn note(traffic: &Traffic, port: u16) {
    let total = traffic.evicted();
    if rare(total) {
        warn!(
            port,
            limit = MAX_PEERS,
            total,
            "too many connections: closed the one that was silent for longest"
        );
    }
}
