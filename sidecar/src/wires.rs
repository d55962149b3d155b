//! The wires of one buffer: made at start, cut with it, and the choice between them per peer.

use std::net::ToSocketAddrs;
use std::sync::Arc;

use protocol::message::Advert;
use protocol::{LeaseId, SlotIndex};
use tracing::info;

use crate::config::{Config, Listen, Wire};
use crate::memory::Buffer;
use crate::transport::choose::{self, Chosen, NoWire, Wanted};
use crate::transport::nixl::{self, Library, Nixl, Search};
use crate::transport::tcp::{self, Tcp};
use crate::transport::{Kind, Transport};

/// Every wire that this process can use for one buffer.
#[derive(Clone, Debug)]
pub(crate) struct Wires {
    wanted: Wanted,
    transports: Vec<Arc<dyn Transport>>,
}

impl Wires {
    /// Makes every wire that the configuration allows and this host has.
    ///
    /// # Errors
    /// A wire that was asked for by name and cannot be had, or a port that cannot be bound.
    pub(crate) fn start(
        config: &Config,
        rank: u32,
        buffer: &Arc<Buffer>,
        listen: Option<(&Listen, u16)>,
    ) -> anyhow::Result<Self> {
        let mut transports: Vec<Arc<dyn Transport>> = Vec::new();
        let wanted = config.transport != Wire::Tcp;
        match wanted.then(|| nixl(config, rank, buffer)).transpose() {
            Ok(None) => {}
            Ok(Some(nixl)) => transports.push(Arc::new(nixl)),
            Err(error) if config.transport == Wire::Nixl => return Err(error),
            Err(error) => info!("no NIXL, so the built-in TCP transport is used: {error:#}"),
        }
        if config.transport != Wire::Nixl {
            transports.push(Arc::new(tcp(config, buffer, listen)?));
        }
        Ok(Self {
            wanted: match config.transport {
                Wire::Auto => Wanted::Auto,
                Wire::Nixl => Wanted::Only(Kind::Nixl),
                Wire::Tcp => Wanted::Only(Kind::Tcp),
            },
            transports,
        })
    }

    /// These and no others.
    #[cfg(test)]
    pub(crate) fn of(transports: Vec<Arc<dyn Transport>>) -> Self {
        Self {
            wanted: Wanted::Auto,
            transports,
        }
    }

    /// Best first, for the init handshake.
    pub(crate) fn adverts(&self) -> Vec<Advert> {
        self.transports.iter().map(|t| t.advert()).collect()
    }

    /// NIXL's agent metadata; empty without NIXL.
    pub(crate) fn metadata(&self) -> Vec<u8> {
        self.transports
            .iter()
            .map(|t| t.metadata())
            .find(|m| !m.is_empty())
            .unwrap_or_default()
    }

    /// The wire to a receiver that was reached as `host` and advertises these, its address, and why it
    /// is that one.
    ///
    /// # Errors
    /// See [`NoWire`].
    pub(crate) fn choose(
        &self,
        theirs: Option<&[Advert]>,
        host: &str,
    ) -> Result<(Arc<dyn Transport>, Chosen), NoWire> {
        let ours: Vec<Kind> = self.transports.iter().map(|t| t.kind()).collect();
        let chosen = choose::choose(self.wanted, &ours, theirs, host)?;
        let transport = self.transports.iter().find(|t| t.kind() == chosen.kind);
        // `choose` takes one of ours.
        let transport = transport.expect("a kind of this process");
        Ok((Arc::clone(transport), chosen))
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

    /// Whether closing a slot keeps every later write out, for a sender that uses this wire.
    pub(crate) fn close_is_a_fence(&self, name: &str) -> bool {
        let named = self.transports.iter().find(|t| t.kind().as_str() == name);
        named.is_some_and(|t| t.close_is_a_fence())
    }

    pub(crate) fn expect(&self, writing: bool) {
        for transport in &self.transports {
            transport.expect(writing);
        }
    }

    /// Cuts the buffer into slots for every wire.
    pub(crate) fn cut(&self, slots: u32, slot_bytes: u64) {
        for transport in &self.transports {
            transport.cut(slots, slot_bytes);
        }
    }

    /// What has happened on each wire: its name, the event's, how often.
    pub(crate) fn events(&self) -> Vec<(&'static str, &'static str, u64)> {
        let of = |t: &Arc<dyn Transport>| {
            let kind = t.kind().as_str();
            t.events()
                .into_iter()
                .map(move |(event, n)| (kind, event, n))
        };
        self.transports.iter().flat_map(of).collect()
    }

    /// The first wire whose thread has ended, which only a defect does.
    pub(crate) fn ended(&self) -> Option<&'static str> {
        let ended = self.transports.iter().find(|t| !t.is_running());
        ended.map(|t| t.kind().as_str())
    }

    /// NIXL's row of each slot; empty without NIXL.
    pub(crate) fn rows(&self) -> Vec<protocol::dlist::Row> {
        self.transports
            .iter()
            .map(|t| t.rows())
            .find(|r| !r.is_empty())
            .unwrap_or_default()
    }
}

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
    // Peers know agents by their names, so a restart needs another one.
    let agent = format!("{}-{:016x}", config.rank_id(rank), rand::random::<u64>());
    let wanted = nixl::Config {
        link: config.times.link,
        stall: config.times.stall,
        ..nixl::Config::new(agent, u64::from(rank))
    };
    Ok(Nixl::start(library, wanted, Arc::clone(buffer))?)
}
