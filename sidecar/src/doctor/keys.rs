//! The roster: peers that it lacks, and changes of keys that nobody has finished.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use common::identity::{Auth, Role, Roster};

use super::finding::{Results, kinds};
use super::subject::Subject;
use crate::config::Config;

kinds! {
    PREFER = Warning "auth-prefer":
        "with auth: prefer an attacker on the path can make two peers believe that the other has no key";
        "set auth: require on all sides as soon as every peer has a key (docs/keys.md)";
    LACKS_ROLE = Error "roster-lacks-role":
        "a peer whose key is not in the roster is refused, so this sidecar has nobody to talk to";
        "add the public key of the peer (its `sidecar keygen` or `pd-proxy keygen` has printed it) with this role";
    LACKS_HOST = Error "roster-lacks-host":
        "the roster says at which hosts a key may be; a peer at another host is refused";
        "add the host to `hosts` of the peer's entry, exactly as this side writes it";
    ROTATION = Warning "rotation-unfinished":
        "while a name has two keys, whoever has the old key can act as this process";
        "remove the old key from the roster (docs/keys.md)";
    WRITABLE = Error "roster-writable":
        "whoever can write the roster can add a key, and then read and write KV";
        "chmod go-w the roster and its folder";
}

/// Checks the roster of a configuration with keys.
pub(super) fn look(subject: &Subject<'_>, results: &mut Results) {
    let Some(config) = subject.config else { return };
    let Some(identity) = &config.identity else {
        results.fact("keys", "auth: off");
        return;
    };
    let roster = identity.roster();
    let (auth, own) = (identity.auth(), identity.public());
    results.fact(
        "keys",
        format!(
            "auth: {}, {} keys in the roster, own key {own}",
            auth.as_str(),
            roster.len()
        ),
    );
    if auth == Auth::Prefer {
        results.add(&PREFER, "sidecar.auth is prefer");
    }
    for (role, needed_by) in needed(config) {
        if !roster.members().any(|(_, member)| member.has(&[role])) {
            let seen = format!(
                "the roster has no {}, and {needed_by} needs one",
                role.as_str()
            );
            results.add(&LACKS_ROLE, seen);
        }
    }
    for peer in subject.peers {
        let mut receivers = roster
            .members()
            .filter(|(_, member)| member.has(&[Role::Receiver]));
        if !receivers.any(|(_, member)| member.is_at(&peer.host)) {
            let seen = format!("no receiver of the roster may be at {}", peer.host);
            results.add(&LACKS_HOST, seen);
        }
    }
    let file = identity.roster_file();
    rotation(&roster, file, SystemTime::now(), results);
    writable(file, results);
}

/// Returns the roles that the peers of this sidecar have, and the reason why one is needed.
fn needed(config: &Config) -> Vec<(Role, &'static str)> {
    let mut roles = Vec::new();
    if config.sends() {
        roles.push((Role::Receiver, "a sender"));
    }
    if config.receives() {
        roles.push((Role::Sender, "a receiver"));
    }
    if config.proxy.is_some() {
        roles.push((Role::Proxy, "the registration"));
    }
    roles
}

/// Reports names that have had two keys for longer than a change of keys takes.
fn rotation(roster: &Roster, file: &Path, now: SystemTime, results: &mut Results) {
    let changed = std::fs::metadata(file).and_then(|file| file.modified());
    let Some(age) = changed
        .ok()
        .and_then(|changed| now.duration_since(changed).ok())
    else {
        return;
    };
    if age < ROTATION_TAKES {
        return;
    }
    let mut names: Vec<&str> = roster.members().map(|(_, member)| &*member.name).collect();
    names.sort_unstable();
    let twice = names.windows(2).filter(|pair| pair[0] == pair[1]);
    for pair in twice {
        let days = age.as_secs() / 86_400;
        let seen = format!(
            "{} has two keys, and the roster has not changed for {days} days",
            pair[0]
        );
        results.add(&ROTATION, seen);
    }
}

/// Reports a roster that other users may change or replace.
fn writable(file: &Path, results: &mut Results) {
    for path in [Some(file), file.parent()].into_iter().flatten() {
        let Ok(found) = std::fs::metadata(path) else {
            continue;
        };
        let mode = found.permissions().mode();
        // In a folder such as /tmp, the sticky bit keeps users from replacing the files of others.
        let sticky = found.is_dir() && mode & 0o1000 != 0;
        if mode & 0o022 != 0 && !sticky {
            let seen = format!("{} has mode {:04o}", path.display(), mode & 0o7777);
            results.add(&WRITABLE, seen);
        }
    }
}

/// A change of keys is finished after this time.
const ROTATION_TAKES: Duration = Duration::from_secs(86_400);
