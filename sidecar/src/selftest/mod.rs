//! `sidecar selftest`: both roles in this process, random chunks from one buffer to the other over
//! each wire, every byte compared.
//!
//! It is the real daemon, with its sockets, ports and machines; only the engines are missing. What it
//! proves: this host lets a sidecar run, and its wires carry bytes unchanged. What it does not: that
//! another host can be reached.

mod engine;
mod report;
mod rounds;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use protocol::Layout;
use protocol::local::{EngineRole, Target};
use protocol::record::Record;
use protocol::registration::ToProxy;

use crate::cli::{Exit, Selftest};
use crate::config::{Config, HostPort, Listen, LogFormat, RankPorts, Role, Times, Wire};
use crate::node::Node;
use crate::side::{Gauges, LinkStatus, Shown, Side};
use crate::wires::Wires;
use engine::Engine;
use report::Report;
use rounds::Rounds;

impl Selftest {
    /// Runs and prints.
    pub(crate) fn run(&self) -> Exit {
        let wires = match self.transport {
            Wire::Auto => vec![Wire::Tcp, Wire::Nixl],
            one => vec![one],
        };
        let mut exit = Exit::Ok;
        let seconds = Duration::from_secs(self.seconds) / u32::try_from(wires.len()).unwrap_or(1);
        let mut reports = Vec::new();
        for wire in wires {
            if !self.json {
                println!(
                    "{}: {:.0} s of random chunks ...",
                    wire.as_str(),
                    seconds.as_secs_f64()
                );
            }
            match self.one(wire, seconds) {
                Ok(report) => {
                    if report.wrong > 0 {
                        exit = Exit::Internal;
                    }
                    reports.push(report);
                }
                // With `auto`, a host without NIXL is a fine host.
                Err(error) if self.transport == Wire::Auto && wire == Wire::Nixl => {
                    eprintln!("nixl: not tested: {error:#}");
                }
                Err(error) => {
                    eprintln!("{}: {error:#}", wire.as_str());
                    exit = Exit::Unavailable;
                }
            }
        }
        report::print(&reports, self.json);
        exit
    }

    fn one(&self, wire: Wire, seconds: Duration) -> anyhow::Result<Report> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(self.push(wire, seconds))
    }

    async fn push(&self, wire: Wire, seconds: Duration) -> anyhow::Result<Report> {
        let directory = Directory::new()?;
        let seen = Arc::new(Seen::default());
        let config = Arc::new(self.config(wire, &directory));
        let node = Node::start(Arc::clone(&config), Arc::clone(&seen) as Arc<dyn Shown>).await?;
        let to = node
            .target(0)
            .ok_or_else(|| anyhow::anyhow!("no receiver was started"))?;
        let buffers = node.buffers();
        let drain = node.drain_token();
        let running = tokio::spawn(node.run());
        let rounds = self.rounds(&config, to, buffers, seconds).await;
        drain.cancel();
        running.await?;
        let rounds = rounds?;
        Ok(Report::new(wire, &rounds, &seen))
    }

    async fn rounds(
        &self,
        config: &Config,
        to: Target,
        buffers: BTreeMap<Side, Arc<crate::memory::Buffer>>,
        seconds: Duration,
    ) -> anyhow::Result<Rounds> {
        let layout = self.layout();
        let prefill = Engine::connect(&config.socket, EngineRole::Prefill, layout.clone()).await?;
        let decode = Engine::connect(&config.socket, EngineRole::Decode, layout.clone()).await?;
        let mut rounds = Rounds::new(prefill, decode, buffers, to, layout)?;
        rounds.run(seconds).await?;
        Ok(rounds)
    }

    /// One "layer" of bytes: a chunk of any size that is a multiple of the tokens in it.
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
        }
    }

    fn config(&self, wire: Wire, directory: &Directory) -> Config {
        Config {
            role: Role::Both,
            id: "selftest".to_owned(),
            ranks: 1,
            buffer_bytes: self.buffer_size,
            devices: vec![None],
            chunk_tokens: None,
            listen: Some(Listen {
                host: LOOPBACK.to_owned(),
                advertise: LOOPBACK.to_owned(),
                ranks: vec![RankPorts {
                    init: 0,
                    alloc: 0,
                    tcp: 0,
                }],
            }),
            socket: directory.path.join("selftest.sock"),
            admin: HostPort {
                host: LOOPBACK.to_owned(),
                port: 0,
            },
            admin_host: LOOPBACK.to_owned(),
            proxy: None,
            transport: wire,
            checksum: true,
            push: true,
            times: Times {
                heartbeat: Duration::from_secs(1),
                wait: Duration::from_secs(1),
                park: Duration::from_millis(50),
                repeat: Duration::from_millis(500),
                link: Duration::from_secs(5),
                stall: Duration::from_secs(10),
                max_wait: Duration::from_secs(5),
                no_sender: Duration::from_secs(5),
                unclaimed: Duration::from_secs(5),
                max_lease: Duration::from_secs(10),
                drain: Duration::from_secs(5),
            },
            max_requests: 64,
            max_quarantined: None,
            log_level: "warn".to_owned(),
            log_format: LogFormat::Text,
            trace: None,
        }
    }
}

/// Tokens of a chunk, as everywhere.
const CHUNK_TOKENS: u32 = 256;
const LOOPBACK: &str = "127.0.0.1";

/// A directory for the socket, removed at the end.
#[derive(Debug)]
struct Directory {
    path: PathBuf,
}

impl Directory {
    fn new() -> std::io::Result<Self> {
        let name = format!("pd-sidecar-selftest-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path)?;
        Ok(Self { path })
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // What is left of a self-test in the temporary directory harms nobody.
        std::fs::remove_dir_all(&self.path).ok();
    }
}

/// What the sides showed.
#[derive(Debug, Default)]
struct Seen {
    records: Mutex<Vec<(Side, Record)>>,
    reported: Mutex<String>,
}

impl Shown for Seen {
    fn record(&self, side: Side, _rank: u32, record: &Record) {
        let mut records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        records.push((side, record.clone()));
    }

    fn gauges(&self, _side: Side, _rank: u32, _gauges: Gauges<'_>) {}

    fn links(&self, _rank: u32, links: &mut dyn Iterator<Item = &LinkStatus>) {
        if let Some(link) = links.next() {
            let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
            reported.clone_from(&link.reported);
        }
    }

    fn wires(&self, _side: Side, _rank: u32, _wires: Wires) {}

    fn malformed(&self, _port: &'static str) {}

    fn tell_proxy(&self, _message: &ToProxy) {}
}
