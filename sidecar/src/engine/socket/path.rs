//! The socket's file, and the check of the users that may connect to it.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;

use tokio::net::{UnixListener, UnixStream};

use super::ListenError;
use crate::net::private_folder::{self, Risk};

/// Binds the socket so that only this user may connect, and replaces the file of a dead process.
pub(super) fn bind(path: &Path) -> Result<UnixListener, ListenError> {
    let failed = |source| ListenError::Io {
        path: path.to_owned(),
        source,
    };
    make_directory(path).map_err(failed)?;
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => return Err(ListenError::InUse(path.to_owned())),
        // The kernel also refuses a connection to a file that is not a socket. This process must not remove
        // a file of another kind.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused && is_socket(path) => {
            std::fs::remove_file(path).map_err(failed)?;
        }
        Err(_) => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

/// Makes the socket's directory, for this user only, if it does not exist. Checks that no other user can
/// replace files in the directory.
///
/// # Errors
/// The directory cannot be made, or another user can write into it.
pub(crate) fn make_directory(path: &Path) -> io::Result<()> {
    match path.parent().filter(|d| !d.as_os_str().is_empty()) {
        Some(directory) => private_folder::make(directory, &RISK),
        None => Ok(()),
    }
}

/// Checks that no other user can replace files in a directory.
///
/// # Errors
/// The directory cannot be read, or another user can write into it.
pub(crate) fn check_directory(directory: &Path) -> io::Result<()> {
    private_folder::check(directory, &RISK)
}

const RISK: Risk = Risk {
    danger: "put a socket of their own there, and read and change KV",
    alternative: "name a socket in another folder: PD_SIDECAR_SOCKET for the engine and the sidecar",
};

fn is_socket(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket())
}

/// Checks that the process at the other end runs as this user or as root.
pub(super) fn authorised(stream: &UnixStream) -> Result<(), String> {
    let peer = stream.peer_cred().map_err(|error| {
        format!("the kernel does not name the user of the engine's process: {error}")
    })?;
    let own = rustix::process::geteuid().as_raw();
    if peer.uid() == own || peer.uid() == 0 {
        Ok(())
    } else {
        let pid = peer.pid().unwrap_or_default();
        Err(format!(
            "process {pid} runs as user {}, but this sidecar serves only user {own} and root",
            peer.uid()
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_a_dead_socket_is_replaced() {
        let folder = std::env::temp_dir().join(format!("pd-path-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let file = folder.join("notes.txt");
        std::fs::write(&file, "dear").unwrap();
        assert!(bind(&file).is_err());
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "dear");

        let path = folder.join("engine.sock");
        let first = bind(&path).unwrap();
        assert!(matches!(bind(&path), Err(ListenError::InUse(_))));
        drop(first);
        assert!(path.exists(), "as a killed process leaves it");
        drop(bind(&path).unwrap());
        std::fs::remove_dir_all(&folder).unwrap();
    }

    /// Tests a folder that belongs to another user, and a folder that other users can write into.
    #[test]
    fn a_folder_that_others_can_write_into_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("pd-sidecar-1000");
        let path = folder.join("sender.sock");
        make_directory(&path).unwrap();
        let mode = |mode| std::fs::set_permissions(&folder, Permissions::from_mode(mode)).unwrap();
        for (bits, fine) in [(0o700, true), (0o755, true), (0o777, false), (0o770, false)] {
            mode(bits);
            let found = make_directory(&path);
            assert_eq!(found.is_ok(), fine, "{bits:o}: {found:?}");
            if let Err(error) = found {
                let text = error.to_string();
                assert!(
                    text.starts_with(&format!("{} belongs to user", folder.display()))
                        && text.contains(&format!("has mode 0{bits:o}"))
                        && text.contains("PD_SIDECAR_SOCKET"),
                    "{text}"
                );
            }
        }
        mode(0o700);
        if rustix::process::geteuid().is_root() {
            let link = parent.path().join("link");
            std::os::unix::fs::symlink(&folder, &link).unwrap();
            make_directory(&link.join("sender.sock")).unwrap();
            std::os::unix::fs::lchown(&link, Some(12345), None).unwrap();
            let error = make_directory(&link.join("sender.sock")).unwrap_err();
            assert!(
                error.to_string().contains("belongs to user 12345"),
                "{error}"
            );
            std::os::unix::fs::lchown(&folder, Some(12345), None).unwrap();
            let error = make_directory(&path).unwrap_err();
            assert!(
                error.to_string().contains("belongs to user 12345"),
                "{error}"
            );
        }
    }
}
