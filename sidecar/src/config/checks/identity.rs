//! Checks the key of this process and the roster.

use std::path::Path;

use common::identity::{Auth, Identity, IdentityError, Role as Part};

use super::value;
use crate::config::keys::Sidecar;
use crate::config::layers::{Layers, Source};
use crate::config::value::Role;
use crate::transport::protection::Protection;

/// Returns the key and the roster; `None` with `auth: off`, or if there is a mistake.
pub(super) fn identity(layers: &mut Layers, sidecar: &Sidecar, role: Role) -> Option<Identity> {
    let auth = value(&sidecar.auth)?;
    let files = [("key_file", &sidecar.key_file), ("roster", &sidecar.roster)];
    if auth == Auth::Off {
        for (key, given) in files {
            if given.is_some() {
                layers.warnings.push(format!(
                    "sidecar.{key} has no effect while sidecar.auth is off; set sidecar.auth to require"
                ));
            }
        }
        if let Some(given) = sidecar
            .peers_from_proxy
            .as_ref()
            .filter(|given| given.value)
        {
            layers.wrong(
                "sidecar.peers_from_proxy",
                given,
                "without keys anybody could name peers, and sidecar.auth is off",
                "set sidecar.auth to require, with sidecar.key_file and sidecar.roster",
            );
        }
        return None;
    }
    let why = format!("because sidecar.auth is {}", auth.as_str());
    for (key, given) in files {
        if given.is_none() {
            layers.missing(super::key(Sidecar::KEYS, key), &why);
        }
    }
    let (key_file, roster) = (sidecar.key_file.as_ref()?, sidecar.roster.as_ref()?);
    let loaded = Identity::load(auth, Path::new(&key_file.value), Path::new(&roster.value));
    let identity = match loaded {
        Ok(identity) => identity,
        Err(mistakes) => {
            for mistake in mistakes {
                let (key, given) = match mistake {
                    IdentityError::Key(_) => ("sidecar.key_file", key_file),
                    _ => ("sidecar.roster", roster),
                };
                layers.wrong(key, given, mistake.to_string(), "");
            }
            return None;
        }
    };
    // Peers refuse this process on the channels of a role that its entry lacks.
    let needed = match role {
        Role::Sender => &[Part::Sender][..],
        Role::Receiver => &[Part::Receiver],
        Role::Both => &[Part::Sender, Part::Receiver],
    };
    let own = identity.own()?;
    for part in needed.iter().filter(|part| !own.roles.contains(part)) {
        layers.wrong(
            "sidecar.roster",
            roster,
            format!(
                "{} is no {}, but pd_role is {role}",
                own.name,
                part.as_str()
            ),
            format!(
                "add {} to the roles of {}",
                part.as_str(),
                identity.public()
            ),
        );
    }
    Some(identity)
}

/// Returns the name that the roster gives to this process. Peers know this name, so `sidecar.id` may be no other. If several
/// processes use the key, `sidecar.id` tells them apart.
pub(super) fn is_own_name(layers: &mut Layers, sidecar: &Sidecar, identity: &Identity) -> String {
    let Some(own) = identity.own() else {
        return String::new();
    };
    let name = own.name.to_string();
    match &sidecar.id {
        Some(given) if own.is_called(&given.value) => return given.value.clone(),
        Some(given) if own.replicas => layers.wrong(
            "sidecar.id",
            given,
            format!("in the roster the replicas of {name} have the key of this process"),
            format!("write {name}- and a text of your own, for example the name of the pod"),
        ),
        Some(given) => layers.wrong(
            "sidecar.id",
            given,
            format!("the roster calls this process {name}"),
            "remove sidecar.id, or write the same name in both",
        ),
        None => {
            // Two processes with the same id would look like one process that has restarted.
            if own.replicas {
                layers.missing(
                    super::key(Sidecar::KEYS, "id"),
                    &format!("because {name} has replicas in the roster"),
                );
            }
            let source = Source::Key("sidecar.roster".to_owned());
            layers.computed("sidecar.id", name.clone(), &source);
        }
    }
    name
}

/// Returns the protection of the data of peers that prove keys.
pub(super) fn data(layers: &mut Layers, sidecar: &Sidecar) -> Protection {
    let auth = value(&sidecar.auth).unwrap_or_default();
    match &sidecar.data {
        Some(given) => {
            if auth == Auth::Off && given.value != Protection::Plain {
                layers.wrong(
                    "sidecar.data",
                    given,
                    "without keys nothing can be protected, and sidecar.auth is off",
                    "set sidecar.auth to require, with sidecar.key_file and sidecar.roster",
                );
            }
            given.value
        }
        None => {
            let data = match auth {
                Auth::Off => Protection::Plain,
                Auth::Prefer | Auth::Require => Protection::Sealed,
            };
            let source = Source::Key("sidecar.auth".to_owned());
            layers.computed("sidecar.data", data.as_str().to_owned(), &source);
            data
        }
    }
}
