//! Sockets whose peers prove a key: ZeroMQ's protocol inside TLS 1.3.
//!
//! The library's own sockets accept no stream of ours. So this module accepts and dials TCP connections itself, runs
//! the TLS handshake, and gives each stream to the library's driver for one connection. Reconnection, the limits on
//! handshakes and the routing of messages to connections are code of this module.
//!
//! A route is one connection. The identity that a peer presents in ZeroMQ's handshake is only a name for logs.

mod dealer;
mod link;
mod listener;
mod router;
mod stream;

pub(super) use self::dealer::{Dealer, News};
pub(super) use self::router::Router;

use crate::identity::{Identity, PublicKey, Role};

/// The protection of a socket.
#[derive(Clone, Debug, Default)]
pub enum Protection {
    /// Peers prove no key, and nothing is encrypted.
    #[default]
    Plain,
    /// Peers prove a key of the roster.
    Keyed(Keyed),
}

/// The peers of a socket whose peers prove a key.
#[derive(Clone, Debug)]
pub struct Keyed {
    /// This process's key and the roster.
    pub identity: Identity,
    /// Roles of which a peer needs at least one.
    pub roles: &'static [Role],
    /// Keys of which a peer needs one; empty if any key of the roster with such a role will do.
    pub keys: Vec<PublicKey>,
}

impl Protection {
    /// Returns the protection of a socket. Without an identity the socket is plain.
    pub fn of(identity: Option<&Identity>, roles: &'static [Role]) -> Self {
        identity.map_or(Self::Plain, |identity| {
            Self::Keyed(Keyed {
                identity: identity.clone(),
                roles,
                keys: Vec::new(),
            })
        })
    }
}
