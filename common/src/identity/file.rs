//! The file with a process's private key.
//!
//! Another user who reads the file can act as this process, and a user who can replace the file can make the process use
//! a key that the user knows. So the file must belong to this process's user or to root, and nobody else may open it.
//!
//! Kubernetes mounts a secret as a symbolic link to a file of root that a group of the process may read. So links are
//! followed, and all checks use the opened file: a link cannot be changed between check and read. Whoever can replace
//! the link can only choose among the files that pass these checks.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::rand::SystemRandom;
use ring::signature::{Ed25519KeyPair, KeyPair};
use rustix::fs::{FileType, Mode, OFlags};
use tokio_rustls::rustls::crypto::ring::sign::any_eddsa_type;
use tokio_rustls::rustls::pki_types::PrivatePkcs8KeyDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::sign::SigningKey;

use super::PublicKey;

/// A private key with its public key.
#[derive(Clone, Debug)]
pub struct PrivateKey {
    pub(super) signing: Arc<dyn SigningKey>,
    public: PublicKey,
}

/// A key file that cannot be made or read. The text names the file and the cure.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {what}", .path.display())]
pub struct KeyFileError {
    path: PathBuf,
    what: String,
    is_missing: bool,
}

impl KeyFileError {
    fn new(path: &Path, what: String) -> Self {
        Self {
            path: path.to_owned(),
            what,
            is_missing: false,
        }
    }
}

/// Makes a key, writes it to a new file with mode 0600, and returns the public key.
///
/// # Errors
/// The file exists already, or cannot be written.
pub fn keygen(path: &Path) -> Result<PublicKey, KeyFileError> {
    let error = |what: String| KeyFileError::new(path, what);
    let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new())
        .map_err(|_| error("the system gives no random numbers".to_owned()))?;
    let pair = Ed25519KeyPair::from_pkcs8(pkcs8.as_ref())
        .map_err(|e| error(format!("the new key is rejected: {e}")))?;
    let public = public(&pair);
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    // With EXCL the system follows no link and opens no file that another user has prepared.
    let file = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR);
    let mut file = File::from(file.map_err(|e| match std::io::Error::from(e).kind() {
        ErrorKind::AlreadyExists => error(
            "the file exists; keygen replaces no key, because peers would refuse the new key until their rosters \
             have it: choose another path"
                .to_owned(),
        ),
        _ => error(format!("cannot make the file: {e}")),
    })?);
    let written = file
        .write_all(pem(pkcs8.as_ref()).as_bytes())
        .and_then(|()| file.sync_all());
    written.map_err(|e| {
        // A file with half a key would only make the next keygen fail.
        std::fs::remove_file(path).ok();
        error(format!("cannot write the key: {e}"))
    })?;
    Ok(public)
}

impl PrivateKey {
    /// Reads a key from its file.
    ///
    /// # Errors
    /// The file cannot be opened, another user can read or write it, or it has no Ed25519 key.
    pub fn read(path: &Path) -> Result<Self, KeyFileError> {
        let text = read_secret(path, MAX_BYTES).map_err(|mut error| {
            if error.is_missing {
                error.what = format!("no such file: make a key with `keygen {}`", path.display());
            }
            error
        })?;
        let wrong = || {
            let what = "not a private Ed25519 key (PKCS#8, PEM): make one with `keygen`";
            KeyFileError::new(path, what.to_owned())
        };
        let der = PrivatePkcs8KeyDer::from_pem_slice(&text).map_err(|_| wrong())?;
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der.secret_pkcs8_der())
            .map_err(|_| wrong())?;
        Ok(Self {
            signing: any_eddsa_type(&der).map_err(|_| wrong())?,
            public: public(&pair),
        })
    }

    /// Returns the public key.
    pub fn public(&self) -> PublicKey {
        self.public
    }
}

/// Reads a file with a secret, at most `max` bytes of it.
///
/// # Errors
/// The file cannot be opened, or another user can read or write it.
pub fn read_secret(path: &Path, max: u64) -> Result<Vec<u8>, KeyFileError> {
    let error = |what: String| KeyFileError::new(path, what);
    // Without NONBLOCK, opening a FIFO would wait for ever.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| match e {
        rustix::io::Errno::NOENT => KeyFileError {
            is_missing: true,
            ..error("no such file".to_owned())
        },
        rustix::io::Errno::ACCESS => error(
            "this process may not read it: chown the file to the process's user, or give it a group of the process (in \
             Kubernetes: securityContext.fsGroup)"
                .to_owned(),
        ),
        e => error(format!("cannot open the key file: {e}")),
    })?;
    let stat = rustix::fs::fstat(&file).map_err(|e| error(format!("cannot stat: {e}")))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(error("not a regular file: name a key file".to_owned()));
    }
    safe(&stat).map_err(error)?;
    let mut text = Vec::new();
    File::from(file)
        .take(max)
        .read_to_end(&mut text)
        .map_err(|e| error(format!("cannot read the key: {e}")))?;
    Ok(text)
}

/// Returns the reason why another user may read or write the file, with the cure.
fn safe(stat: &rustix::fs::Stat) -> Result<(), String> {
    let me = rustix::process::geteuid().as_raw();
    let (owner, mode) = (stat.st_uid, stat.st_mode & 0o7777);
    if owner != me && owner != ROOT {
        return Err(format!(
            "it belongs to uid {owner}, but this process runs as uid {me}: chown the file"
        ));
    }
    if mode & 0o037 != 0 {
        return Err(format!(
            "other users may open it (mode {mode:04o}): chmod 600 the file"
        ));
    }
    // Only root can give a file to a group for a purpose. The group of a user's own file is often a group of all users.
    if mode & 0o040 != 0 && !(owner == ROOT && is_own_group(stat.st_gid)) {
        return Err(format!(
            "its group {} may read it (mode {mode:04o}): chmod 600 the file, or let it belong to root and to a group of \
             this process",
            stat.st_gid
        ));
    }
    Ok(())
}

fn is_own_group(group: u32) -> bool {
    rustix::process::getegid().as_raw() == group
        || rustix::process::getgroups().is_ok_and(|all| all.iter().any(|one| one.as_raw() == group))
}

fn public(pair: &Ed25519KeyPair) -> PublicKey {
    let bytes = pair.public_key().as_ref();
    PublicKey::new(bytes.try_into().expect("an Ed25519 key has 32 bytes"))
}

fn pem(der: &[u8]) -> String {
    format!(
        "-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n",
        STANDARD.encode(der)
    )
}

/// Root can read every file in any case.
const ROOT: u32 = 0;
/// Longest key file, in bytes. A key has about 200 bytes.
const MAX_BYTES: u64 = 4096;
