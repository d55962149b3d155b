//! Removes the files of sidecars that engines started under a new id: no later process uses these files.
//!
//! Such a sidecar removes its own files when it ends after a drain. If it is killed, its files stay, and the next such
//! sidecar removes them. The kernel's lock shows whether the process lives. The engine of a dead sidecar starts the
//! sidecar again under the same name, and the new sidecar needs the file. So a file is removed only if no process has
//! locked or changed it for [`DEAD_FOR`].

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use super::process_lock::{SUFFIX, file_of};

/// Removes the locked file of this process, which ends now.
pub(crate) fn remove_own(socket: &Path) {
    if let Err(error) = std::fs::remove_file(file_of(socket)) {
        debug!(%error, "the lock file is not removed");
    }
}

/// Removes the files of dead sidecars beside `socket`, after [`DEAD_FOR`]. Ends early if `stop` is cancelled.
pub(crate) async fn remove_dead(socket: PathBuf, stop: CancellationToken) {
    let Some(folder) = socket.parent() else {
        return;
    };
    let before = dead(folder);
    if before.is_empty() {
        return;
    }
    tokio::select! {
        () = stop.cancelled() => return,
        () = tokio::time::sleep(DEAD_FOR) => {}
    }
    let removed = remove(folder, &before);
    info!(removed, folder = %folder.display(), "files of dead sidecars removed");
}

/// Removes the files that are dead now and have not changed since `before`. Returns the number of sidecars.
fn remove(folder: &Path, before: &BTreeMap<PathBuf, SystemTime>) -> usize {
    let now = dead(folder);
    let gone = now
        .iter()
        .filter(|(path, changed)| before.get(*path) == Some(changed));
    gone.filter(|(path, _)| {
        let socket = path.to_str().and_then(|path| path.strip_suffix(SUFFIX));
        if let Some(socket) = socket
            && UnixStream::connect(socket).is_err()
        {
            std::fs::remove_file(socket).ok();
            return std::fs::remove_file(path).is_ok();
        }
        false
    })
    .count()
}

/// Returns the lock files of dead sidecars with a name that an engine chose, and the time when each file was changed.
fn dead(folder: &Path) -> BTreeMap<PathBuf, SystemTime> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_str().is_some_and(is_of_engine))
        .filter_map(|entry| {
            let path = entry.path();
            let changed = entry.metadata().ok()?.modified().ok()?;
            let file = File::open(&path).ok()?;
            // The lock ends with `file`, at the end of this block.
            flock(&file, FlockOperation::NonBlockingLockExclusive).ok()?;
            Some((path, changed))
        })
        .collect()
}

/// Returns true for `ROLE-DIGEST.sock.lineage`: the connector's `own_sidecar.socket_of` makes these names.
fn is_of_engine(name: &str) -> bool {
    let stem = name
        .strip_suffix(SUFFIX)
        .and_then(|name| name.strip_suffix(".sock"));
    stem.and_then(|stem| stem.split_once('-'))
        .is_some_and(|(_, digest)| {
            digest.len() == DIGEST_CHARACTERS && digest.bytes().all(|b| b.is_ascii_hexdigit())
        })
}

/// The time for which a file must be dead. An engine starts a dead sidecar again within half a minute.
const DEAD_FOR: Duration = Duration::from_secs(120);
const DIGEST_CHARACTERS: usize = 12;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_living_processes_and_of_other_sidecars_stay() {
        let folder = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            let path = folder.path().join(name);
            (File::create(&path).unwrap(), path)
        };
        let (_, ended) = make("both-0123456789ab.sock.lineage");
        let (_, its_socket) = make("both-0123456789ab.sock");
        let (held, living) = make("both-aaaaaaaaaaaa.sock.lineage");
        flock(&held, FlockOperation::NonBlockingLockExclusive).unwrap();
        let (restarted, again) = make("both-bbbbbbbbbbbb.sock.lineage");
        let (_, named) = make("sender.sock.lineage");
        let (_, other) = make("both-notes.sock.lineage");
        let before = dead(folder.path());
        restarted.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(remove(folder.path(), &before), 1);
        assert!(!ended.exists() && !its_socket.exists());
        for stays in [living, again, named, other] {
            assert!(stays.exists(), "{}", stays.display());
        }
    }
}
