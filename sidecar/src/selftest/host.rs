//! The self-test on host memory: two buffers, and both roles in this process.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use common::zmq::Traffic;
use protocol::local::{EngineRole, Target};
use protocol::record::Record;
use protocol::registration::ToProxy;

use super::engine::{Engine, Gpu};
use super::report::{LinkRow, Pushed, Report};
use super::rounds::{Arrived, Content, Place, Rounds, When};
use super::{Directory, LOOPBACK, Memory};
use crate::cli::Selftest;
use crate::config::{Config, HostPort, Listen, LogFormat, RankPorts, Role, Times};
use crate::memory::Buffer;
use crate::net::malformed::MalformedFrames;
use crate::rank::context::{Gauges, KeptStatus, LinkStatus, Observer, RankRole};
use crate::rank::metrics::RankMetrics;
use crate::rank::node::Node;
use crate::transport::Kind;
use crate::transport::protection::Protection;
use crate::transport::set::Wires;
use crate::transport::table::Choice;
use crate::transport::ucx::Ucx;

impl Selftest {
    pub(super) async fn between_buffers(
        &self,
        wire: Kind,
        seconds: Duration,
    ) -> anyhow::Result<Report> {
        let directory = Directory::new()?;
        let seen = Arc::new(Seen::default());
        let config = Arc::new(self.config(wire, &directory));
        let observer = Arc::clone(&seen) as Arc<dyn Observer>;
        // Nothing scrapes a self-test, so its metrics need no series at the start.
        let metrics = Arc::new(RankMetrics::new(&[], MalformedFrames::default()));
        let node = Node::start(Arc::clone(&config), observer, metrics).await?;
        let to = node
            .target(0)
            .ok_or_else(|| anyhow::anyhow!("no receiver was started"))?;
        let content = HostContent::new(node.buffers())?;
        let drain = node.drain();
        let running = tokio::spawn(node.run());
        let rounds = self.rounds(&config, to, content, seconds).await;
        drain.end();
        running.await?;
        let memory = Memory::Host.to_string();
        Ok(Report::new(
            wire,
            memory,
            seen.link(),
            &rounds?,
            &seen.pushed(),
        ))
    }

    async fn rounds(
        &self,
        config: &Config,
        to: Target,
        content: HostContent,
        seconds: Duration,
    ) -> anyhow::Result<Rounds> {
        let layout = self.layout();
        let connect = async |role| {
            Engine::connect(&config.socket, role, layout.clone(), Gpu::default()).await
        };
        let prefill = connect(EngineRole::Prefill).await?;
        let decode = connect(EngineRole::Decode).await?;
        let mut rounds = Rounds::new(prefill, decode, Box::new(content), to, &layout);
        rounds.run(seconds).await?;
        Ok(rounds)
    }

    fn config(&self, wire: Kind, directory: &Directory) -> Config {
        Config {
            role: Role::Both,
            id: "selftest".to_owned(),
            ranks: 1,
            buffer_bytes: self.buffer_size,
            devices: vec![None],
            chunk_tokens: None,
            max_prefill_tokens: 0,
            listen: Some(Listen {
                host: LOOPBACK.to_owned(),
                advertise: LOOPBACK.to_owned(),
                ranks: vec![RankPorts {
                    // Port 0 means any free port, so that a self-test can run beside sidecars.
                    init: 0,
                    alloc: 0,
                    query: None,
                    tcp: 0,
                }],
            }),
            fetch: None,
            socket: directory.path.join("selftest.sock"),
            has_successors: true,
            admin: HostPort {
                host: LOOPBACK.to_owned(),
                port: 0,
            },
            admin_host: LOOPBACK.to_owned(),
            proxy: None,
            identity: None,
            data: Protection::Plain,
            ucx: Ucx::default(),
            transport: Choice::Only(wire),
            // The self-test then also covers the code that computes and compares checksums.
            peers_from_proxy: false,
            checksum: true,
            push: true,
            // If a wire hangs, the test fails after the stall time. The other times are long: engines, sidecars and
            // the filling of the buffer share one thread, which a busy host can stop for seconds. The first link over
            // an emulated or busy RDMA device can take ten seconds.
            times: Times {
                heartbeat: Duration::from_secs(5),
                wait: Duration::from_secs(10),
                park: Duration::from_millis(50),
                repeat: Duration::from_millis(500),
                link: Duration::from_secs(20),
                stall: Duration::from_secs(10),
                max_wait: Duration::from_secs(10),
                no_sender: Duration::from_secs(25),
                unclaimed: Duration::from_secs(15),
                max_lease: Duration::from_secs(15),
                max_keep: Duration::from_secs(10),
                fence: Duration::from_secs(1),
                drain: Duration::from_secs(5),
            },
            max_requests: 64,
            layers_below_gb_s: 0,
            max_quarantined: None,
            log_level: "warn".to_owned(),
            log_format: LogFormat::Text,
            trace: None,
        }
    }
}

/// Both buffers, and the checksum of each chunk that was filled.
#[derive(Debug)]
pub(super) struct HostContent {
    send: Arc<Buffer>,
    land: Arc<Buffer>,
    sums: BTreeMap<u32, u64>,
}

impl HostContent {
    pub(super) fn new(mut buffers: BTreeMap<RankRole, Arc<Buffer>>) -> anyhow::Result<Self> {
        let mut take = |role| {
            buffers
                .remove(&role)
                .ok_or_else(|| anyhow::anyhow!("no {role:?} buffer"))
        };
        Ok(Self {
            send: take(RankRole::Sender)?,
            land: take(RankRole::Receiver)?,
            sums: BTreeMap::new(),
        })
    }
}

impl Content for HostContent {
    fn fill(&mut self, places: &[Place], _when: When) -> anyhow::Result<Option<u32>> {
        for place in places {
            let (offset, bytes) = (place.offset, place.bytes);
            self.send.fill_random(offset, bytes, rand::random())?;
            let sum = self.send.sum(offset, bytes)?;
            self.sums.insert(place.chunk, sum);
        }
        Ok(None)
    }

    fn filled(&mut self) -> Option<Instant> {
        None
    }

    fn arrived(&mut self, place: Place) -> anyhow::Result<Arrived> {
        let sum = self.land.sum(place.offset, place.bytes)?;
        Ok(if self.sums.remove(&place.chunk) == Some(sum) {
            Arrived::Same
        } else {
            Arrived::Different
        })
    }
}

/// The records and the link that the two roles reported.
#[derive(Debug, Default)]
struct Seen {
    records: Mutex<Vec<(RankRole, Record)>>,
    link: Mutex<LinkRow>,
}

impl Seen {
    fn link(&self) -> LinkRow {
        let link = self.link.lock();
        link.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns every successful request, as the sender recorded it.
    fn pushed(&self) -> Vec<Pushed> {
        let records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        let done =
            |(role, r): &&(RankRole, Record)| *role == RankRole::Sender && r.reason.is_none();
        let pushed = |(_, r): &(RankRole, Record)| Pushed {
            chunks: r.chunks,
            bytes: r.bytes,
            push_us: r.push_us,
        };
        records.iter().filter(done).map(pushed).collect()
    }
}

impl Observer for Seen {
    fn record(&self, role: RankRole, _rank: u32, record: &Record) {
        let mut records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        records.push((role, record.clone()));
    }

    fn gauges(&self, _side: RankRole, _rank: u32, _gauges: Gauges<'_>) {}

    fn kept(&self, _rank: u32, _requests: &mut dyn Iterator<Item = KeptStatus>) {}

    fn links(&self, _rank: u32, links: &mut dyn Iterator<Item = &LinkStatus>) {
        if let Some(link) = links.next() {
            let mut row = self.link.lock().unwrap_or_else(PoisonError::into_inner);
            row.reported.clone_from(&link.reported);
            row.measured_gb_per_s = link.rate();
        }
    }

    fn wires(&self, _side: RankRole, _rank: u32, _wires: Wires) {}

    fn port(&self, _rank: u32, _port: &'static str, _traffic: Traffic) {}

    fn tell_proxy(&self, _message: &ToProxy) {}
}
