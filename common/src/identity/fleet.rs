//! The keys of several processes, and the roster that lists them, made in one step.
//!
//! With one command an operator makes all keys of a small fleet on one host, and then copies to each other host the
//! roster and the key of its own process.

use std::fs::{DirBuilder, File};
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::str::FromStr;

use serde_json::json;

use super::roster::{is_host, is_name};
use super::{PublicKey, Role, Roster, keygen};
use crate::host::bare;

/// A process that gets a key. Its text is `NAME=ROLE[+ROLE][@HOST[,HOST]]`, for example `prefill=sender@10.0.0.1`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Newcomer {
    name: String,
    roles: Vec<Role>,
    hosts: Vec<String>,
}

impl FromStr for Newcomer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, rest) = text
            .split_once('=')
            .ok_or("write NAME=ROLE or NAME=ROLE@HOST, for example prefill=sender@10.0.0.1")?;
        if !is_name(name) {
            return Err(format!(
                "{name:?} is no name; write 1 to 128 letters, digits, `.`, `_`, `:`, `-`"
            ));
        }
        let (roles, hosts) = match rest.split_once('@') {
            Some((roles, hosts)) => (roles, hosts.split(',').map(bare).collect()),
            None => (rest, Vec::new()),
        };
        let role = |word: &str| {
            let known = Role::ALL.into_iter().find(|role| role.as_str() == word);
            known.ok_or_else(|| format!("{word:?} is no role; write sender, receiver or proxy"))
        };
        let mut roles = roles.split('+').map(role).collect::<Result<Vec<_>, _>>()?;
        roles.sort_unstable();
        roles.dedup();
        if let Some(host) = hosts.iter().find(|host| !is_host(host)) {
            return Err(format!(
                "{host:?} is no host; write an IP address or a host name, without port"
            ));
        }
        Ok(Self {
            name: name.to_owned(),
            roles,
            hosts: hosts.into_iter().map(str::to_owned).collect(),
        })
    }
}

/// Makes `FOLDER/NAME.key` for each process, and adds the processes to `FOLDER/roster.yaml`. Makes the folder and the
/// roster if there are none. With `replicas`, several processes use each key. Returns the public keys in the order of
/// the processes.
///
/// # Errors
/// A name or a file exists already, or a file cannot be written. If the roster cannot be extended, no new key stays.
pub fn keygen_all(
    folder: &Path,
    newcomers: &[Newcomer],
    replicas: bool,
) -> Result<Vec<PublicKey>, String> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
    made.map_err(|e| format!("{}: cannot make the folder: {e}", folder.display()))?;
    let file = folder.join("roster.yaml");
    let before = match std::fs::read_to_string(&file) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(e) => return Err(format!("{}: cannot read the roster: {e}", file.display())),
    };
    if !before.is_empty() {
        let known = Roster::read(&file).map_err(|e| e.to_string())?;
        if let Some(known) = newcomers.iter().find(|n| known.named(&n.name).is_some()) {
            return Err(format!(
                "{}: {} has a key already; choose another name, or add a second key by hand",
                file.display(),
                known.name
            ));
        }
    }
    let mut keys = Vec::new();
    let done = make(folder, newcomers, &mut keys).and_then(|()| {
        let mut text = before;
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        for (newcomer, key) in newcomers.iter().zip(&keys) {
            text += &line(newcomer, key, replicas);
        }
        replace(&file, &text)
    });
    if let Err(error) = done {
        // A key that no roster lists is of no use, and would only make the next call fail.
        for newcomer in &newcomers[..keys.len()] {
            std::fs::remove_file(key_file(folder, newcomer)).ok();
        }
        return Err(error);
    }
    Ok(keys)
}

fn make(folder: &Path, newcomers: &[Newcomer], keys: &mut Vec<PublicKey>) -> Result<(), String> {
    for newcomer in newcomers {
        let key = keygen(&key_file(folder, newcomer)).map_err(|e| e.to_string())?;
        keys.push(key);
    }
    Ok(())
}

fn key_file(folder: &Path, newcomer: &Newcomer) -> std::path::PathBuf {
    folder.join(format!("{}.key", newcomer.name))
}

/// Returns the line of the roster. The texts are in quotation marks, because YAML would read some names as numbers.
fn line(newcomer: &Newcomer, key: &PublicKey, replicas: bool) -> String {
    let roles: Vec<_> = newcomer.roles.iter().map(|role| role.as_str()).collect();
    let mut fields = format!(
        "name: {}, roles: [{}]",
        json!(newcomer.name),
        roles.join(", ")
    );
    if !newcomer.hosts.is_empty() {
        fields += &format!(", hosts: {}", json!(newcomer.hosts));
    }
    if replicas {
        fields += ", replicas: true";
    }
    format!("{key}: {{{fields}}}\n")
}

/// Checks the text as a roster, and replaces the file in one step, because running processes may read the file now.
fn replace(file: &Path, text: &str) -> Result<(), String> {
    let new = file.with_extension("new");
    let failed = |e: std::io::Error| format!("{}: cannot write the roster: {e}", new.display());
    let mut written = File::create(&new).map_err(failed)?;
    written
        .write_all(text.as_bytes())
        .and_then(|()| written.sync_all())
        .map_err(failed)?;
    let checked = Roster::read(&new).map_err(|e| e.to_string());
    let moved = checked.and_then(|_| std::fs::rename(&new, file).map_err(failed));
    moved.inspect_err(|_| drop(std::fs::remove_file(&new)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::identity::PrivateKey;

    fn newcomers(texts: &[&str]) -> Vec<Newcomer> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn one_call_makes_all_keys_and_their_roster() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("keys");
        let first = newcomers(&["prefill=sender@10.0.0.1,[fe80::1]", "7=proxy"]);
        let keys = keygen_all(&folder, &first, false).unwrap();
        assert_eq!(std::fs::metadata(&folder).unwrap().mode() & 0o777, 0o700);
        // A second call adds to the roster and leaves the rest as it is.
        let more = keygen_all(&folder, &newcomers(&["web=receiver+sender"]), true).unwrap();
        let roster = Roster::read(&folder.join("roster.yaml")).unwrap();
        let find = |key| roster.member(key).unwrap();
        let (prefill, seven, web) = (find(&keys[0]), find(&keys[1]), find(&more[0]));
        assert_eq!(
            (&*prefill.name, &*seven.name, &*web.name),
            ("prefill", "7", "web")
        );
        assert_eq!(prefill.hosts, ["10.0.0.1", "fe80::1"]);
        assert_eq!((prefill.replicas, web.replicas), (false, true));
        assert_eq!(web.roles, [Role::Sender, Role::Receiver]);
        for (name, key) in [("prefill", keys[0]), ("7", keys[1]), ("web", more[0])] {
            let file = folder.join(format!("{name}.key"));
            assert_eq!(PrivateKey::read(&file).unwrap().public(), key);
        }
    }

    #[test]
    fn a_call_that_fails_leaves_no_key() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        keygen_all(folder, &newcomers(&["a=sender"]), false).unwrap();
        let before = std::fs::read(folder.join("roster.yaml")).unwrap();
        for (texts, replicas, expected) in [
            (&["b=sender", "a=sender"][..], false, "a has a key already"),
            (&["b=sender", "b=sender"], false, "the file exists"),
            // The replicas of b could have the name b-1, too.
            (&["b-1=sender", "b=sender"], true, "choose other names"),
        ] {
            let error = keygen_all(folder, &newcomers(texts), replicas).unwrap_err();
            assert!(error.contains(expected), "{error}");
            let mut files: Vec<_> = std::fs::read_dir(folder)
                .unwrap()
                .map(|entry| entry.unwrap().file_name())
                .collect();
            files.sort();
            assert_eq!(files, ["a.key", "roster.yaml"], "{expected}");
            assert_eq!(std::fs::read(folder.join("roster.yaml")).unwrap(), before);
        }
        std::fs::write(folder.join("roster.yaml"), "5").unwrap();
        keygen_all(folder, &newcomers(&["b=sender"]), false).unwrap_err();
        assert!(!folder.join("b.key").exists());
    }

    #[test]
    fn mistakes_name_the_word() {
        for (text, expected) in [
            ("a", "write NAME=ROLE"),
            ("=sender", "is no name"),
            ("../a=sender", "is no name"),
            ("a=", "is no role"),
            ("a=sender+king", "\"king\" is no role"),
            ("a=sender@", "is no host"),
            ("a=sender@10.0.0.1:7300", "is no host"),
        ] {
            let error = text.parse::<Newcomer>().unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
