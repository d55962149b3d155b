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
    /// The folders that contain its providers.
    folders: Vec<PathBuf>,
}

impl Verbs {
    /// Returns the libibverbs of the wheel that contains the NIXL library `nixl`; `None` if that library is not in a
    /// wheel, or if the wheel's libibverbs is only a link to the system's.
    pub(crate) fn of_wheel(nixl: &Path) -> Option<Self> {
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
        if file.parent() != folder.canonicalize().ok().as_deref() {
            return None;
        }
        Some(Self {
            library,
            folders: vec![folder],
        })
    }

    /// Returns the libibverbs that the dynamic linker finds below `root`, which is `/` or a test's own folder.
    /// `first` is the value of `LD_LIBRARY_PATH`.
    pub(crate) fn of_system(root: &Path, first: &str) -> Option<Self> {
        let first = first.split(':').filter(|folder| folder.starts_with('/'));
        let folders: Vec<_> = first
            .chain(SYSTEM.iter().copied())
            .map(|folder| root.join(folder.trim_start_matches('/')))
            .collect();
        let library = folders
            .iter()
            .map(|folder| folder.join(SONAME))
            .find(|library| library.exists())?;
        // Each distribution builds the name of its folder of providers into libibverbs. After this folder, libibverbs
        // asks the dynamic linker.
        let beside = library.parent()?.join("libibverbs");
        let folders = [beside].into_iter().chain(folders).collect();
        Some(Self { library, folders })
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

    #[test]
    fn the_wheel_has_its_own_library_and_providers() {
        let root = tempfile::tempdir().unwrap();
        touch(root.path(), WHEEL);
        let verbs = Verbs::of_wheel(&root.path().join(WHEEL[0])).unwrap();
        assert_eq!(verbs.library, root.path().join(WHEEL[1]));
        assert!(verbs.has("mlx5") && !verbs.has("mlx") && !verbs.has("rxe"));
        // NIXL's library was built on this host, or the linker finds it.
        assert_eq!(Verbs::of_wheel(Path::new("libnixl_capi.so")), None);
        assert_eq!(
            Verbs::of_wheel(&root.path().join("opt/lib/libnixl_capi.so")),
            None
        );
    }

    #[test]
    fn a_wheel_that_links_to_the_systems_library_has_none() {
        let root = tempfile::tempdir().unwrap();
        touch(
            root.path(),
            &[WHEEL[0], WHEEL[2], "usr/lib64/libibverbs.so.1"],
        );
        let link = root.path().join(WHEEL[1]);
        symlink(root.path().join("usr/lib64/libibverbs.so.1"), link).unwrap();
        assert_eq!(Verbs::of_wheel(&root.path().join(WHEEL[0])), None);
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
        let verbs = Verbs::of_system(root.path(), "relative:/vendor/lib").unwrap();
        assert!(verbs.has("rxe") && verbs.has("erdma"));
    }
}
