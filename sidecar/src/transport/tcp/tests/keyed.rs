//! Tests protected connections between known peers and with strangers.

use common::identity::{Auth, Identity, PublicKey, keygen};

use super::pushes::failed;
use super::*;
use crate::memory::PIECE_BYTES;

pub(super) const PIECE: u64 = PIECE_BYTES as u64;
pub(super) const PROTECTED: [Protection; 2] = [Protection::Authenticated, Protection::Sealed];

/// Processes with keys, and the roster that lists them.
pub(crate) struct Members {
    pub(crate) folder: tempfile::TempDir,
    entries: Vec<(PublicKey, String)>,
}

impl Members {
    pub(crate) fn new() -> Self {
        let mut all = Self {
            folder: tempfile::tempdir().unwrap(),
            entries: Vec::new(),
        };
        for (name, role) in [("a", "sender"), ("b", "sender"), ("r", "receiver")] {
            let key = keygen(&all.folder.path().join(name)).unwrap();
            let entry = format!("{{name: {name}, roles: [{role}]}}");
            all.entries.push((key, entry));
        }
        all.write();
        all
    }

    fn write(&self) {
        let lines = self.entries.iter();
        let text: String = lines
            .map(|(key, rest)| format!("{key}: {rest}\n"))
            .collect();
        std::fs::write(self.folder.path().join("roster"), text).unwrap();
    }

    fn identity(&self, name: &str, auth: Auth) -> Identity {
        let (key, roster) = (
            self.folder.path().join(name),
            self.folder.path().join("roster"),
        );
        Identity::load(auth, &key, &roster).unwrap()
    }

    /// Returns a member's transport over 4 slots.
    fn tcp(&self, name: &str, auth: Auth, protection: Protection) -> Tcp {
        let config = Config {
            streams: 1,
            identity: Some(self.identity(name, auth)),
            protection,
            ..Config::default()
        };
        tcp(name, 4, MIB, config)
    }

    /// Returns a sender `a` and a receiver that has opened all its slots to it.
    pub(super) fn pair(&self, protection: Protection) -> (Tcp, Tcp) {
        let [sender, receiver] = ["a", "r"].map(|name| self.tcp(name, Auth::Require, protection));
        sender.receiving.buffer.fill_random(0, 4 * MIB, 1).unwrap();
        open_for(&receiver, "a");
        (sender, receiver)
    }
}

fn open_for(receiver: &Tcp, owner: &str) {
    let owner: Arc<str> = owner.into();
    (0..4).for_each(|slot| receiver.open(LEASE, Some(&owner), SlotIndex(slot)));
}

#[tokio::test]
async fn known_peers_move_every_byte() {
    let members = Members::new();
    for protection in PROTECTED {
        let (sender, receiver) = members.pair(protection);
        let link = sender.link(remote(&receiver)).await.unwrap();
        assert!(
            link.reported().ends_with(protection.as_str()),
            "{}",
            link.reported()
        );
        // Parts of one byte, of one piece and its neighbours, and of several pieces, at odd places.
        let mut bytes = 0;
        for (i, len) in [1, PIECE - 1, PIECE, PIECE + 1, MIB - 7]
            .into_iter()
            .enumerate()
        {
            let slot = u32::try_from(i % 4).unwrap();
            let offset = 7.min(MIB - len);
            let piece = Piece {
                offset,
                ..piece(slot, 3 - slot, len)
            };
            assert_eq!(link.write(LEASE, vec![piece]).await, Outcome::Done);
            let at = |slot: u32| u64::from(slot) * MIB + offset;
            let there = receiver.receiving.buffer.sum(at(3 - slot), len).unwrap();
            assert_eq!(
                there,
                sender.receiving.buffer.sum(at(slot), len).unwrap(),
                "{len}"
            );
            bytes += len;
        }
        // Writes of many parts, many at the same time.
        let all = (0..20).map(|_| {
            let parts = (0..4).map(|i| piece(i, 3 - i, MIB)).collect();
            link.write(LEASE, parts)
        });
        for outcome in futures::future::join_all(all).await {
            assert_eq!(outcome, Outcome::Done);
        }
        for slot in 0..4 {
            assert_eq!(sum(&sender, slot, MIB), sum(&receiver, 3 - slot, MIB));
        }
        assert_eq!(receiver.counts().bytes, bytes + 80 * MIB);
        // A lease that has ended stops its own writes and no others.
        receiver.close(SlotIndex(1));
        let before = sum(&receiver, 1, MIB);
        let all = [1, 2].map(|slot| link.write(LEASE, vec![piece(0, slot, MIB)]));
        let outcomes = futures::future::join_all(all).await;
        assert!(matches!(
            outcomes[0],
            Outcome::Failed { terminal: true, .. }
        ));
        assert_eq!(outcomes[1], Outcome::Done);
        assert_eq!(sum(&receiver, 1, MIB), before);
        assert_eq!(sum(&receiver, 2, MIB), sum(&sender, 0, MIB));
    }
}

/// The stronger value of the two sides counts.
#[tokio::test]
async fn the_stronger_side_decides() {
    let members = Members::new();
    for ours in Protection::ALL {
        for theirs in Protection::ALL {
            let sender = members.tcp("a", Auth::Require, ours);
            let receiver = members.tcp("r", Auth::Require, theirs);
            open_for(&receiver, "a");
            let link = sender.link(remote(&receiver)).await.unwrap();
            assert!(link.reported().ends_with(ours.max(theirs).as_str()));
            assert_eq!(
                link.write(LEASE, vec![piece(0, 0, MIB)]).await,
                Outcome::Done
            );
            assert_eq!(sum(&sender, 0, MIB), sum(&receiver, 0, MIB));
        }
    }
}

/// A stranger, a peer without keys and a member in another role make no link. Another member that knows the lease makes a
/// link and can write nothing.
#[tokio::test]
async fn others_write_nothing() {
    let members = Members::new();
    let (_, receiver) = members.pair(Protection::Authenticated);
    let before = sum(&receiver, 0, MIB);
    let alien = Members::new();
    // The alien's roster knows the receiver, so the alien has no reason to refuse.
    let mut known = alien.entries.clone();
    known.push(members.entries[2].clone());
    let alien = Members {
        entries: known,
        ..alien
    };
    alien.write();
    let no_keys = tcp("plain", 4, MIB, Config::default());
    for (who, why, text) in [
        (
            alien.tcp("a", Auth::Require, Protection::Plain),
            Refusal::Key,
            "roster",
        ),
        (
            members.tcp("r", Auth::Require, Protection::Plain),
            Refusal::Key,
            "roster",
        ),
        (no_keys, Refusal::Unprotected, "give this sidecar a key"),
    ] {
        let error = who.link(remote(&receiver)).await.unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
        until("the refusal is counted", || refused(&receiver, why) > 0);
    }
    let b = members.tcp("b", Auth::Require, Protection::Sealed);
    let link = b.link(remote(&receiver)).await.unwrap();
    let outcome = link.write(LEASE, vec![piece(0, 0, MIB)]).await;
    assert_eq!(
        outcome,
        failed(true, "the slot is not open under this lease")
    );
    assert_eq!(sum(&receiver, 0, MIB), before);
    assert_eq!(receiver.counts().batches, 0);
}

/// A receiver that another member's data port pretends to be gets nothing.
#[tokio::test]
async fn a_redirected_sender_makes_no_link() {
    let members = Members::new();
    let (sender, receiver) = members.pair(Protection::Sealed);
    let there = |id: &str| Remote {
        id: Some(id.to_owned()),
        ..remote(&receiver)
    };
    let error = sender.link(there("other/0")).await.unwrap_err().to_string();
    assert!(
        error.contains("the data port belongs to r, but the init port to other/0"),
        "{error}"
    );
    sender.link(there("r/0")).await.unwrap();
}

#[tokio::test]
async fn a_revoked_key_writes_nothing_more() {
    let mut members = Members::new();
    let (sender, receiver) = members.pair(Protection::Authenticated);
    let link = sender.link(remote(&receiver)).await.unwrap();
    assert_eq!(
        link.write(LEASE, vec![piece(0, 0, MIB)]).await,
        Outcome::Done
    );
    members.entries.remove(0);
    members.write();
    receiver.config.identity.as_ref().unwrap().reread();
    let before = sum(&receiver, 1, MIB);
    let outcome = link.write(LEASE, vec![piece(1, 1, MIB)]).await;
    assert!(matches!(outcome, Outcome::Failed { .. }), "{outcome:?}");
    assert_eq!(sum(&receiver, 1, MIB), before);
    assert_eq!(refused(&receiver, Refusal::Key), 1);
}

/// With `prefer`, a side without keys is served, but not under the lease of a member.
#[tokio::test]
async fn prefer_serves_both_and_mixes_nothing() {
    let members = Members::new();
    let receiver = members.tcp("r", Auth::Prefer, Protection::Sealed);
    let plain = tcp("plain", 4, MIB, Config::default());
    plain.receiving.buffer.fill_random(0, 4 * MIB, 5).unwrap();
    receiver.open(LEASE, None, SlotIndex(0));
    receiver.open(LeaseId(5), Some(&"a".into()), SlotIndex(1));
    let link = plain.link(remote(&receiver)).await.unwrap();
    assert_eq!(
        link.write(LEASE, vec![piece(0, 0, MIB)]).await,
        Outcome::Done
    );
    assert_eq!(sum(&plain, 0, MIB), sum(&receiver, 0, MIB));
    let stolen = link.write(LeaseId(5), vec![piece(0, 1, MIB)]).await;
    assert!(matches!(stolen, Outcome::Failed { .. }));
    assert_ne!(sum(&plain, 0, MIB), sum(&receiver, 1, MIB));
    // The other way: a sender with keys reaches a receiver that knows none.
    let sender = members.tcp("a", Auth::Prefer, Protection::Sealed);
    open_all(&plain, LEASE);
    let link = sender.link(remote(&plain)).await.unwrap();
    assert!(link.reported().ends_with("plain"));
    let strict = members.tcp("a", Auth::Require, Protection::Sealed);
    let error = strict.link(remote(&plain)).await.unwrap_err().to_string();
    assert!(error.contains("set sidecar.auth there"), "{error}");
}
