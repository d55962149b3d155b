//! The socket's file and who may use it.

use std::fs::{DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;

use tokio::net::{UnixListener, UnixStream};

use super::ListenError;

/// Binds the socket for this user alone, replacing what a dead process left.
pub(super) fn bind(path: &Path) -> Result<UnixListener, ListenError> {
    let failed = |source| ListenError::Io {
        path: path.to_owned(),
        source,
    };
    if let Some(directory) = path.parent()
        && !directory.as_os_str().is_empty()
    {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(failed)?;
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => return Err(ListenError::InUse(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed)?;
        }
        Err(_) => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

/// Whether the process at the other end may use this socket.
pub(super) fn authorised(stream: &UnixStream) -> Result<(), String> {
    let peer = stream
        .peer_cred()
        .map_err(|error| format!("the kernel does not say who it is: {error}"))?;
    let own = rustix::process::geteuid().as_raw();
    if peer.uid() == own || peer.uid() == 0 {
        Ok(())
    } else {
        let pid = peer.pid().unwrap_or_default();
        Err(format!(
            "process {pid} runs as user {}, this sidecar serves user {own}",
            peer.uid()
        ))
    }
}
