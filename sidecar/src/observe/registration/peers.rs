//! Puts the parts of the proxy's list of peers together.

use std::collections::BTreeMap;

use protocol::registration::{Peer, Peers};

/// The parts of one list that have come so far.
#[derive(Debug, Default)]
pub(super) struct PeerList {
    list: u64,
    parts: BTreeMap<u32, Vec<Peer>>,
}

impl PeerList {
    /// Takes a part. Returns the whole list with its last part.
    ///
    /// # Errors
    /// The part fits to no list that a proxy would send.
    pub(super) fn take(&mut self, part: Peers) -> Result<Option<Vec<Peer>>, String> {
        if part.parts == 0 || part.parts > MAX_PARTS || part.part >= part.parts {
            return Err(format!(
                "part {} of {}; a list has at most {MAX_PARTS} parts",
                part.part, part.parts
            ));
        }
        if part.peers.len() > MAX_PEERS_OF_PART {
            return Err(format!(
                "{} peers in one part; at most {MAX_PEERS_OF_PART}",
                part.peers.len()
            ));
        }
        if part.list != self.list {
            // The rest of the former list will not come any more.
            self.parts.clear();
            self.list = part.list;
        }
        self.parts.insert(part.part, part.peers);
        if self.parts.len() < part.parts as usize {
            return Ok(None);
        }
        let parts = std::mem::take(&mut self.parts);
        Ok(Some(parts.into_values().flatten().collect()))
    }
}

/// Largest number of parts: more than the largest roster needs.
const MAX_PARTS: u32 = 128;
/// Largest number of peers in one part. A roster has at most 8192 keys.
const MAX_PEERS_OF_PART: usize = 8192;

#[cfg(test)]
mod tests {
    use super::*;

    fn part(list: u64, part: u32, parts: u32) -> Peers {
        let peer = Peer {
            name: format!("p{part}"),
            ..Peers::example().peers.swap_remove(0)
        };
        Peers {
            list,
            part,
            parts,
            peers: vec![peer],
            ..Peers::example()
        }
    }

    fn names(list: Option<Vec<Peer>>) -> Option<Vec<String>> {
        list.map(|peers| peers.into_iter().map(|peer| peer.name).collect())
    }

    #[test]
    fn a_list_is_whole_with_its_last_part() {
        let mut list = PeerList::default();
        assert_eq!(list.take(part(1, 1, 2)), Ok(None));
        assert_eq!(list.take(part(1, 1, 2)), Ok(None), "a repetition");
        let whole = list.take(part(1, 0, 2)).unwrap();
        assert_eq!(names(whole).unwrap(), ["p0", "p1"]);
        // A newer list begins before the former one is whole.
        assert_eq!(list.take(part(2, 0, 2)), Ok(None));
        assert_eq!(list.take(part(3, 1, 2)), Ok(None));
        assert_eq!(
            names(list.take(part(3, 0, 2)).unwrap()).unwrap(),
            ["p0", "p1"]
        );
        for (index, parts) in [(0, 0), (2, 2), (0, MAX_PARTS + 1)] {
            list.take(part(4, index, parts)).unwrap_err();
        }
    }
}
