//! Keys of HTTP clients and of engines that stand in files, so that they can change while the proxy runs.
//!
//! A file has one key per line. Empty lines, and lines that begin with `#`, have no meaning.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use clap::Args;
use common::identity::{Watch, read_secret};
use tracing::{error, info};

/// The files that have keys, and their present keys. All clones share the keys.
#[derive(Clone, Default, Args)]
pub struct KeyFiles {
    /// File with keys like those of `--api-key`, one per line. The proxy reads the file again when it changes, and at
    /// SIGHUP. Only the file's owner may open it.
    #[arg(long, env = "PD_PROXY_API_KEY_FILE", value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,

    /// File with keys like those of `--admin-key`, one per line, read as `--api-key-file` is.
    #[arg(long, env = "PD_PROXY_ADMIN_KEY_FILE", value_name = "FILE")]
    pub admin_key_file: Option<PathBuf>,

    /// File with the one key of `--engine-key`, read as `--api-key-file` is.
    #[arg(
        long,
        env = "PD_PROXY_ENGINE_KEY_FILE",
        value_name = "FILE",
        conflicts_with = "engine_key"
    )]
    pub engine_key_file: Option<PathBuf>,

    #[arg(skip)]
    pub(super) present: Arc<RwLock<Arc<Keys>>>,
}

/// The keys of the files.
#[derive(Default, PartialEq, Eq)]
pub(super) struct Keys {
    pub(super) api: Vec<String>,
    pub(super) admin: Vec<String>,
    pub(super) engine: Option<String>,
}

impl KeyFiles {
    /// Returns the keys as they are now.
    pub(super) fn present(&self) -> Arc<Keys> {
        Arc::clone(&self.present.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Reads all files, without effect on the present keys.
    ///
    /// # Errors
    /// All problems, each with its flag and file.
    fn read(&self) -> Result<Keys, Vec<String>> {
        let mut problems = Vec::new();
        let mut of = |flag: &str, file: &Option<PathBuf>| match file {
            Some(file) => keys(file).unwrap_or_else(|problem| {
                problems.push(format!("{flag} {problem}"));
                Vec::new()
            }),
            None => Vec::new(),
        };
        let (api, admin) = (
            of("--api-key-file", &self.api_key_file),
            of("--admin-key-file", &self.admin_key_file),
        );
        let mut engine = of("--engine-key-file", &self.engine_key_file);
        if engine.len() > 1 {
            problems.push(format!(
                "--engine-key-file: {} keys; the proxy sends one key to engines, so write one",
                engine.len()
            ));
        }
        let engine = engine.pop();
        match problems.is_empty() {
            true => Ok(Keys { api, admin, engine }),
            false => Err(problems),
        }
    }

    /// Returns all problems of the files.
    pub(super) fn problems(&self) -> Vec<String> {
        self.read().err().unwrap_or_default()
    }

    /// Reads the files before the proxy starts.
    ///
    /// # Errors
    /// All problems, each with its flag and file.
    pub(crate) fn load(&self) -> Result<Watch, Vec<String>> {
        let files = [
            &self.api_key_file,
            &self.admin_key_file,
            &self.engine_key_file,
        ];
        let watch = Watch::new(files.into_iter().flatten().cloned().collect());
        self.set(self.read()?);
        Ok(watch)
    }

    /// Reads the files again. If a file has a problem, the present keys stay: a slip in an editor must not lock all clients
    /// out.
    pub(crate) fn reread(&self) {
        match self.read() {
            Ok(keys) if keys == *self.present() => {}
            Ok(keys) => {
                let (api, admin) = (keys.api.len(), keys.admin.len());
                info!(api, admin, "the keys of the files have changed");
                self.set(keys);
            }
            Err(problems) => {
                for problem in problems {
                    error!("the former keys stay in use: {problem}");
                }
            }
        }
    }

    fn set(&self, keys: Keys) {
        let mut present = self.present.write().unwrap_or_else(PoisonError::into_inner);
        *present = Arc::new(keys);
    }
}

impl std::fmt::Debug for KeyFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Keys must not reach a log.
        f.debug_struct("KeyFiles").finish_non_exhaustive()
    }
}

/// Returns the keys of a file: at least one.
fn keys(file: &Path) -> Result<Vec<String>, String> {
    let text = read_secret(file, MAX_BYTES).map_err(|e| e.to_string())?;
    let name = file.display();
    if text.len() as u64 == MAX_BYTES {
        return Err(format!(
            "{name}: {MAX_BYTES} bytes or more; remove old keys"
        ));
    }
    let text = String::from_utf8(text)
        .map_err(|_| format!("{name}: not a text; write one key per line"))?;
    let lines = text.lines().map(str::trim);
    let keys: Vec<_> = lines
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(str::to_owned)
        .collect();
    if keys.is_empty() {
        return Err(format!("{name}: no key in it; write one key per line"));
    }
    match keys.iter().position(|key| !super::is_key(key)) {
        // The text of a wrong line may be a key, so it must not reach a log.
        Some(index) => Err(format!(
            "{name}: key {}: a key must be printable ASCII without spaces",
            index + 1
        )),
        None => Ok(keys),
    }
}

/// Largest file, in bytes.
const MAX_BYTES: u64 = 64 << 10;
