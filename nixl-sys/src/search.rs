//! The places where NIXL's C library may be installed.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The places where [`crate::Library::load`] looks, in order.
///
/// If [`Search::explicit`] is set, only that path is tried: a silent fallback to another library would hide that the
/// requested library is missing. Otherwise the wheels in the Python environments are tried, in the order of the fields,
/// and then the name `libnixl_capi.so` in the dynamic linker's path.
#[derive(Clone, Debug, Default)]
pub struct Search {
    /// The path of the library file (`PD_NIXL_CAPI`).
    pub explicit: Option<PathBuf>,
    /// The active virtual environment (`VIRTUAL_ENV`).
    pub virtual_env: Option<PathBuf>,
    /// The Python environment in which this program is installed. The user may start the program without
    /// activating that environment.
    pub own_prefix: Option<PathBuf>,
    /// The active conda environment (`CONDA_PREFIX`).
    pub conda_prefix: Option<PathBuf>,
    /// The directories of executables (`PATH`). Only the first directory that contains a `python3`
    /// is used.
    pub path: Option<OsString>,
}

impl Search {
    /// Reads the places from the environment variables.
    pub fn from_env() -> Self {
        let path = |name| {
            env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        Self {
            explicit: path("PD_NIXL_CAPI"),
            virtual_env: path("VIRTUAL_ENV"),
            own_prefix: own_prefix(),
            conda_prefix: path("CONDA_PREFIX"),
            path: env::var_os("PATH"),
        }
    }

    /// Returns the library that [`crate::Library::load`] tries first; `None` if only the dynamic linker's path is left.
    pub fn first(&self) -> Option<PathBuf> {
        self.places().into_iter().find_map(|place| match place {
            Place::Candidate(path) if path != Path::new(LIBRARY) => Some(path),
            _ => None,
        })
    }

    /// Returns all places in order: a library to try, or the reason why a place has no library.
    pub(crate) fn places(&self) -> Vec<Place> {
        if let Some(path) = &self.explicit {
            return vec![Place::Candidate(path.clone())];
        }
        let mut places = Vec::new();
        for (name, prefix) in [
            ("VIRTUAL_ENV", &self.virtual_env),
            (OWN, &self.own_prefix),
            ("CONDA_PREFIX", &self.conda_prefix),
        ] {
            match prefix {
                Some(prefix) => places.extend(in_prefix(name, prefix)),
                None if name == OWN => {}
                None => places.push(Place::empty(name, "not set")),
            }
        }
        match self.python_prefix() {
            Some(prefix) => places.extend(in_prefix("python3 on PATH", &prefix)),
            None => places.push(Place::empty("python3 on PATH", "not found")),
        }
        places.push(Place::Candidate(LIBRARY.into()));
        places
    }

    /// Returns the prefix of the first `python3` on `PATH`. Does not follow symbolic links, because
    /// `bin/python3` of a virtual environment is a link to a file outside that environment.
    fn python_prefix(&self) -> Option<PathBuf> {
        let bin = env::split_paths(self.path.as_ref()?).find(|dir| dir.join("python3").exists())?;
        bin.parent().map(Path::to_path_buf)
    }
}

/// Returns the prefix in which this program is installed: `/venv` for `/venv/bin/sidecar`.
fn own_prefix() -> Option<PathBuf> {
    let bin = env::current_exe().ok()?.parent()?.to_path_buf();
    let prefix = bin.parent()?;
    (bin.file_name()? == "bin").then(|| prefix.to_path_buf())
}

/// A library to try, or the reason why a place has no library.
#[derive(Debug)]
pub(crate) enum Place {
    Candidate(PathBuf),
    Empty { place: String, why: String },
}

impl Place {
    fn empty(place: &str, why: &str) -> Self {
        Self::Empty {
            place: place.to_owned(),
            why: why.to_owned(),
        }
    }
}

/// Returns the libraries in the wheels of a Python prefix, newest CUDA first.
fn in_prefix(name: &str, prefix: &Path) -> Vec<Place> {
    let mut found = Vec::new();
    for lib in ["lib", "lib64", "local/lib"] {
        for python in entries(&prefix.join(lib), |entry| entry.starts_with("python3")) {
            for packages in ["site-packages", "dist-packages"] {
                // In current wheels the folder is `.nixl_cu13.mesonpy.libs`, in other wheels
                // `nixl_cu12.libs`.
                let wheels = entries(&python.join(packages), |entry| {
                    entry.trim_start_matches('.').starts_with("nixl") && entry.ends_with(".libs")
                });
                for wheel in wheels.iter().rev() {
                    found.extend(entries(wheel, |entry| {
                        entry.starts_with("libnixl_capi") && entry.contains(".so")
                    }));
                }
            }
        }
    }
    if found.is_empty() {
        let place = format!("{name} ({})", prefix.display());
        return vec![Place::empty(
            &place,
            "no nixl wheel in its lib/python3*/site-packages",
        )];
    }
    found.into_iter().map(Place::Candidate).collect()
}

/// Returns the sorted paths of the directory's entries with names that `passes` accepts. Returns no path if
/// the directory cannot be read.
fn entries(dir: &Path, passes: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let Ok(listing) = dir.read_dir() else {
        return Vec::new();
    };
    let mut paths: Vec<PathBuf> = listing
        .filter_map(Result::ok)
        .filter(|entry| entry.file_name().to_str().is_some_and(&passes))
        .map(|entry| entry.path())
        .collect();
    paths.sort();
    paths
}

const LIBRARY: &str = "libnixl_capi.so";
const OWN: &str = "the environment of this program";

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn candidates(search: &Search) -> Vec<PathBuf> {
        search
            .places()
            .into_iter()
            .filter_map(|place| match place {
                Place::Candidate(path) => Some(path),
                Place::Empty { .. } => None,
            })
            .collect()
    }

    #[test]
    fn wheels_are_found_in_order_and_the_system_comes_last() {
        let dir = tempfile::tempdir().unwrap();
        let packages = dir.path().join("venv/lib/python3.12/site-packages");
        for wheel in [".nixl_cu12.mesonpy.libs", ".nixl_cu13.mesonpy.libs"] {
            fs::create_dir_all(packages.join(wheel)).unwrap();
            fs::write(packages.join(wheel).join("libnixl_capi.so"), "").unwrap();
        }
        let other = dir
            .path()
            .join("usr/local/lib/python3.11/dist-packages/nixl_cu12.libs");
        fs::create_dir_all(&other).unwrap();
        fs::write(other.join("libnixl_capi-0a1b2c.so"), "").unwrap();
        fs::create_dir_all(dir.path().join("usr/bin")).unwrap();
        fs::write(dir.path().join("usr/bin/python3"), "").unwrap();

        let own = dir
            .path()
            .join("own/lib/python3.13/site-packages/.nixl_cu13.mesonpy.libs");
        fs::create_dir_all(&own).unwrap();
        fs::write(own.join("libnixl_capi.so"), "").unwrap();

        let search = Search {
            virtual_env: Some(dir.path().join("venv")),
            own_prefix: Some(dir.path().join("own")),
            path: Some(dir.path().join("usr/bin").into_os_string()),
            ..Search::default()
        };
        assert_eq!(
            candidates(&search),
            [
                packages.join(".nixl_cu13.mesonpy.libs/libnixl_capi.so"),
                packages.join(".nixl_cu12.mesonpy.libs/libnixl_capi.so"),
                own.join("libnixl_capi.so"),
                other.join("libnixl_capi-0a1b2c.so"),
                PathBuf::from(LIBRARY),
            ]
        );
        assert_eq!(
            search.first(),
            Some(packages.join(".nixl_cu13.mesonpy.libs/libnixl_capi.so"))
        );
        assert_eq!(Search::default().first(), None);
    }

    #[test]
    fn every_place_without_a_library_is_named() {
        let search = Search {
            virtual_env: Some("/nowhere/venv".into()),
            ..Search::default()
        };
        let places = format!("{:?}", search.places());
        for word in ["/nowhere/venv", "CONDA_PREFIX", "python3 on PATH", LIBRARY] {
            assert!(places.contains(word), "{word} is not in {places}");
        }
    }
}
