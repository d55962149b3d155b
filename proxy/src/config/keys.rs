//! The key of this process, and the roster of the sidecars that may register.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use common::identity::{Auth, Identity, Role};
use common::manual::{Completions, Manual};

/// The rule for sidecars without a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum AuthMode {
    /// No sidecar proves a key.
    #[default]
    Off,
    /// Sidecars that know no keys may register, too. For migrations only.
    Prefer,
    /// Every sidecar must prove a key of the roster.
    Require,
}

/// Flags of the keys.
#[derive(Clone, Debug, Default, Args)]
pub struct Keys {
    /// Rule for the registration port. With `require` every sidecar must prove a key of the roster, and the port is
    /// encrypted.
    #[arg(long, env = "PD_PROXY_AUTH", default_value = "off")]
    pub auth: AuthMode,

    /// File with this process's private key, which `pd-proxy keygen FILE` makes. Only the file's owner may open
    /// it, and the proxy must run as the owner.
    #[arg(long, env = "PD_PROXY_KEY_FILE", value_name = "FILE")]
    pub key_file: Option<PathBuf>,

    /// File with the public keys of all sidecars and of this process: a YAML map from each key to name, roles and
    /// hosts. The proxy reads the file again when it changes, and at SIGHUP.
    #[arg(long, env = "PD_PROXY_ROSTER", value_name = "FILE")]
    pub roster: Option<PathBuf>,
}

/// The task that the command line names.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Makes the key of this process, and prints the public key for the rosters of its peers.
    Keygen {
        /// The new file, for --key-file. An existing file is never replaced.
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Prints a script that completes this command line in a shell.
    Completions(Completions),
    /// Writes the manual pages of this program into a folder.
    #[command(hide = true)]
    Manual(Manual),
}

impl Keys {
    /// Reads the key and the roster; `None` with `--auth off`.
    ///
    /// # Errors
    /// All problems of the flags and of the files.
    pub(crate) fn identity(&self) -> Result<Option<Identity>, Vec<String>> {
        let auth = match self.auth {
            AuthMode::Off => return Ok(None),
            AuthMode::Prefer => Auth::Prefer,
            AuthMode::Require => Auth::Require,
        };
        let (Some(key_file), Some(roster)) = (&self.key_file, &self.roster) else {
            let files = [("--key-file", &self.key_file), ("--roster", &self.roster)];
            let missing = files.into_iter().filter(|(_, file)| file.is_none());
            let text = |(flag, _)| format!("{flag} is missing: --auth {} needs it", auth.as_str());
            return Err(missing.map(text).collect());
        };
        let identity = Identity::load(auth, key_file, roster)
            .map_err(|mistakes| mistakes.iter().map(ToString::to_string).collect::<Vec<_>>())?;
        match identity.own() {
            Some(own) if own.roles.contains(&Role::Proxy) => Ok(Some(identity)),
            _ => Err(vec![format!(
                "--roster {}: sidecars refuse this process: add proxy to the roles of {}",
                roster.display(),
                identity.public()
            )]),
        }
    }
}
