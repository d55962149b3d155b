//! The socket for the engine, and its folder.

use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::fs::Access;

use super::finding::{Results, kinds};
use super::subject::Subject;
use super::together;
use crate::engine::socket;

kinds! {
    FOLDER = Error "socket-folder":
        "the sidecar makes its socket in this folder, and refuses a folder into which other users can put a socket of \
         their own";
        "name a path in a folder of this user with sidecar.socket, or PD_SIDECAR_SOCKET for the engine and the sidecar";
    SERVED = Error "socket-served":
        "the engine would connect to the other process, and this sidecar does not start";
        "end the other process, or give this sidecar another sidecar.socket";
}

/// Checks that this process can make the socket.
pub(super) fn look(subject: &Subject<'_>, results: &mut Results) {
    let Some(config) = subject.config else { return };
    let path = &config.socket;
    results.fact("socket", path.display().to_string());
    if let Err(problem) = folder(path) {
        results.add(&FOLDER, problem);
    } else if !subject.is_running && UnixStream::connect(path).is_ok() {
        let seen = format!("a process listens at {}", path.display());
        results.add(&SERVED, seen);
    }
    if let Some(proxy) = &config.proxy {
        together::users(&proxy.engine_url, results);
    }
}

/// Checks the socket's folder, or the nearest folder above that exists.
fn folder(path: &Path) -> Result<(), String> {
    let Some(folder) = path.parent() else {
        return Ok(());
    };
    let exists = folder.ancestors().find(|folder| folder.exists());
    let Some(nearest) = exists else { return Ok(()) };
    if nearest == folder {
        socket::check_directory(folder).map_err(|error| error.to_string())?;
    }
    rustix::fs::access(nearest, Access::WRITE_OK | Access::EXEC_OK)
        .map_err(|error| format!("this user cannot write into {}: {error}", nearest.display()))
}
