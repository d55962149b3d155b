//! The roster: the list of all known keys, with the name, the roles and the hosts of each.
//!
//! ```yaml
//! ed25519:0tq3…: {name: prefill-a, roles: [sender], hosts: [10.0.0.1]}
//! ed25519:Zk1h…: {name: decode-a, roles: [receiver], hosts: [10.0.0.2, decode-a.example]}
//! ed25519:b8cX…: {name: front, roles: [proxy]}
//! ed25519:Qd0p…: {name: web, roles: [sender], replicas: true}   # web-1, web-2, ...: several processes, one key
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

use super::PublicKey;
use crate::host::bare;

/// The part that a process may play on the control channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// A sidecar beside a prefill engine.
    Sender,
    /// A sidecar beside a decode engine.
    Receiver,
    /// A proxy.
    Proxy,
}

/// A known process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The name, which one or two keys may have. While a process changes its key, both keys have its name.
    pub name: Arc<str>,
    /// The roles, without repetitions.
    pub roles: Vec<Role>,
    /// Addresses and names of the process's hosts; empty if the process may have any address.
    pub hosts: Vec<String>,
    /// True if several processes use the key, such as the pods of one Kubernetes deployment. The id of each begins with
    /// the name and a `-`.
    pub replicas: bool,
}

/// All known keys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Roster {
    members: BTreeMap<PublicKey, Member>,
}

/// All mistakes in a roster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RosterError {
    path: PathBuf,
    mistakes: Vec<String>,
}

impl Role {
    /// Returns the role's word in the roster and in logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sender => "sender",
            Self::Receiver => "receiver",
            Self::Proxy => "proxy",
        }
    }

    pub(super) const ALL: [Self; 3] = [Self::Sender, Self::Receiver, Self::Proxy];
}

impl Member {
    /// Returns true if the process has one of these roles.
    pub fn has(&self, roles: &[Role]) -> bool {
        self.roles.iter().any(|role| roles.contains(role))
    }

    /// Returns true if the process may have this address or name.
    pub fn is_at(&self, host: &str) -> bool {
        let bare = bare(host);
        self.hosts.is_empty() || self.hosts.iter().any(|h| h.eq_ignore_ascii_case(bare))
    }

    /// Returns true if a process with this key may have this id: the name itself or, for replicas, `NAME-` and more.
    pub fn is_called(&self, id: &str) -> bool {
        match id.strip_prefix(&*self.name) {
            Some("") => true,
            Some(rest) => {
                self.replicas && rest.len() > 1 && rest.starts_with('-') && !rest.contains('/')
            }
            None => false,
        }
    }

    /// Returns true if a rank of a process with this key may have this id: the process's id, or that id, `/` and a rank.
    pub fn has_rank(&self, id: &str) -> bool {
        self.is_called(id.split('/').next().unwrap_or_default())
    }
}

impl Roster {
    /// Reads a roster.
    ///
    /// # Errors
    /// The file cannot be read, or has mistakes.
    pub fn read(path: &Path) -> Result<Self, RosterError> {
        let text = std::fs::metadata(path).and_then(|file| match file.len() {
            // A wrong path may name a device or a file of gigabytes.
            bytes if bytes > MAX_BYTES || !file.is_file() => Err(std::io::Error::other(format!(
                "not a file of at most {MAX_BYTES} bytes"
            ))),
            _ => std::fs::read_to_string(path),
        });
        let read = text.map_err(|e| vec![format!("cannot read the roster: {e}")]);
        read.and_then(|text| Self::parse(&text))
            .map_err(|mistakes| RosterError {
                path: path.to_owned(),
                mistakes,
            })
    }

    /// Parses the text of a roster. Returns all mistakes.
    fn parse(text: &str) -> Result<Self, Vec<String>> {
        let entries: Option<BTreeMap<String, Value>> =
            serde_saphyr::from_str(text).map_err(|e| {
                let first = e.to_string();
                let first = first.lines().next().unwrap_or_default();
                vec![format!("not a list of keys: {first}; write {EXAMPLE}")]
            })?;
        let mut roster = Self::default();
        let mut mistakes = Vec::new();
        for (key, fields) in entries.unwrap_or_default() {
            let parsed = key.parse::<PublicKey>();
            if let Err(error) = &parsed {
                mistakes.push(format!("{key:?}: {error}"));
            }
            let mut wrong = |field: &str, what: String| {
                mistakes.push(format!("{key}: {field}: {what}"));
            };
            let member = match &fields {
                Value::Object(fields) => member(fields, &mut wrong),
                _ => {
                    wrong("entry", format!("not a map; write {EXAMPLE}"));
                    None
                }
            };
            if let (Ok(key), Some(member)) = (parsed, member) {
                roster.members.insert(key, member);
            }
        }
        roster.check(&mut mistakes);
        if mistakes.is_empty() {
            Ok(roster)
        } else {
            Err(mistakes)
        }
    }

    /// Finds mistakes that concern several entries.
    fn check(&self, mistakes: &mut Vec<String>) {
        if self.members.len() > MAX_MEMBERS {
            mistakes.push(format!("more than {MAX_MEMBERS} keys; remove old keys"));
        }
        let mut names: BTreeMap<&str, Vec<&PublicKey>> = BTreeMap::new();
        for (key, member) in &self.members {
            names.entry(&member.name).or_default().push(key);
        }
        for (name, keys) in names {
            if keys.len() > 2 {
                mistakes.push(format!(
                    "{name}: name: {} keys have it; a name has one key, and two while the process changes its key",
                    keys.len()
                ));
            }
            let members: Vec<_> = keys.iter().map(|key| &self.members[*key]).collect();
            if members.windows(2).any(|pair| pair[0] != pair[1]) {
                mistakes.push(format!(
                    "{name}: its keys have different roles, hosts or replicas; write the same for each key of a name"
                ));
            }
        }
        self.check_replicas(mistakes);
    }

    /// Finds names that another member's replicas may have. One of the two could then act as the other.
    fn check_replicas(&self, mistakes: &mut Vec<String>) {
        let members = || self.members.values();
        for group in members().filter(|member| member.replicas) {
            let taken = members().filter(|m| m.name != group.name && group.is_called(&m.name));
            mistakes.extend(taken.map(|other| {
                format!(
                    "{}: replicas: they may have the name {}, which has another key; choose other names",
                    group.name, other.name
                )
            }));
        }
    }

    /// Returns the process with this key.
    pub fn member(&self, key: &PublicKey) -> Option<&Member> {
        self.members.get(key)
    }

    /// Returns this roster with further keys.
    ///
    /// # Errors
    /// All mistakes that concern several entries.
    pub(super) fn extended(
        &self,
        more: impl Iterator<Item = (PublicKey, Member)>,
    ) -> Result<Self, Vec<String>> {
        let mut extended = self.clone();
        extended.members.extend(more);
        let mut mistakes = Vec::new();
        extended.check(&mut mistakes);
        match mistakes.is_empty() {
            true => Ok(extended),
            false => Err(mistakes),
        }
    }

    /// Returns the process with this name.
    pub fn named(&self, name: &str) -> Option<&Member> {
        self.members.values().find(|member| &*member.name == name)
    }

    /// Returns the keys of a name.
    pub fn keys_of(&self, name: &str) -> Vec<PublicKey> {
        let of_name = self.members.iter().filter(|(_, m)| &*m.name == name);
        of_name.map(|(key, _)| *key).collect()
    }

    /// Returns each key with its process, sorted by key.
    pub fn members(&self) -> impl Iterator<Item = (&PublicKey, &Member)> {
        self.members.iter()
    }

    /// Returns the number of keys.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Returns true if there is no key.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }
}

/// Parses the fields of one entry; `None` if there is a mistake.
pub(super) fn member(
    fields: &Map<String, Value>,
    wrong: &mut impl FnMut(&str, String),
) -> Option<Member> {
    let mut good = true;
    let mut mistake = |field: &str, what: String| {
        good = false;
        wrong(field, what);
    };
    for field in fields.keys() {
        if !["name", "roles", "hosts", "replicas"].contains(&field.as_str()) {
            mistake(
                field,
                "unknown; write name, roles, hosts and replicas".to_owned(),
            );
        }
    }
    let name = match fields.get("name") {
        Some(Value::String(name)) if is_name(name) => name.as_str(),
        _ => {
            mistake(
                "name",
                "write 1 to 128 letters, digits, `.`, `_`, `:`, `-`".to_owned(),
            );
            ""
        }
    };
    let mut roles = Vec::new();
    match texts(fields.get("roles")).filter(|words| !words.is_empty()) {
        Some(words) => {
            for word in words {
                match Role::ALL.iter().find(|role| role.as_str() == word) {
                    Some(role) if !roles.contains(role) => roles.push(*role),
                    Some(_) => mistake("roles", format!("{word} stands twice; remove one")),
                    None => mistake(
                        "roles",
                        format!("{word:?} is no role; write sender, receiver or proxy"),
                    ),
                }
            }
        }
        None => mistake(
            "roles",
            "write a list of sender, receiver and proxy".to_owned(),
        ),
    }
    roles.sort_unstable();
    let mut hosts = Vec::new();
    if let Some(given) = fields.get("hosts") {
        let given = texts(Some(given)).filter(|hosts| !hosts.is_empty());
        for host in given.clone().unwrap_or_default() {
            if is_host(bare(host)) {
                hosts.push(bare(host).to_owned());
            } else {
                mistake(
                    "hosts",
                    format!(
                        "{host:?} is no host; write an IP address or a host name, without port"
                    ),
                );
            }
        }
        if given.is_none() {
            mistake(
                "hosts",
                "write a list of IP addresses and host names, or remove it for any host".to_owned(),
            );
        }
    }
    let replicas = match fields.get("replicas") {
        None => false,
        Some(Value::Bool(replicas)) => *replicas,
        Some(_) => {
            mistake(
                "replicas",
                "write true if several processes use the key".to_owned(),
            );
            false
        }
    };
    good.then(|| Member {
        name: name.into(),
        roles,
        hosts,
        replicas,
    })
}

/// Returns the elements of a list of texts; `None` for any other value.
fn texts(value: Option<&Value>) -> Option<Vec<&str>> {
    value?.as_array()?.iter().map(Value::as_str).collect()
}

/// Returns true if logs and metrics can show the name. The same rule holds for `sidecar.id`.
pub(super) fn is_name(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || "._:-".contains(c);
    (1..=128).contains(&name.len()) && name.chars().all(fits)
}

pub(super) fn is_host(host: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let is_name = (1..=253).contains(&host.len()) && host.chars().all(fits);
    is_name || host.parse::<std::net::IpAddr>().is_ok()
}

impl fmt::Display for RosterError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, mistake) in self.mistakes.iter().take(MAX_SHOWN).enumerate() {
            let line = if i == 0 { "" } else { "\n" };
            write!(f, "{line}{}: {mistake}", self.path.display())?;
        }
        match self.mistakes.len().checked_sub(MAX_SHOWN) {
            None | Some(0) => Ok(()),
            Some(more) => write!(f, "\n{}: {more} more mistakes", self.path.display()),
        }
    }
}

impl std::error::Error for RosterError {}

/// One entry, for messages.
const EXAMPLE: &str = "ed25519:KEY: {name: NAME, roles: [sender], hosts: [ADDRESS]}";

/// Largest roster, in bytes.
const MAX_BYTES: u64 = 4 << 20;
/// Largest number of keys.
const MAX_MEMBERS: usize = 8192;
/// Largest number of mistakes in one message.
const MAX_SHOWN: usize = 20;

#[cfg(test)]
mod tests;
