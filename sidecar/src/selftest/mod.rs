//! `sidecar selftest`: sends random chunks from a send buffer into a landing buffer over each wire, and
//! compares every byte.
//!
//! With host memory both roles run in this process. With GPU memory each role runs in its own process,
//! because CUDA shares memory only between processes. The test runs the real sidecar with its sockets, ports
//! and machines; only the engines are simulated. The test proves that a sidecar can run on this host and that
//! the wires carry bytes unchanged. The test does not prove that another host can be reached.

pub(crate) mod engine;
mod gpu;
mod host;
mod report;
mod rounds;

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::time::Duration;

use protocol::Layout;

use crate::cli::Selftest;
use crate::config::{Device, Devices};
use crate::exit::Exit;
use crate::memory::cuda::{self, Which};
use crate::transport::Kind;
use crate::transport::table::Choice;
use crate::transport::ucx::{DEVICES, TLS, Ucx, names_tcp};
use report::Report;
use rounds::Rounds;

/// The memory of the buffers of one run.
#[derive(Clone, Debug)]
enum Memory {
    Host,
    /// The sender's GPU and the receiver's GPU.
    Gpus(Which, Which),
}

impl Selftest {
    /// Returns UCX's settings for both roles: the settings of a sidecar on loopback.
    ///
    /// # Errors
    /// `UCX_TLS` names tcp, but the user has not allowed UCX to open TCP ports.
    pub(crate) fn ucx(&self) -> Result<Ucx, Exit> {
        let given = |name| std::env::var(name).unwrap_or_default();
        let trusted = given(CONSENT_VARIABLE).trim() == "trusted";
        let tls = given(TLS);
        if !trusted && names_tcp(&tls) && self.transport.may_use_ucx() {
            eprintln!(
                "{TLS}={tls} lets UCX open TCP ports: leave tcp out, or set \
                 {CONSENT_VARIABLE}=trusted"
            );
            return Err(Exit::Usage);
        }
        let devices_given = !given(DEVICES).is_empty();
        let is_loaded = self.transport.may_use_ucx();
        Ok(Ucx::of_this_host(trusted, devices_given, is_loaded))
    }

    /// Runs the test and prints the report.
    pub(crate) fn run(&self) -> Exit {
        let runs = match self.runs() {
            Ok(runs) => runs,
            Err(error) => {
                eprintln!("{error}");
                return Exit::Usage;
            }
        };
        let mut exit = Exit::Ok;
        let seconds = Duration::from_secs(self.seconds) / u32::try_from(runs.len()).unwrap_or(1);
        let mut reports = Vec::new();
        for (memory, wire) in runs {
            if !self.json {
                println!(
                    "{wire} from {memory}: {:.1} s of random chunks ...",
                    seconds.as_secs_f64()
                );
            }
            match self.one(&memory, wire, seconds) {
                Ok(report) => {
                    if report.wrong > 0 {
                        exit = Exit::Internal;
                    }
                    reports.push(report);
                }
                // With `auto`, a missing library is not a fault of this host.
                Err(error) if self.transport == Choice::Auto && wire.is_optional() => {
                    eprintln!("{wire} from {memory}: not tested: {error:#}");
                }
                Err(error) => {
                    eprintln!("{wire} from {memory}: {error:#}");
                    exit = Exit::Unavailable;
                }
            }
        }
        report::print(&reports, self.json);
        exit
    }

    /// Returns the runs: every wire with every kind of memory, or only the runs that the flags select.
    fn runs(&self) -> Result<Vec<(Memory, Kind)>, String> {
        let gpu = |device: &Device| match device {
            Device::Cpu => Err(
                "the two buffers of a self-test must both be in host memory or both on GPUs"
                    .to_owned(),
            ),
            Device::Cuda => Ok(Which::Ordinal(0)),
            Device::Gpu(which) => Ok(which.clone()),
        };
        let gpus = match self.buffer_device.as_ref().map(|devices| &devices.0[..]) {
            None if cuda::is_present() => Some(two_gpus()?),
            None | Some([Device::Cpu]) => None,
            Some([Device::Cuda]) => Some(two_gpus()?),
            Some([one]) => Some(Memory::Gpus(gpu(one)?, gpu(one)?)),
            Some([from, to]) => Some(Memory::Gpus(gpu(from)?, gpu(to)?)),
            Some(_) => {
                return Err(
                    "give one device for both sides, or the sender's and the receiver's".to_owned(),
                );
            }
        };
        let host = match &self.buffer_device {
            Some(Devices(devices)) if !matches!(devices[..], [Device::Cpu]) => None,
            _ => Some(Memory::Host),
        };
        let wires: Vec<Kind> = self.transport.kinds().rev().collect();
        let fits =
            |memory: &Memory, wire: Kind| matches!(memory, Memory::Gpus(..)) || !wire.needs_gpu();
        let runs: Vec<_> = host
            .into_iter()
            .chain(gpus)
            .flat_map(|memory| wires.iter().map(move |wire| (memory.clone(), *wire)))
            .filter(|(memory, wire)| fits(memory, *wire))
            .collect();
        if runs.is_empty() {
            return Err(format!(
                "{} copies between GPUs, and this process sees no GPU",
                self.transport
            ));
        }
        Ok(runs)
    }

    fn one(&self, memory: &Memory, wire: Kind, seconds: Duration) -> anyhow::Result<Report> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async {
            match memory {
                Memory::Host => self.between_buffers(wire, seconds).await,
                Memory::Gpus(from, to) => self.between_gpus(from, to, wire, seconds).await,
            }
        })
    }

    /// Returns a layout with one "layer" of bytes. A chunk has the size that the flag gives, rounded down to
    /// a multiple of the number of tokens.
    fn layout(&self) -> Layout {
        let per_token = (self.chunk_bytes / u64::from(CHUNK_TOKENS)).max(1);
        Layout {
            model: "selftest".to_owned(),
            dtype: "uint8".to_owned(),
            layers: 1,
            kv_heads: 1,
            head_size: u32::try_from(per_token).unwrap_or(u32::MAX),
            mla: true,
            chunk_tokens: CHUNK_TOKENS,
            groups: Vec::new(),
            quantization: String::new(),
        }
    }
}

/// The variable that lets UCX open TCP ports, both in a self-test and in a sidecar.
pub(crate) const CONSENT_VARIABLE: &str = "PD_SIDECAR_NIXL_OVER_TCP";

/// Returns the first GPU for the sender and the second GPU for the receiver. If there is only one GPU, both
/// roles use it.
fn two_gpus() -> Result<Memory, String> {
    let all = cuda::all().map_err(|error| error.to_string())?;
    let second = u32::from(all.len() > 1);
    Ok(Memory::Gpus(Which::Ordinal(0), Which::Ordinal(second)))
}

impl std::fmt::Display for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Host => f.write_str("host"),
            Self::Gpus(from, to) => write!(f, "{from} to {to}"),
        }
    }
}

/// Tokens of a chunk: LMCache's default.
const CHUNK_TOKENS: u32 = 256;
const LOOPBACK: &str = "127.0.0.1";

/// A directory for the socket, removed at the end.
#[derive(Debug)]
pub(crate) struct Directory {
    pub(crate) path: PathBuf,
}

impl Directory {
    /// Makes a directory that only this user can enter. The directory's name cannot be guessed, and an
    /// existing directory is not used, because another user may have made it.
    pub(crate) fn new() -> std::io::Result<Self> {
        let name = format!("pd-sidecar-selftest-{:016x}", rand::random::<u64>());
        let path = std::env::temp_dir().join(name);
        DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self { path })
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // If the removal fails, files of the self-test stay in the temporary directory, where they do no
        // harm.
        std::fs::remove_dir_all(&self.path).ok();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::Directory;

    /// With a predictable name, another user could make the directory in /tmp first.
    #[test]
    fn its_directory_is_its_own() {
        let (one, other) = (Directory::new().unwrap(), Directory::new().unwrap());
        assert_ne!(one.path, other.path);
        let mode = std::fs::metadata(&one.path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700, "{mode:o}");
    }
}
