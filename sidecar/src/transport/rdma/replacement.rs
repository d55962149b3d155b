//! Puts the system's libibverbs in the place of the copy in NIXL's wheel.
//!
//! The libraries in the wheel ask the dynamic linker for their libibverbs by a name that no other library has, for
//! example `libibverbs-1de1263b.so.1.14.48.0`. The linker searches the folders of `LD_LIBRARY_PATH` before the wheel's
//! own. So a link of that name in such a folder is enough, and the process has one libibverbs.
//!
//! The alternative was the system's library in `LD_PRELOAD`. Then the process has two copies of libibverbs and of
//! libnl-route, which libibverbs needs. The wheel's libnl-route calls the functions of the system's libnl-route, which
//! comes first. At the start they refuse its entries, because each of them exists already; at the end they remove these
//! entries all the same, and the process ends with a segmentation fault in `rtnl_tc_unregister`.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::net::private_folder::{self, Risk};

/// The folders that the dynamic linker searches first.
pub(crate) const LIBRARY_PATH: &str = "LD_LIBRARY_PATH";

/// The link that puts the system's libibverbs in the place of the wheel's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Replacement {
    /// The name under which the wheel's libraries load libibverbs.
    pub(crate) name: OsString,
    /// The system's libibverbs.
    pub(crate) library: PathBuf,
}

impl Replacement {
    /// Makes the link in `folder` if it is not there, and returns its path. `folder` may have links of other wheels.
    ///
    /// # Errors
    /// The folder or the link cannot be made, or another user can write into the folder.
    pub(crate) fn make(&self, folder: &Path) -> io::Result<PathBuf> {
        // Another user who can write into the parent folder can put another folder in the place of this one.
        if let Some(parent) = folder.parent() {
            private_folder::make(parent, &RISK)?;
        }
        private_folder::make(folder, &RISK)?;
        let link = folder.join(&self.name);
        if fs::read_link(&link).is_ok_and(|target| target == self.library) {
            return Ok(link);
        }
        // Another sidecar may load its libraries through this folder now, so the link must never be absent.
        let new = folder.join(format!("new-{}", std::process::id()));
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        symlink(&self.library, &new)?;
        fs::rename(&new, &link)?;
        Ok(link)
    }
}

const RISK: Risk = Risk {
    danger: "put a library of their own there, which the sidecar would run",
    alternative: "name another folder in XDG_RUNTIME_DIR",
};

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_link_is_made_once_follows_the_library_and_lies_in_a_folder_of_this_user() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("pd-sidecar/libraries");
        let mut wanted = Replacement {
            name: "libibverbs-1de1263b.so.1.14.48.0".into(),
            library: "/usr/lib64/libibverbs.so.1".into(),
        };
        for library in [
            "/usr/lib64/libibverbs.so.1",
            "/usr/local/lib/libibverbs.so.1",
        ] {
            wanted.library = library.into();
            for _ in 0..2 {
                let link = wanted.make(&folder).unwrap();
                assert_eq!(link, folder.join(&wanted.name));
                assert_eq!(fs::read_link(&link).unwrap(), Path::new(library));
            }
        }
        assert_eq!(
            fs::read_dir(&folder).unwrap().count(),
            1,
            "nothing else stays"
        );
        let mode = |mode| fs::set_permissions(&folder, PermissionsExt::from_mode(mode)).unwrap();
        mode(0o777);
        let error = wanted.make(&folder).unwrap_err().to_string();
        assert!(error.contains("library of their own"), "{error}");
        mode(0o700);
        wanted.make(&folder).unwrap();
    }
}
