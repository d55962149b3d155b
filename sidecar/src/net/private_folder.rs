//! Folders in which no other user can replace files.

use std::fs::{DirBuilder, Metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;

/// Makes a folder, for this user only, if it does not exist, and checks it.
///
/// # Errors
/// The folder cannot be made, or another user can write into it.
pub(crate) fn make(folder: &Path, risk: &Risk) -> io::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)?;
    check(folder, risk)
}

/// Checks that no other user can replace files in a folder.
///
/// # Errors
/// The folder cannot be read, or another user can write into it.
pub(crate) fn check(folder: &Path, risk: &Risk) -> io::Result<()> {
    let mut found = std::fs::symlink_metadata(folder)?;
    if found.is_symlink() {
        check_owner(folder, &found, risk)?;
        found = std::fs::metadata(folder)?;
    }
    check_owner(folder, &found, risk)?;
    // The sticky bit of root's /tmp keeps users from replacing the files of others.
    let sticky = found.mode() & 0o1000 != 0 && found.uid() == 0;
    if found.mode() & 0o022 != 0 && !sticky {
        return Err(not_ours(folder, &found, risk));
    }
    Ok(())
}

/// The words of the error about a folder that is not this user's own.
#[derive(Debug)]
pub(crate) struct Risk {
    /// The deed that the check prevents, after "another user could".
    pub(crate) danger: &'static str,
    /// The alternative to the folder, after "or".
    pub(crate) alternative: &'static str,
}

/// Returns the default folder of this user's sockets. `runtime` is the value of `XDG_RUNTIME_DIR`.
pub(crate) fn of_user(runtime: Option<&str>, uid: u32) -> String {
    match runtime {
        Some(directory) if !directory.is_empty() => {
            format!("{}/pd-sidecar", directory.trim_end_matches('/'))
        }
        // Another user of the host can make a folder with this name first, so the folder must be checked.
        _ => format!("/tmp/pd-sidecar-{uid}"),
    }
}

fn check_owner(folder: &Path, found: &Metadata, risk: &Risk) -> io::Result<()> {
    if found.uid() == 0 || found.uid() == rustix::process::geteuid().as_raw() {
        Ok(())
    } else {
        Err(not_ours(folder, found, risk))
    }
}

fn not_ours(folder: &Path, found: &Metadata, risk: &Risk) -> io::Error {
    let own = rustix::process::geteuid().as_raw();
    let Risk {
        danger,
        alternative,
    } = risk;
    let text = format!(
        "{} belongs to user {} and has mode {:04o}: another user could {danger}. Make it user {own}'s own (chown, chmod \
         0700), or {alternative}",
        folder.display(),
        found.uid(),
        found.mode() & 0o7777,
    );
    io::Error::new(io::ErrorKind::PermissionDenied, text)
}
