//! Names the senders and receivers of the proxy's roster to the sidecars that have proved a key. So a sidecar's own
//! roster needs only the proxy and the sidecar itself.

use common::identity::Roster;
use protocol::VERSION;
use protocol::codec;
use protocol::receiver::Route;
use protocol::registration::{FromProxy, Peer, Peers};
use tokio::sync::watch;

use super::Registration;

impl Registration {
    /// Names all peers to one sidecar.
    pub(super) fn tell_peers(&mut self, route: Route) {
        for message in self.peer_messages() {
            // If the sidecar does not read or is gone, it gets the list after its next connection.
            self.inputs.port.answer(route, message).ok();
        }
    }

    /// Names all peers to all sidecars, because the roster has changed.
    pub(super) fn tell_peers_to_all(&mut self) {
        let messages = self.peer_messages();
        for &route in self.routes.values() {
            for message in &messages {
                self.inputs.port.answer(route, message.clone()).ok();
            }
        }
    }

    fn peer_messages(&self) -> Vec<Vec<u8>> {
        let identity = self.inputs.identity.as_ref();
        let peers = identity.map(common::identity::Identity::peers);
        encoded(peers.unwrap_or_default(), rand::random())
    }
}

/// Returns the messages of a list. No message is too long for the registration port.
fn encoded(peers: Vec<Peer>, list: u64) -> Vec<Vec<u8>> {
    let mut parts: Vec<Vec<Peer>> = vec![Vec::new()];
    let mut bytes = 0;
    for peer in peers {
        let texts = peer.key.len() + peer.name.len() + OTHER_BYTES;
        let size = texts + peer.hosts.iter().map(|host| host.len() + 5).sum::<usize>();
        bytes += size;
        if bytes > MAX_PART_BYTES {
            parts.push(Vec::new());
            bytes = size;
        }
        parts.last_mut().expect("never empty").push(peer);
    }
    let count = u32::try_from(parts.len()).unwrap_or(u32::MAX);
    (0..)
        .zip(parts)
        .map(|(part, peers)| {
            codec::encode(&FromProxy::Peers(Peers {
                v: VERSION,
                list,
                part,
                parts: count,
                peers,
            }))
        })
        .collect()
}

/// Waits until the roster has changed; for ever without a roster.
pub(super) async fn roster_changed(changes: &mut Option<watch::Receiver<std::sync::Arc<Roster>>>) {
    // The identity lives as long as the proxy, so an error means that the proxy ends.
    if let Some(changes) = changes
        && changes.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

/// Largest part of a list, in bytes. The port accepts 64 KiB, and one peer with many hosts may be long.
const MAX_PART_BYTES: usize = 32 << 10;
/// Bytes of a peer's field names, roles and marks.
const OTHER_BYTES: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_list_has_several_parts() {
        let example = Peers::example().peers.swap_remove(0);
        let peer = |number: usize| Peer {
            name: format!("{number:0>100}"),
            hosts: (0..number % 9)
                .map(|host| format!("{host}.example"))
                .collect(),
            ..example.clone()
        };
        let all: Vec<_> = (0..8192).map(peer).collect();
        let messages = encoded(all.clone(), 7);
        assert!(
            messages.len() > 1 && messages.len() <= 128,
            "{}",
            messages.len()
        );
        let mut found = Vec::new();
        for (index, message) in messages.iter().enumerate() {
            assert!(message.len() <= common::zmq::MAX_REGISTRATION_BYTES);
            let FromProxy::Peers(part) = codec::decode(message).unwrap() else {
                panic!("another message");
            };
            assert_eq!(
                (part.list, part.part as usize, part.parts as usize),
                (7, index, messages.len())
            );
            found.extend(part.peers);
        }
        assert_eq!(found, all);
        assert_eq!(
            encoded(Vec::new(), 7).len(),
            1,
            "an empty list ends the former one"
        );
    }
}
