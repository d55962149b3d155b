//! The lock that lets a new sidecar process prove that the process before it has ended.
//!
//! A receiver cannot see the end of a sender process on another host, and it must not free slots into which
//! that process may still write. The sender's successor, the next process at the same socket, can prove the
//! end. The proof is a lock on a file beside the socket: the kernel keeps the lock while any thread of the
//! process lives, and releases it together with the sockets and queues of the process, even after a crash.
//!
//! Each process writes a secret into the file and sends the secret's hash (*proof hash*) in its handshakes.
//! The process that gets the lock reads the secrets of all processes before it and sends them in its own
//! handshakes. So no process can prove the end of a process that still runs. A second sidecar of the same
//! name does not get the lock, so it can prove nothing.
//!
//! The process ignores the secrets in a file that was written on another host, or on this host before its
//! last boot. The file may be on a shared file system, which releases the locks of a host that it cannot
//! reach, although the processes on that host may still run.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::IntoRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use ring::digest::{SHA256, SHA256_OUTPUT_LEN, digest};
use rustix::fs::{FlockOperation, flock};
use serde_bytes::ByteBuf;
use tracing::warn;

use crate::engine::socket::make_directory;
use crate::net::host_id;

/// The hash of this process's secret, and the secrets of the processes before it.
#[derive(Clone, Debug, Default)]
pub(crate) struct ProcessLock {
    /// Hash of this process's secret; empty if the file could not be locked.
    pub(crate) proof_hash: ByteBuf,
    /// Secrets of processes that have ended, oldest first.
    pub(crate) proofs: Vec<ByteBuf>,
}

/// The SHA-256 hash of a secret.
pub(crate) type ProofHash = [u8; SHA256_OUTPUT_LEN];

/// Returns the hash of a secret that a successor has sent.
pub(crate) fn proof_hash_of(secret: &[u8]) -> ProofHash {
    let mut proof_hash = ProofHash::default();
    proof_hash.copy_from_slice(digest(&SHA256, secret).as_ref());
    proof_hash
}

impl ProcessLock {
    /// Locks the file beside a socket and writes a new secret into it. If the lock or the write fails, the
    /// result is empty and the log has a warning: no successor can prove the end of this process.
    pub(crate) fn beside(socket: &Path) -> Self {
        let path = file_of(socket);
        match Self::take(&path, &host_id::boot()) {
            Ok((process_lock, file)) => {
                // This process never closes the file, so it holds the lock until it ends. While this process
                // lives, its writes may be in flight.
                let _held = file.into_raw_fd();
                process_lock
            }
            Err(error) => {
                warn!(
                    path = %path.display(), %error,
                    "if this process dies, the next process cannot prove its end: receivers on other hosts then keep the \
                     slots of this sender in quarantine"
                );
                Self::default()
            }
        }
    }

    /// Locks the file and returns it with the secrets. The file stays locked until it is closed.
    fn take(path: &Path, boot: &str) -> io::Result<(Self, File)> {
        make_directory(path)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        let proofs = read(&file, boot)?;
        let secret: [u8; SECRET_BYTES] = rand::random();
        write(&file, boot, &proofs, &secret)?;
        let process_lock = Self {
            proof_hash: ByteBuf::from(proof_hash_of(&secret)),
            proofs: proofs.into_iter().map(ByteBuf::from).collect(),
        };
        Ok((process_lock, file))
    }
}

/// Returns the secrets of the latest processes of this boot, oldest first; empty if the file is of another
/// boot.
fn read(file: &File, boot: &str) -> io::Result<Vec<[u8; SECRET_BYTES]>> {
    let mut text = Vec::new();
    file.take(MAX_FILE_BYTES).read_to_end(&mut text)?;
    let Some(secrets) = text.strip_prefix(boot.as_bytes()) else {
        return Ok(Vec::new());
    };
    let (secrets, _) = secrets.as_chunks::<SECRET_BYTES>();
    let old = secrets.len().saturating_sub(MAX_PROOFS);
    Ok(secrets[old..].to_vec())
}

fn write(
    mut file: &File,
    boot: &str,
    proofs: &[[u8; SECRET_BYTES]],
    secret: &[u8; SECRET_BYTES],
) -> io::Result<()> {
    let mut text = boot.as_bytes().to_vec();
    text.extend(proofs.iter().flatten());
    text.extend(secret);
    file.set_len(0)?;
    file.rewind()?;
    file.write_all(&text)
}

/// Returns the path of the locked file beside a socket.
pub(super) fn file_of(socket: &Path) -> PathBuf {
    let mut name = socket.as_os_str().to_owned();
    name.push(SUFFIX);
    PathBuf::from(name)
}

/// The end of the name of a locked file.
pub(super) const SUFFIX: &str = ".lineage";
/// Length of a secret in bytes: the same as the length of the secret's hash.
const SECRET_BYTES: usize = SHA256_OUTPUT_LEN;
/// Largest number of earlier processes whose end this process proves. A receiver rarely misses this many
/// restarts.
pub(crate) const MAX_PROOFS: usize = 16;
/// Maximum number of bytes that are read from the file: far more than this program writes.
const MAX_FILE_BYTES: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    const BOOT: &str = "6c0a6a3e-boot";

    fn path() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = file_of(&folder.path().join("prefill.sock"));
        (folder, path)
    }

    fn proof_hashes(process_lock: &ProcessLock) -> Vec<ByteBuf> {
        let all = process_lock.proofs.iter();
        all.map(|secret| ByteBuf::from(proof_hash_of(secret)))
            .collect()
    }

    #[test]
    fn a_successor_shows_what_the_seals_of_the_dead_were_made_of() {
        let (_folder, path) = path();
        let (first, file) = ProcessLock::take(&path, BOOT).unwrap();
        assert_eq!((first.proof_hash.len(), first.proofs.len()), (32, 0));
        drop(file);
        let (second, file) = ProcessLock::take(&path, BOOT).unwrap();
        assert_eq!(
            proof_hashes(&second),
            std::slice::from_ref(&first.proof_hash)
        );
        drop(file);
        let (third, _file) = ProcessLock::take(&path, BOOT).unwrap();
        assert_eq!(proof_hashes(&third), [first.proof_hash, second.proof_hash]);
    }

    #[test]
    fn nobody_vouches_for_the_living() {
        let (_folder, path) = path();
        let (first, file) = ProcessLock::take(&path, BOOT).unwrap();
        assert!(ProcessLock::take(&path, BOOT).is_err());
        drop(file);
        let (later, _file) = ProcessLock::take(&path, BOOT).unwrap();
        assert_eq!(
            proof_hashes(&later),
            [first.proof_hash],
            "nothing of the refused one"
        );
    }

    #[test]
    fn another_boot_counts_for_nothing() {
        let (_folder, path) = path();
        drop(ProcessLock::take(&path, BOOT).unwrap());
        let (other, _file) = ProcessLock::take(&path, "another").unwrap();
        assert!(other.proofs.is_empty());
    }

    #[test]
    fn the_latest_are_kept() {
        let (_folder, path) = path();
        let mut before = Vec::new();
        for _ in 0..MAX_PROOFS + 5 {
            before.push(ProcessLock::take(&path, BOOT).unwrap().0.proof_hash);
        }
        let (last, _file) = ProcessLock::take(&path, BOOT).unwrap();
        assert_eq!(proof_hashes(&last), before[5..]);
    }

    #[test]
    fn a_file_that_is_no_file_of_ours_is_no_lineage() {
        let (folder, path) = path();
        std::fs::write(&path, vec![7; 100_000]).unwrap();
        let (process_lock, _file) = ProcessLock::take(&path, BOOT).unwrap();
        assert!(process_lock.proofs.is_empty());
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(ProcessLock::take(&link, BOOT).is_err());
    }
}
