//! Holds the wires of one buffer: starts them, tells them the slot layout, and chooses a wire for each
//! peer.

use std::sync::Arc;

use protocol::message::{Advert, Hello};
use protocol::{LeaseId, SlotIndex, dlist};
use tracing::info;

use crate::net::host_id;
use crate::transport::choose::{self, Chosen, NoWire, Sides};
use crate::transport::spec::Start;
use crate::transport::table::Choice;
use crate::transport::{HandshakeFields, Kind, Transport};

/// All wires that this process can use for one buffer.
#[derive(Clone, Debug)]
pub(crate) struct Wires {
    wanted: Choice,
    transports: Vec<Arc<dyn Transport>>,
    memory: dlist::Memory,
}

impl Wires {
    /// Starts every wire that the configuration allows and this host has.
    ///
    /// # Errors
    /// A wire that the configuration names cannot be started, or a port cannot be bound.
    pub(crate) fn start(wanted: Choice, with: Start<'_>) -> anyhow::Result<Self> {
        let on_gpu = with.buffer.cuda().is_some();
        let mut transports: Vec<Arc<dyn Transport>> = Vec::new();
        for kind in wanted.kinds() {
            if kind.needs_gpu() && !on_gpu {
                if wanted == Choice::Auto {
                    continue;
                }
                anyhow::bail!(
                    "transport {kind} copies between GPUs, and the buffers are host memory: set \
                     pd_buffer_device to cuda"
                );
            }
            // A host without a library still has the built-in transport, so the library's absence stops the
            // start only if the configuration names the transport.
            match ((kind.0.start)(&with), kind.0.absence) {
                (Ok(transport), _) => transports.push(transport),
                (Err(error), Some(absence)) if wanted == Choice::Auto => {
                    info!("{absence}: {error:#}");
                }
                (Err(error), _) => return Err(error),
            }
        }
        Ok(Self {
            wanted,
            transports,
            memory: if on_gpu {
                dlist::Memory::Vram
            } else {
                dlist::Memory::Dram
            },
        })
    }

    /// Makes a set of exactly these transports, for tests.
    #[cfg(test)]
    pub(crate) fn of(transports: Vec<Arc<dyn Transport>>) -> Self {
        Self {
            wanted: Choice::Auto,
            transports,
            memory: dlist::Memory::Dram,
        }
    }

    /// Returns the kind of memory of the buffer.
    pub(crate) fn memory(&self) -> dlist::Memory {
        self.memory
    }

    /// Returns the adverts for the init handshake, best wire first.
    pub(crate) fn adverts(&self) -> Vec<Advert> {
        self.transports.iter().map(|t| t.advert()).collect()
    }

    /// Returns the ports on which the wires listen for data.
    pub(crate) fn data_ports(&self) -> impl Iterator<Item = (Kind, u16)> {
        let wires = self.transports.iter();
        wires.filter_map(|t| Some((t.kind(), t.data_port()?)))
    }

    /// Returns the handshake's fields that only one wire fills; empty if this process lacks that wire.
    pub(crate) fn handshake_fields(&self) -> HandshakeFields {
        let mut fields = self.transports.iter().filter_map(|t| t.handshake_fields());
        fields.next().unwrap_or_default()
    }

    /// Chooses the wire to a receiver. `hello` is the receiver's hello (`None` for LMCache), and `host` is
    /// the name under which this process reached the receiver. Returns the wire with its address and the
    /// reason for the choice. `failed` has the wires that were already tried and failed, with their errors.
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
        self.wanted == Choice::Auto
    }

    pub(crate) fn open(&self, lease: LeaseId, owner: Option<&Arc<str>>, slot: SlotIndex) {
        for transport in &self.transports {
            transport.open(lease, owner, slot);
        }
    }

    pub(crate) fn close(&self, slot: SlotIndex) {
        for transport in &self.transports {
            transport.close(slot);
        }
    }

    /// Returns true if closing a slot prevents all later writes of a sender that uses this wire.
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

    /// Returns the name of the first wire with a thread that has ended. Only a defect ends a thread.
    pub(crate) fn ended(&self) -> Option<&'static str> {
        let ended = self.transports.iter().find(|t| !t.is_running());
        ended.map(|t| t.kind().as_str())
    }
}
