//! The engine connections of one side of one rank, and the layout that they agree on.

use std::collections::BTreeMap;
use std::sync::Arc;

use protocol::local::{EngineHello, Refused, ToEngine, Welcome};
use protocol::{EngineId, Epoch, Layout, Reason, VERSION};
use tracing::{info, warn};

use crate::local::Connection;
use crate::memory::Buffer;

/// Engines, and how their chunks cut the buffer.
#[derive(Debug)]
pub(crate) struct Engines {
    buffer: Arc<Buffer>,
    /// The sidecar's name, for welcomes.
    id: String,
    /// As configured; absent if the engine decides.
    chunk_tokens: Option<u32>,
    connections: BTreeMap<EngineId, Connection>,
    cut: Option<Cut>,
}

/// How a layout cuts the buffer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Cut {
    /// The shape of a chunk.
    pub(crate) layout: Layout,
    /// Slots.
    pub(crate) slots: u32,
    /// Bytes of a slot.
    pub(crate) slot_bytes: u64,
    /// New with each cut.
    pub(crate) epoch: Epoch,
}

/// A sliding window needs one slot that is written while another is read.
const MIN_SLOTS: u32 = 2;

impl Engines {
    pub(crate) fn new(id: String, buffer: Arc<Buffer>, chunk_tokens: Option<u32>) -> Self {
        Self {
            buffer,
            id,
            chunk_tokens,
            connections: BTreeMap::new(),
            cut: None,
        }
    }

    /// How the buffer is cut, once an engine has said hello.
    pub(crate) fn cut(&self) -> Option<&Cut> {
        self.cut.as_ref()
    }

    /// Engines connected now.
    pub(crate) fn connected(&self) -> usize {
        self.connections.len()
    }

    /// Answers a hello. Returns the cut if it is a new one: every slot is then free and the epoch new.
    /// `busy`: slots are still held or quarantined, so the buffer cannot be cut anew.
    pub(crate) fn hello(
        &mut self,
        connection: Connection,
        hello: &EngineHello,
        busy: bool,
    ) -> Option<Cut> {
        let (cut, fresh) = match self.admit(hello, busy) {
            Ok(admitted) => admitted,
            Err(refused) => {
                warn!(
                    engine = hello.engine,
                    reason = %refused.reason,
                    "engine refused: {}",
                    refused.text
                );
                connection.refuse(ToEngine::Refused(refused));
                return None;
            }
        };
        info!(
            engine = hello.engine,
            connection = %connection.id(),
            role = ?hello.role,
            rank = hello.rank,
            slots = cut.slots,
            slot_bytes = cut.slot_bytes,
            "engine connected"
        );
        let welcome = Welcome {
            v: VERSION,
            id: self.id.clone(),
            epoch: cut.epoch,
            memory: self.buffer.export().as_str().to_owned(),
            slots: cut.slots,
            slot_bytes: cut.slot_bytes,
            connection: connection.id().0,
        };
        connection.welcome(ToEngine::Welcome(welcome), Arc::clone(&self.buffer));
        self.connections.insert(connection.id(), connection);
        self.cut = Some(cut.clone());
        fresh.then_some(cut)
    }

    /// Sends to an engine, if it is still there.
    pub(crate) fn send(&self, engine: EngineId, message: ToEngine) {
        if let Some(connection) = self.connections.get(&engine) {
            connection.send(message);
        }
    }

    /// Notes the end of a connection.
    pub(crate) fn gone(&mut self, engine: EngineId) {
        self.connections.remove(&engine);
    }

    fn admit(&self, hello: &EngineHello, busy: bool) -> Result<(Cut, bool), Refused> {
        let refuse = |reason, text| Err(Refused { reason, text });
        if hello.v != VERSION {
            return refuse(
                Reason::BadRequest,
                format!(
                    "the engine's connector speaks version {} of the local protocol, this sidecar \
                     version {VERSION}: install matching versions of both",
                    hello.v
                ),
            );
        }
        if let Some(cut) = &self.cut {
            let Some((field, ours, theirs)) = cut.layout.difference(&hello.layout) else {
                return Ok((cut.clone(), false));
            };
            if !self.connections.is_empty() || busy {
                return refuse(
                    Reason::LayoutMismatch,
                    format!(
                        "{field} is {theirs} here but {ours} for the engine that uses this buffer: \
                         one sidecar serves one model"
                    ),
                );
            }
        }
        self.cut_for(&hello.layout).map(|cut| (cut, true))
    }

    fn cut_for(&self, layout: &Layout) -> Result<Cut, Refused> {
        let refuse = |text| {
            Err(Refused {
                reason: Reason::LayoutMismatch,
                text,
            })
        };
        if let Some(configured) = self.chunk_tokens
            && configured != layout.chunk_tokens
        {
            return refuse(format!(
                "chunk_size is {configured} in the sidecar's configuration and {} in the \
                 connector's: set them equal",
                layout.chunk_tokens
            ));
        }
        let Some(slot_bytes) = layout.chunk_bytes().filter(|&bytes| bytes > 0) else {
            return refuse(format!("a chunk of this shape has no size: {layout:?}"));
        };
        let slots = self.buffer.bytes() / slot_bytes;
        if slots < u64::from(MIN_SLOTS) {
            return refuse(format!(
                "pd_buffer_size of {} bytes holds {slots} chunks of {slot_bytes} bytes; at least \
                 {MIN_SLOTS} are needed: set it to {} or more",
                self.buffer.bytes(),
                slot_bytes * u64::from(MIN_SLOTS)
            ));
        }
        Ok(Cut {
            layout: layout.clone(),
            slots: u32::try_from(slots).unwrap_or(u32::MAX),
            slot_bytes,
            epoch: Epoch(rand::random_range(1..=u64::MAX)),
        })
    }
}
