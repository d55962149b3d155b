//! The identity of this process and the list of all peers that it knows.
//!
//! A process has one Ed25519 key in a file. The roster lists the public keys of all processes, with a name, roles and
//! hosts. A connection proves its key in the TLS handshake; the name of this key in the roster is the connection's
//! *principal*. A name in a message proves nothing.
//!
//! The principal is the name and not the key, so that a process can change its key without losing its leases: while it
//! does so, the roster has both keys under one name.

mod file;
mod files;
mod fleet;
mod key;
mod roster;
mod tls;
mod told;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use tokio::sync::watch;
use tracing::{error, info};

use self::told::Told;

pub use self::file::{KeyFileError, PrivateKey, keygen, read_secret};
pub use self::files::Watch;
pub use self::fleet::{Newcomer, keygen_all};
pub use self::key::{NotAKey, PublicKey};
pub use self::roster::{Member, Role, Roster, RosterError};
pub use self::tls::{Channel, Expected, Refusal, alert, client, proved, refusal, server};

/// The rule for peers without a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Auth {
    /// No peer proves a key, and this process proves none.
    #[default]
    Off,
    /// A peer that can prove a key must prove it. A peer that knows no keys is served without one. For migrations only:
    /// an attacker on the path can make two peers believe that the other knows no keys.
    Prefer,
    /// Every peer must prove a key of the roster.
    Require,
}

impl Auth {
    /// Returns the mode's word in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Prefer => "prefer",
            Self::Require => "require",
        }
    }
}

/// A key or a roster with which a process cannot start. The text names the file and the cure.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The key file cannot be used.
    #[error(transparent)]
    Key(#[from] KeyFileError),
    /// The roster cannot be used.
    #[error(transparent)]
    Roster(#[from] RosterError),
    /// The roster does not list the process's own key. Every peer with the same roster would refuse the process.
    #[error(
        "{}: no entry for this process's own key; add {key}: {{name: NAME, roles: [ROLE]}}",
        .roster.display()
    )]
    NotListed {
        /// The roster.
        roster: PathBuf,
        /// The process's key.
        key: PublicKey,
    },
}

/// This process's key, and the roster. All clones share the same values.
#[derive(Clone)]
pub struct Identity {
    inner: Arc<Inner>,
}

struct Inner {
    auth: Auth,
    key_file: PathBuf,
    roster_file: PathBuf,
    key: RwLock<Arc<PrivateKey>>,
    /// The roster in use: the file's entries, and the peers that a proxy has named.
    roster: watch::Sender<Arc<Roster>>,
    sources: Mutex<Sources>,
    /// The state of both files when they were first read.
    files: Watch,
}

/// The parts of the roster in use.
struct Sources {
    file: Roster,
    told: Vec<Told>,
}

impl Identity {
    /// Reads the key and the roster. `auth` must not be [`Auth::Off`].
    ///
    /// # Errors
    /// All mistakes, each with the file and the cure.
    pub fn load(
        auth: Auth,
        key_file: &Path,
        roster_file: &Path,
    ) -> Result<Self, Vec<IdentityError>> {
        let files = Watch::new(vec![key_file.to_owned(), roster_file.to_owned()]);
        let (key, roster) = read(key_file, roster_file)?;
        Ok(Self {
            inner: Arc::new(Inner {
                auth,
                key_file: key_file.to_owned(),
                roster_file: roster_file.to_owned(),
                key: RwLock::new(Arc::new(key)),
                roster: watch::Sender::new(Arc::new(roster.clone())),
                sources: Mutex::new(Sources {
                    file: roster,
                    told: Vec::new(),
                }),
                files,
            }),
        })
    }

    /// Returns the rule for peers without a key.
    pub fn auth(&self) -> Auth {
        self.inner.auth
    }

    /// Returns the public key of this process.
    pub fn public(&self) -> PublicKey {
        self.private().public()
    }

    /// Returns the path of the roster.
    pub fn roster_file(&self) -> &Path {
        &self.inner.roster_file
    }

    /// Returns the roster as it is now.
    pub fn roster(&self) -> Arc<Roster> {
        Arc::clone(&self.inner.roster.borrow())
    }

    /// Returns a receiver that notices each change of the roster.
    pub fn changes(&self) -> watch::Receiver<Arc<Roster>> {
        self.inner.roster.subscribe()
    }

    /// Returns this process's own entry in the roster; `None` if the present roster has none.
    pub fn own(&self) -> Option<Member> {
        self.roster().member(&self.public()).cloned()
    }

    fn private(&self) -> Arc<PrivateKey> {
        let key = self.inner.key.read();
        Arc::clone(&key.unwrap_or_else(PoisonError::into_inner))
    }

    /// Reads both files again when a file changes, and at each SIGHUP. A file with mistakes is logged, and the former
    /// value stays in use: a slip in an editor must not disconnect a cluster. Runs until it is dropped.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn follow(self) {
        let files = self.inner.files.clone();
        files.run(|| self.reread()).await;
    }

    /// Reads both files again, once.
    pub fn reread(&self) {
        let (key, roster) = match read(&self.inner.key_file, &self.inner.roster_file) {
            Ok(read) => read,
            Err(mistakes) => {
                for mistake in mistakes {
                    error!("the former key and roster stay in use: {mistake}");
                }
                return;
            }
        };
        if key.public() != self.public() {
            info!(key = %key.public(), "this process has a new key");
        }
        // New connections use the new key. Open connections have already proved the former key.
        *self
            .inner
            .key
            .write()
            .unwrap_or_else(PoisonError::into_inner) = Arc::new(key);
        let mut sources = self.sources();
        sources.file = roster;
        // Peers that contradict the new file are not used.
        let with_told = sources.file.with(&sources.told);
        let roster = with_told.unwrap_or_else(|_| sources.file.clone());
        self.publish(roster);
    }

    /// Replaces the peers that a proxy has named. Returns their number, without those that the file names itself.
    fn set_told(&self, told: Vec<Told>) -> Result<usize, Vec<String>> {
        let mut sources = self.sources();
        let roster = sources.file.with(&told)?;
        sources.told = told;
        let used = roster.len() - sources.file.len();
        self.publish(roster);
        Ok(used)
    }

    fn sources(&self) -> MutexGuard<'_, Sources> {
        let sources = self.inner.sources.lock();
        sources.unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, roster: Roster) {
        let roster = Arc::new(roster);
        let changed = self.inner.roster.send_if_modified(|present| {
            let changed = *present != roster;
            *present = Arc::clone(&roster);
            changed
        });
        if changed {
            info!(keys = roster.len(), "the roster has changed");
        }
    }
}

/// Reads a key and a roster that lists the key.
fn read(key_file: &Path, roster_file: &Path) -> Result<(PrivateKey, Roster), Vec<IdentityError>> {
    let (key, roster) = match (PrivateKey::read(key_file), Roster::read(roster_file)) {
        (Ok(key), Ok(roster)) => (key, roster),
        (key, roster) => {
            let (key, roster) = (key.err().map(Into::into), roster.err().map(Into::into));
            return Err(key.into_iter().chain(roster).collect());
        }
    };
    if roster.member(&key.public()).is_none() {
        return Err(vec![IdentityError::NotListed {
            roster: roster_file.to_owned(),
            key: key.public(),
        }]);
    }
    Ok((key, roster))
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("auth", &self.inner.auth)
            .field("public", &self.public())
            .finish_non_exhaustive()
    }
}
