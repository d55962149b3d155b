//! Holds the wires of one buffer: starts them, tells them the slot layout, and chooses one for each peer.

use std::net::ToSocketAddrs;
use std::sync::Arc;
use std::time::Duration;

use protocol::message::{Advert, Hello};
use protocol::{LeaseId, SlotIndex, dlist};
use tracing::info;

use crate::config::{Config, Listen, Wire};
use crate::memory::Buffer;
use crate::memory::cuda::DeviceMemory;
use crate::net::host_id;
use crate::transport::choose::{self, Chosen, NoWire, Sides, Wanted};
use crate::transport::cuda_ipc::{self, CudaIpc};
use crate::transport::nixl::{self, Library, Nixl, Search};
use crate::transport::tcp::{self, Tcp};
use crate::transport::{Kind, Transport};

/// All wires that this process can use for one buffer.
#[derive(Clone, Debug)]
pub(crate) struct Wires {
    wanted: Wanted,
    transports: Vec<Arc<dyn Transport>>,
    memory: dlist::Memory,
}

impl Wires {
    /// Starts every wire that the configuration allows and this host has.
    ///
    /// # Errors
    /// A wire that the configuration names cannot be started, or a port cannot be bound.
    pub(crate) fn start(
        config: &Config,
        rank: u32,
        buffer: &Arc<Buffer>,
        listen: Option<(&Listen, u16)>,
    ) -> anyhow::Result<Self> {
        let mut transports: Vec<Arc<dyn Transport>> = Vec::new();
        let wants = |wire| config.transport == Wire::Auto || config.transport == wire;
        match buffer.cuda() {
            Some(memory) if wants(Wire::CudaIpc) => {
                transports.push(Arc::new(cuda_ipc(config, memory)?));
            }
            None if config.transport == Wire::CudaIpc => anyhow::bail!(
                "transport cuda_ipc copies between GPUs, and the buffers are host memory: set \
                 pd_buffer_device to cuda"
            ),
            _ => {}
        }
        // A host without NIXL still has TCP, so a failure of NIXL stops the start only if the configuration
        // names NIXL.
        let nixl = wants(Wire::Nixl).then(|| nixl(config, rank, buffer));
        match nixl.transpose() {
            Ok(None) => {}
            Ok(Some(nixl)) => transports.push(Arc::new(nixl)),
            Err(error) if config.transport == Wire::Nixl => return Err(error),
            Err(error) => info!("no NIXL, so the built-in TCP transport is used: {error:#}"),
        }
        if wants(Wire::Tcp) {
            transports.push(Arc::new(tcp(config, buffer, listen)?));
        }
        Ok(Self {
            wanted: match config.transport {
                Wire::Auto => Wanted::Auto,
                Wire::CudaIpc => Wanted::Only(Kind::CudaIpc),
                Wire::Nixl => Wanted::Only(Kind::Nixl),
                Wire::Tcp => Wanted::Only(Kind::Tcp),
            },
            transports,
            memory: match buffer.cuda() {
                Some(_) => dlist::Memory::Vram,
                None => dlist::Memory::Dram,
            },
        })
    }

    /// Makes a set of exactly these transports, for tests.
    #[cfg(test)]
    pub(crate) fn of(transports: Vec<Arc<dyn Transport>>) -> Self {
        Self {
            wanted: Wanted::Auto,
            transports,
            memory: dlist::Memory::Dram,
        }
    }

    /// Returns the memory type of the buffer in NIXL's terms.
    pub(crate) fn memory(&self) -> dlist::Memory {
        self.memory
    }

    /// Returns the adverts for the init handshake, best wire first.
    pub(crate) fn adverts(&self) -> Vec<Advert> {
        self.transports.iter().map(|t| t.advert()).collect()
    }

    /// Returns the data port of the built-in TCP transport, if it has one.
    pub(crate) fn port(&self) -> Option<u16> {
        let mut adverts = self.transports.iter().map(|t| t.advert());
        let advert = adverts.find(|advert| advert.kind == Kind::Tcp.as_str())?;
        advert.address.rsplit_once(':')?.1.parse().ok()
    }

    /// Returns NIXL's agent metadata; empty without NIXL.
    pub(crate) fn metadata(&self) -> Vec<u8> {
        self.transports
            .iter()
            .map(|t| t.metadata())
            .find(|m| !m.is_empty())
            .unwrap_or_default()
    }

    /// Chooses the wire to a receiver that was reached as `host` and sent this hello (`None` for LMCache).
    /// Returns the wire with its address and the reason for the choice. `failed` has the wires that were
    /// tried in vain, with the errors.
    ///
    /// # Errors
    /// No wire serves both sides; see [`NoWire`].
    pub(crate) fn choose(
        &self,
        hello: Option<&Hello>,
        host: &str,
        failed: &[(Kind, String)],
    ) -> Result<(Arc<dyn Transport>, Chosen), NoWire> {
        let ours: Vec<Kind> = self.transports.iter().map(|t| t.kind()).collect();
        let same_host = hello.is_some_and(|hello| hello.host == host_id::identity());
        let of = |kind| self.transports.iter().find(|t| t.kind() == kind);
        let reaches = |kind, advert: &Advert| {
            if let Some((_, why)) = failed.iter().find(|(tried, _)| *tried == kind) {
                return Err(why.clone());
            }
            of(kind).map_or(Ok(()), |t| t.reaches(advert, same_host))
        };
        let sides = Sides {
            ours: &ours,
            theirs: hello.map(|hello| &hello.transports[..]),
            host,
            reaches: &reaches,
            poor: &|kind| of(kind).and_then(|t| t.poor(same_host)),
        };
        let chosen = choose::choose(self.wanted, sides)?;
        // `choose` returns only wires of this process.
        let transport = of(chosen.kind).expect("a kind of this process");
        Ok((Arc::clone(transport), chosen))
    }

    /// Returns true if another wire may be used after a wire has failed.
    pub(crate) fn may_choose(&self) -> bool {
        self.wanted == Wanted::Auto
    }

    pub(crate) fn open(&self, lease: LeaseId, slot: SlotIndex) {
        for transport in &self.transports {
            transport.open(lease, slot);
        }
    }

    pub(crate) fn close(&self, slot: SlotIndex) {
        for transport in &self.transports {
            transport.close(slot);
        }
    }

    /// Returns true if closing a slot keeps out all later writes of a sender that uses this wire.
    pub(crate) fn close_is_a_fence(&self, name: &str) -> bool {
        let named = self.transports.iter().find(|t| t.kind().as_str() == name);
        named.is_some_and(|t| t.close_is_a_fence())
    }

    pub(crate) fn expect(&self, writing: bool) {
        for transport in &self.transports {
            transport.expect(writing);
        }
    }

    /// Tells every wire the slot layout of the buffer.
    pub(crate) fn divide(&self, slots: u32, slot_bytes: u64) {
        for transport in &self.transports {
            transport.divide(slots, slot_bytes);
        }
    }

    /// Returns the events of each wire: the wire's name, the event's name and its count.
    pub(crate) fn events(&self) -> Vec<(&'static str, &'static str, u64)> {
        let of = |t: &Arc<dyn Transport>| {
            let kind = t.kind().as_str();
            t.events()
                .into_iter()
                .map(move |(event, n)| (kind, event, n))
        };
        self.transports.iter().flat_map(of).collect()
    }

    /// Returns the first wire with a thread that has ended, which only a defect causes.
    pub(crate) fn ended(&self) -> Option<&'static str> {
        let ended = self.transports.iter().find(|t| !t.is_running());
        ended.map(|t| t.kind().as_str())
    }

    /// Returns NIXL's row of each slot; empty without NIXL.
    pub(crate) fn rows(&self) -> Vec<protocol::dlist::Row> {
        self.transports
            .iter()
            .map(|t| t.rows())
            .find(|r| !r.is_empty())
            .unwrap_or_default()
    }
}

fn cuda_ipc(config: &Config, memory: &Arc<DeviceMemory>) -> anyhow::Result<CudaIpc> {
    let wanted = cuda_ipc::Config {
        link: config.times.link,
        stall: config.times.stall,
        drain: DRAIN,
    };
    CudaIpc::start(Arc::clone(memory), wanted)
        .map_err(|e| anyhow::anyhow!("no thread for copies between GPUs: {e}"))
}

/// The time for copies in flight at the end of the process; copies end within milliseconds.
const DRAIN: Duration = Duration::from_secs(2);

fn tcp(
    config: &Config,
    buffer: &Arc<Buffer>,
    listen: Option<(&Listen, u16)>,
) -> anyhow::Result<Tcp> {
    let mut wanted = tcp::Config {
        connect: config.times.link,
        stall: config.times.stall,
        ..tcp::Config::default()
    };
    if let Some((listen, port)) = listen {
        let address = (listen.host.as_str(), port)
            .to_socket_addrs()?
            .next()
            .ok_or_else(|| anyhow::anyhow!("{} has no address", listen.host))?;
        wanted.listen = Some(address);
        wanted.advertise = Some(listen.advertise.clone());
    }
    Tcp::bind(wanted, Arc::clone(buffer))
        .map_err(|e| anyhow::anyhow!("the data port of the built-in TCP transport: {e}"))
}

fn nixl(config: &Config, rank: u32, buffer: &Arc<Buffer>) -> anyhow::Result<Nixl> {
    let library = Library::load(&Search::from_env())?;
    // Peers know agents by their names, so an agent after a restart must have a new name.
    let agent = format!("{}-{:016x}", config.rank_id(rank), rand::random::<u64>());
    let device = buffer.cuda().map_or(rank, |gpu| gpu.device().ordinal());
    let wanted = nixl::Config {
        link: config.times.link,
        stall: config.times.stall,
        ..nixl::Config::new(agent, u64::from(device))
    };
    Ok(Nixl::start(library, wanted, Arc::clone(buffer))?)
}
