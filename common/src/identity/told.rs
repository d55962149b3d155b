//! Peers that a proxy names to a sidecar, so that the sidecar's own roster needs only the proxy and the sidecar itself.

use protocol::registration::Peer;
use serde_json::{Map, json};

use super::{Identity, Member, PublicKey, Role, Roster};
use crate::identity::roster::member;

/// A peer that a proxy has named.
pub(super) type Told = (PublicKey, Member);

impl Identity {
    /// Returns the senders and receivers of the roster, for a proxy to name.
    pub fn peers(&self) -> Vec<Peer> {
        let roster = self.roster();
        let words = |member: &Member| {
            let roles = member.roles.iter().filter(|role| **role != Role::Proxy);
            roles.map(|role| role.as_str().to_owned()).collect()
        };
        let peers = roster.members().map(|(key, member)| Peer {
            key: key.to_string(),
            name: member.name.to_string(),
            roles: words(member),
            hosts: member.hosts.clone(),
            replicas: member.replicas,
        });
        peers.filter(|peer| !peer.roles.is_empty()).collect()
    }

    /// Uses these peers from now on, in addition to the roster's file, in place of the peers that were named before. The
    /// file has precedence: a proxy can neither change nor use a key or a name of the file. Returns the number of peers
    /// in use.
    ///
    /// # Errors
    /// All mistakes. Nothing changes then.
    pub fn learn(&self, peers: &[Peer]) -> Result<usize, Vec<String>> {
        let mut mistakes = Vec::new();
        let told: Vec<_> = peers
            .iter()
            .filter_map(|peer| read(peer, &mut mistakes))
            .collect();
        if !mistakes.is_empty() {
            return Err(mistakes);
        }
        self.set_told(told)
    }
}

/// Parses one peer; `None` if there is a mistake.
fn read(peer: &Peer, mistakes: &mut Vec<String>) -> Option<Told> {
    let mut fields = Map::new();
    fields.insert("name".to_owned(), json!(peer.name));
    fields.insert("roles".to_owned(), json!(peer.roles));
    fields.insert("replicas".to_owned(), json!(peer.replicas));
    if !peer.hosts.is_empty() {
        fields.insert("hosts".to_owned(), json!(peer.hosts));
    }
    let name = peer.name.escape_debug();
    let mut wrong = |field: &str, what: String| mistakes.push(format!("{name}: {field}: {what}"));
    let key = peer.key.parse::<PublicKey>();
    if let Err(error) = &key {
        wrong("key", error.to_string());
    }
    let member = member(&fields, &mut wrong);
    // A proxy that may name proxies could hand its power on to a process that the operator does not know.
    if peer.roles.iter().any(|role| role == Role::Proxy.as_str()) {
        wrong("roles", "a proxy may not name proxies".to_owned());
    }
    Some((key.ok()?, member?))
}

impl Roster {
    /// Returns this roster with the peers that a proxy has named.
    ///
    /// # Errors
    /// The peers contradict each other.
    pub(super) fn with(&self, told: &[Told]) -> Result<Self, Vec<String>> {
        let is_ours = |(key, member): &&Told| {
            self.member(key).is_some()
                || self
                    .members()
                    .any(|(_, ours)| ours.is_called(&member.name) || member.is_called(&ours.name))
        };
        let theirs = told.iter().filter(|one| !is_ours(one));
        self.extended(theirs.cloned())
    }
}
