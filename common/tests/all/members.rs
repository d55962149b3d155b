//! Processes with keys, and the roster that lists them.

#![allow(unreachable_pub, reason = "the program of the tests has no users")]

use std::path::PathBuf;

use common::identity::{Auth, Identity, PublicKey, Role, keygen};
use common::zmq::{Keyed, Protection};
use tempfile::TempDir;

/// A folder with keys and a roster.
#[derive(Debug)]
pub struct Members {
    folder: TempDir,
    entries: Vec<(PublicKey, String)>,
}

impl Members {
    /// Makes a key for each name, with the role and the hosts of the name.
    pub fn new(members: &[(&str, &str)]) -> Self {
        let mut all = Self {
            folder: tempfile::tempdir().unwrap(),
            entries: Vec::new(),
        };
        for (name, rest) in members {
            let key = keygen(&all.key_file(name)).unwrap();
            all.entries.push((key, format!("{{name: {name}, {rest}}}")));
        }
        all.write();
        all
    }

    /// Returns the identity of one process.
    pub fn identity(&self, name: &str, auth: Auth) -> Identity {
        let (key, roster) = (self.key_file(name), self.roster_file());
        Identity::load(auth, &key, &roster).unwrap()
    }

    /// Returns the protection of one process's socket whose peers need one of these roles.
    pub fn keyed(&self, name: &str, auth: Auth, roles: &'static [Role]) -> Protection {
        Protection::of(Some(&self.identity(name, auth)), roles)
    }

    /// Returns the key of a name.
    pub fn key(&self, name: &str) -> PublicKey {
        let named = format!("{{name: {name},");
        let found = self
            .entries
            .iter()
            .find(|(_, rest)| rest.starts_with(&named));
        found.unwrap().0
    }

    /// Takes over the key and the entry of a name.
    pub fn adopt(&mut self, from: &Self, name: &str) {
        let key = from.key(name);
        let entry = from.entries.iter().find(|(other, _)| *other == key);
        self.entries.push(entry.unwrap().clone());
        std::fs::copy(from.key_file(name), self.key_file(name)).unwrap();
        self.write();
    }

    /// Removes a name from the roster file.
    pub fn remove(&mut self, name: &str) {
        let key = self.key(name);
        self.entries.retain(|(other, _)| *other != key);
        self.write();
    }

    fn key_file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn roster_file(&self) -> PathBuf {
        self.folder.path().join("roster.yaml")
    }

    fn write(&self) {
        let lines = self.entries.iter();
        let text: String = lines
            .map(|(key, rest)| format!("{key}: {rest}\n"))
            .collect();
        std::fs::write(self.roster_file(), text).unwrap();
    }
}

/// Returns a protection that also demands one of these keys.
pub fn only(protection: Protection, keys: Vec<PublicKey>) -> Protection {
    match protection {
        Protection::Keyed(keyed) => Protection::Keyed(Keyed { keys, ..keyed }),
        Protection::Plain => panic!("a plain socket has no keys"),
    }
}
