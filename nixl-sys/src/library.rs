//! NIXL's C library, loaded at run time.

use std::error::Error;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::Api;
use crate::search::{Place, Search};

/// NIXL's C library, loaded, with all functions that this project needs. The library is never the
/// stub library of NIXL's build.
pub struct Library {
    api: Api,
    path: PathBuf,
    version: Option<String>,
}

impl Library {
    /// Loads the library from the first usable place of `search`, once per process.
    ///
    /// Later calls return the library that is already loaded. The library stays loaded until the
    /// process ends, because its own threads may still run its code.
    ///
    /// # Errors
    /// The error lists each place that was tried, and why it failed. A later call tries again.
    pub fn load(search: &Search) -> Result<&'static Self, LoadError> {
        // This thread holds the lock during the load, so that two callers cannot load two copies.
        let mut loaded = match LOADED.lock() {
            Ok(loaded) => loaded,
            // A panic during the load leaves the option unchanged.
            Err(poisoned) => poisoned.into_inner(),
        };
        if let Some(library) = *loaded {
            return Ok(library);
        }
        let found = Self::first_of(search.places())?;
        let library: &'static Self = Box::leak(Box::new(found));
        *loaded = Some(library);
        Ok(library)
    }

    /// Returns the functions of the library.
    pub fn api(&self) -> &Api {
        &self.api
    }

    /// Returns the path of the file, or the bare name that the dynamic linker resolved.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the version of the wheel that contains the file; `None` if the file is not in a
    /// wheel. The C API itself has no version.
    pub fn version(&self) -> Option<&str> {
        self.version.as_deref()
    }

    fn first_of(places: Vec<Place>) -> Result<Self, LoadError> {
        let mut tried = Vec::new();
        for place in places {
            let candidate = match place {
                Place::Candidate(path) => path,
                Place::Empty { place, why } => {
                    tried.push(Tried { place, why });
                    continue;
                }
            };
            match Self::open(&candidate) {
                Ok(api) => {
                    return Ok(Self {
                        api,
                        version: wheel_version(&candidate),
                        path: candidate,
                    });
                }
                Err(why) => tried.push(Tried {
                    place: candidate.display().to_string(),
                    why,
                }),
            }
        }
        Err(LoadError { tried })
    }

    fn open(path: &Path) -> Result<Api, String> {
        // SAFETY: running the initializers of a library is as safe as that library.
        // The caller chose the path, or the path lies in the Python environment or the system of this
        // process.
        let library = unsafe { libloading::Library::new(path) }.map_err(|e| reason(&e))?;
        // SAFETY: the symbols have the types of nixl_capi.h. The types were compared with NIXL 1.5.1.
        // No type has changed since NIXL added the newest of these symbols.
        let api = unsafe { Api::from_library(library) }.map_err(|e| reason(&e))?;
        // SAFETY: the function takes no arguments and reads a constant.
        if unsafe { api.nixl_capi_is_stub() } {
            return Err("is NIXL's link-time stub, not the library".to_owned());
        }
        Ok(api)
    }
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Library")
            .field("path", &self.path)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

/// The error of [`Library::load`]: no place has a usable NIXL library.
#[derive(Clone, Debug)]
pub struct LoadError {
    /// The places, in the order in which they were tried.
    pub tried: Vec<Tried>,
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no usable NIXL library (pip install nixl, or set PD_NIXL_CAPI); tried")?;
        for Tried { place, why } in &self.tried {
            write!(f, "\n  {place}: {why}")?;
        }
        Ok(())
    }
}

impl Error for LoadError {}

/// A place without a usable library.
#[derive(Clone, Debug)]
pub struct Tried {
    /// Path, name of an environment variable, or name that the dynamic linker resolves.
    pub place: String,
    /// Reason why this place is not usable.
    pub why: String,
}

static LOADED: Mutex<Option<&'static Library>> = Mutex::new(None);

/// Returns the dynamic linker's own message, which `libloading` keeps in the source of its error.
fn reason(error: &libloading::Error) -> String {
    match error.source() {
        Some(source) => source.to_string(),
        None => error.to_string(),
    }
}

/// Returns the version of the wheel that contains `library`. The version is in the name of a
/// neighbouring folder: for a library in `.nixl_cu13.mesonpy.libs`, the folder
/// `nixl_cu13-1.5.1.dist-info` gives `1.5.1`.
fn wheel_version(library: &Path) -> Option<String> {
    let libs = library.parent()?;
    let wheel = libs
        .file_name()?
        .to_str()?
        .trim_start_matches('.')
        .split('.')
        .next()?;
    let prefix = format!("{wheel}-");
    libs.parent()?
        .read_dir()
        .ok()?
        .filter_map(Result::ok)
        .find_map(|entry| {
            let name = entry.file_name();
            let version = name
                .to_str()?
                .strip_prefix(&prefix)?
                .strip_suffix(".dist-info")?;
            Some(version.to_owned())
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tried(search: &Search) -> Vec<Tried> {
        Library::first_of(search.places()).unwrap_err().tried
    }

    #[test]
    fn an_explicit_path_is_the_only_place_tried() {
        let tried = tried(&Search {
            explicit: Some("/nowhere/libnixl_capi.so".into()),
            virtual_env: Some("/nowhere/venv".into()),
            ..Search::default()
        });
        assert_eq!(tried.len(), 1, "{tried:?}");
        assert_eq!(tried[0].place, "/nowhere/libnixl_capi.so");
        assert!(tried[0].why.contains("cannot open"), "{tried:?}");
    }

    #[test]
    fn a_library_without_the_symbols_is_refused_by_name() {
        // The test needs a shared object that exists on every glibc system and is not NIXL.
        let why = Library::open(Path::new("libm.so.6")).err().unwrap();
        assert!(why.contains("nixl_capi_"), "{why}");
    }

    #[test]
    fn a_file_that_is_no_library_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("libnixl_capi.so");
        std::fs::write(&path, "no ELF").unwrap();
        assert!(Library::open(&path).is_err());
    }

    #[test]
    fn the_version_is_that_of_the_wheel_beside_the_library() {
        let dir = tempfile::tempdir().unwrap();
        for made in [
            ".nixl_cu13.mesonpy.libs",
            "nixl-0.1.0.dist-info",
            "nixl_cu13-1.5.1.dist-info",
        ] {
            std::fs::create_dir(dir.path().join(made)).unwrap();
        }
        let library = dir.path().join(".nixl_cu13.mesonpy.libs/libnixl_capi.so");
        assert_eq!(wheel_version(&library).as_deref(), Some("1.5.1"));
        assert_eq!(wheel_version(Path::new("libnixl_capi.so")), None);
    }
}
