//! `sidecar drain`: makes a running sidecar keep no new KV, and waits until decode sides have fetched the rest.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::engine::socket;
use crate::exit::Exit;
use crate::net::private_folder;

/// Flags of `drain`.
#[derive(Debug, Args)]
pub(crate) struct Drain {
    /// Waits until decode sides have fetched the KV that the engine keeps, or until this KV expires.
    #[arg(long)]
    pub(crate) until_fetched: bool,
    /// Path of the sidecar's unix socket. Default: $PD_SIDECAR_SOCKET, else the only socket in the default folder.
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,
    /// Longest wait in seconds. The default is longer than the default of sidecar.max_keep_ms.
    #[arg(long, value_name = "N", default_value_t = 130, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) timeout: u64,
}

impl Drain {
    /// Asks the sidecar and prints its answer.
    pub(crate) fn run(&self) -> Exit {
        let socket = match self.socket() {
            Ok(socket) => socket,
            Err(problem) => {
                eprintln!("error: {problem}");
                return Exit::Usage;
            }
        };
        let asked = socket::drain(
            &socket,
            self.until_fetched,
            Duration::from_secs(self.timeout),
        );
        match asked {
            Ok(0) => {
                println!(
                    "{}: no KV is kept, and no new KV is taken",
                    socket.display()
                );
                Exit::Ok
            }
            Ok(kept) => {
                println!(
                    "{}: no new KV is taken; the KV of {kept} requests is kept until decode sides fetch it",
                    socket.display()
                );
                Exit::Ok
            }
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                eprintln!(
                    "error: {}: decode sides have not fetched all KV within {} s; --timeout sets this time",
                    socket.display(),
                    self.timeout
                );
                Exit::Temporary
            }
            Err(error) => {
                eprintln!(
                    "error: {}: {error}; --socket names the socket of another sidecar",
                    socket.display()
                );
                Exit::Unavailable
            }
        }
    }

    /// Returns the socket that the flag or the environment names, otherwise the only socket in the default folder.
    fn socket(&self) -> Result<PathBuf, String> {
        let named = std::env::var_os("PD_SIDECAR_SOCKET").filter(|path| !path.is_empty());
        if let Some(path) = self.socket.clone().or(named.map(PathBuf::from)) {
            return Ok(path);
        }
        let runtime = std::env::var("XDG_RUNTIME_DIR").ok();
        let uid = rustix::process::geteuid().as_raw();
        let folder = PathBuf::from(private_folder::of_user(runtime.as_deref(), uid));
        let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        let mut sockets: Vec<PathBuf> = entries
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|end| end == "sock"))
            .collect();
        if sockets.len() > 1 {
            // A killed process leaves its file. A sidecar logs a connection without a message, so this function
            // connects only if it must.
            sockets.retain(|path| UnixStream::connect(path).is_ok());
        }
        match (sockets.len(), sockets.pop()) {
            (1, Some(socket)) => Ok(socket),
            (0, _) | (_, None) => Err(format!(
                "no sidecar listens in {}: name its socket with --socket",
                folder.display()
            )),
            (more, _) => Err(format!(
                "{more} sidecars listen in {}: name the socket of one with --socket",
                folder.display()
            )),
        }
    }
}
