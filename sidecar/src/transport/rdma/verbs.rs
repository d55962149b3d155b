//! Finds the libibverbs that NIXL uses, and its provider libraries.
//!
//! NIXL's wheel contains a libibverbs of its own, with a provider for Mellanox cards. A provider of the system cannot
//! serve the wheel's libibverbs: the dynamic linker loads the system's libibverbs for the provider, and the provider
//! registers itself there.

use std::path::{Path, PathBuf};

use super::devices::names;

/// A libibverbs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Verbs {
    /// The library's file.
    pub(crate) library: PathBuf,
    /// The minor number of the interface: 14 for `libibverbs.so.1.14.44.0`; `None` if the file's name has no such
    /// number. A library can take the place of another library with the same or a lower number.
    pub(crate) minor: Option<u32>,
    /// The folders that contain its providers.
    folders: Vec<PathBuf>,
}

impl Verbs {
    /// Returns the libibverbs of the wheel that contains the NIXL library `nixl`; `None` if that library is not in a
    /// wheel, or if another library has taken the place of the wheel's libibverbs: the wheel has only a link to it, or
    /// a folder of `first`, which is the value of `LD_LIBRARY_PATH`, has a library of the same name.
    pub(crate) fn of_wheel(root: &Path, nixl: &Path, first: &str) -> Option<Self> {
        let folder = nixl.parent()?;
        let wheel = |name: &str| {
            name.trim_start_matches('.')
                .split('.')
                .next()
                .map(str::to_owned)
        };
        let own = wheel(folder.file_name()?.to_str()?)?;
        let packages = folder.parent()?;
        // The wheel's own libraries and the libraries that the wheel's builder added may lie in two folders, for
        // example `.nixl_cu13.mesonpy.libs` and `nixl_cu13.libs`.
        let folders = names(packages)
            .into_iter()
            .filter(|name| name.ends_with(".libs") && wheel(name).as_ref() == Some(&own))
            .map(|name| packages.join(name));
        let found = folders.filter_map(|folder| {
            let library = names(&folder)
                .into_iter()
                .find(|name| name.starts_with("libibverbs"))?;
            Some((folder.join(library), folder))
        });
        let (library, folder) = found.into_iter().next()?;
        let file = library.canonicalize().ok()?;
        let name = library.file_name()?;
        let is_replaced = searched_first(root, first).any(|folder| folder.join(name).exists());
        if is_replaced || file.parent() != folder.canonicalize().ok().as_deref() {
            return None;
        }
        Some(Self {
            minor: minor(&file),
            library,
            folders: vec![folder],
        })
    }

    /// Returns the libibverbs that the dynamic linker finds below `root`, which is `/` or a test's own folder.
    /// `first` is the value of `LD_LIBRARY_PATH`.
    pub(crate) fn of_system(root: &Path, first: &str) -> Option<Self> {
        let system = SYSTEM.iter().map(|folder| below(root, folder));
        let folders: Vec<_> = searched_first(root, first).chain(system).collect();
        let library = folders
            .iter()
            .map(|folder| folder.join(SONAME))
            .find(|library| library.exists())?;
        // Each distribution builds the name of its folder of providers into libibverbs. After this folder, libibverbs
        // asks the dynamic linker.
        let beside = library.parent()?.join("libibverbs");
        let folders = [beside].into_iter().chain(folders).collect();
        let minor = library.canonicalize().ok().and_then(|file| minor(&file));
        Some(Self {
            library,
            minor,
            folders,
        })
    }

    /// Returns true if a folder contains this provider.
    pub(crate) fn has(&self, provider: &str) -> bool {
        let starts = [format!("lib{provider}-"), format!("lib{provider}.so")];
        let is_provider = |name: &String| starts.iter().any(|start| name.starts_with(start));
        self.folders
            .iter()
            .any(|folder| names(folder).iter().any(is_provider))
    }
}

/// Returns the folders of `LD_LIBRARY_PATH`.
fn searched_first(root: &Path, path: &str) -> impl Iterator<Item = PathBuf> {
    path.split(':')
        .filter(|folder| folder.starts_with('/'))
        .map(|folder| below(root, folder))
}

fn below(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

/// Returns the minor number in the name of a library's file.
fn minor(file: &Path) -> Option<u32> {
    let (_, version) = file.file_name()?.to_str()?.split_once(".so.")?;
    version.split('.').nth(1)?.parse().ok()
}

/// The name under which programs load libibverbs.
const SONAME: &str = "libibverbs.so.1";

/// The folders of libraries of the distributions that NIXL's wheels run on, in the dynamic linker's order.
const SYSTEM: &[&str] = &[
    "/usr/local/lib",
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/lib/aarch64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/lib",
    "/usr/lib",
];

#[cfg(test)]
pub(super) mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    /// Makes empty files below `root`.
    pub(in super::super) fn touch(root: &Path, files: &[&str]) {
        for file in files {
            let path = root.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
    }

    pub(in super::super) const WHEEL: &[&str] = &[
        "venv/.nixl_cu13.mesonpy.libs/libnixl_capi.so",
        "venv/nixl_cu13.libs/libibverbs-1de1263b.so.1.14.48.0",
        "venv/nixl_cu13.libs/libmlx5-79ef1d27.so.1.24.48.0",
        "venv/other.libs/librxe-rdmav34.so",
    ];

    fn of_wheel(root: &Path, nixl: &str) -> Option<Verbs> {
        Verbs::of_wheel(root, &root.join(nixl), "")
    }

    #[test]
    fn the_wheel_has_its_own_library_and_providers() {
        let root = tempfile::tempdir().unwrap();
        touch(root.path(), WHEEL);
        let verbs = of_wheel(root.path(), WHEEL[0]).unwrap();
        assert_eq!(verbs.library, root.path().join(WHEEL[1]));
        assert!(verbs.has("mlx5") && !verbs.has("mlx") && !verbs.has("rxe"));
        assert_eq!(verbs.minor, Some(14));
        // NIXL's library was built on this host, or the linker finds it.
        assert_eq!(
            Verbs::of_wheel(root.path(), Path::new("libnixl_capi.so"), ""),
            None
        );
        assert_eq!(of_wheel(root.path(), "opt/lib/libnixl_capi.so"), None);
    }

    #[test]
    fn a_wheel_whose_library_is_replaced_has_none() {
        let root = tempfile::tempdir().unwrap();
        touch(
            root.path(),
            &[WHEEL[0], WHEEL[2], "usr/lib64/libibverbs.so.1"],
        );
        let link = root.path().join(WHEEL[1]);
        symlink(root.path().join("usr/lib64/libibverbs.so.1"), link).unwrap();
        assert_eq!(of_wheel(root.path(), WHEEL[0]), None);

        let root = tempfile::tempdir().unwrap();
        let name = "libibverbs-1de1263b.so.1.14.48.0";
        touch(root.path(), WHEEL);
        touch(root.path(), &[&format!("links/{name}"), "other/notes"]);
        let nixl = root.path().join(WHEEL[0]);
        let of_wheel = |first| Verbs::of_wheel(root.path(), &nixl, first);
        assert_eq!(of_wheel("/other:/links"), None);
        for first in ["", "/other", "links", "/none"] {
            assert!(of_wheel(first).is_some(), "{first}");
        }
    }

    #[test]
    fn the_system_has_its_providers_beside_the_library_or_in_the_linkers_path() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(Verbs::of_system(root.path(), ""), None);
        touch(
            root.path(),
            &[
                "usr/lib/x86_64-linux-gnu/libibverbs.so.1",
                "usr/lib/x86_64-linux-gnu/libibverbs/librxe-rdmav34.so",
                "vendor/lib/liberdma-rdmav34.so",
            ],
        );
        let verbs = Verbs::of_system(root.path(), "").unwrap();
        assert!(
            verbs
                .library
                .ends_with("usr/lib/x86_64-linux-gnu/libibverbs.so.1")
        );
        assert!(verbs.has("rxe") && !verbs.has("erdma"));
        assert_eq!(verbs.minor, None);
        let verbs = Verbs::of_system(root.path(), "relative:/vendor/lib").unwrap();
        assert!(verbs.has("rxe") && verbs.has("erdma"));
    }
}
