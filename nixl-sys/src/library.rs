//! The loaded library.

use std::error::Error;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::Api;
use crate::search::{Place, Search};

/// NIXL's C API, loaded, complete and real.
pub struct Library {
    api: Api,
    path: PathBuf,
    version: Option<String>,
}

impl Library {
    /// The library, loaded by the first successful call of this process, found as `search` says.
    ///
    /// It stays loaded until the process ends: it holds threads and static state that unloading
    /// would pull the code away from.
    ///
    /// # Errors
    /// Every place tried, each with why it did not do. A later call tries again.
    pub fn load(search: &Search) -> Result<&'static Self, LoadError> {
        // Held while loading, so that two callers cannot load two copies of the library.
        let mut loaded = match LOADED.lock() {
            Ok(loaded) => loaded,
            // A panic in here leaves the option as it was.
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

    /// The functions.
    pub fn api(&self) -> &Api {
        &self.api
    }

    /// The file, or the bare name that the dynamic linker resolved.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The version of the wheel that the file belongs to. The C API itself does not tell one.
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
        // SAFETY: running the initializers of a library is as safe as that library; the caller chose
        // the path, or it lies in the Python or system that the process runs under.
        let library = unsafe { libloading::Library::new(path) }.map_err(|e| reason(&e))?;
        // SAFETY: the symbols have the types of nixl_capi.h, which were checked against NIXL 1.5.1
        // and are the same since the youngest of them was added.
        let api = unsafe { Api::from_library(library) }.map_err(|e| reason(&e))?;
        // SAFETY: takes nothing and reads a constant.
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

/// No usable NIXL library.
#[derive(Clone, Debug)]
pub struct LoadError {
    /// Places in the order in which they were tried.
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
    /// A path, a variable, or a name.
    pub place: String,
    /// Why it did not do.
    pub why: String,
}

static LOADED: Mutex<Option<&'static Library>> = Mutex::new(None);

/// `libloading` hides what the dynamic linker said in the source.
fn reason(error: &libloading::Error) -> String {
    match error.source() {
        Some(source) => source.to_string(),
        None => error.to_string(),
    }
}

/// Finds `1.5.1` in `site-packages/nixl_cu13-1.5.1.dist-info` for a library in
/// `site-packages/.nixl_cu13.mesonpy.libs`.
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
        // Any shared object will do that is on every glibc system.
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
