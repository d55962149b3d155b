//! The engine connections of one side of one rank, and the layout that they agree on.

use std::collections::BTreeMap;
use std::sync::Arc;

use protocol::local::{CudaMemory, EngineHello, Refused, ToEngine, Welcome};
use protocol::{EngineId, Epoch, Layout, Reason, VERSION};
use serde_bytes::ByteBuf;
use tracing::{info, warn};

use crate::config::Config;
use crate::engine::socket::Connection;
use crate::memory::Buffer;
use crate::memory::cuda::{self, Event};

/// Engines, and the slot layout that their chunks give the buffer.
#[derive(Debug)]
pub(crate) struct Engines {
    buffer: Arc<Buffer>,
    /// The sidecar's name, for welcomes.
    id: String,
    /// As configured; absent if the engine decides.
    chunk_tokens: Option<u32>,
    /// Tokens for which the buffer has to have room at once.
    max_prefill_tokens: u32,
    connections: BTreeMap<EngineId, Greeted>,
    slot_layout: Option<SlotLayout>,
}

/// An engine that was welcomed.
#[derive(Debug)]
struct Greeted {
    connection: Connection,
    /// By which it says when slots are filled.
    events: Vec<Arc<Event>>,
    /// Why it moves no KV; empty if it does.
    unmoved: String,
}

/// The division of the buffer into slots, for one layout of KV.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SlotLayout {
    /// The shape of a chunk.
    pub(crate) layout: Layout,
    /// Slots.
    pub(crate) slots: u32,
    /// Bytes of a slot.
    pub(crate) slot_bytes: u64,
    /// New with each slot layout.
    pub(crate) epoch: Epoch,
}

/// A sliding window needs one slot that is written while another is read.
const MIN_SLOTS: u32 = 2;

/// [`Welcome::memory`] for an engine that moves no KV.
const NO_MEMORY: &str = "none";

/// A prefill engine needs one for each gather that may be under way.
const MAX_EVENTS: usize = 1024;

impl Engines {
    pub(crate) fn new(id: String, buffer: Arc<Buffer>, config: &Config) -> Self {
        Self {
            buffer,
            id,
            chunk_tokens: config.chunk_tokens,
            max_prefill_tokens: config.max_prefill_tokens,
            connections: BTreeMap::new(),
            slot_layout: None,
        }
    }

    /// Returns the slot layout; absent until an engine has said hello.
    pub(crate) fn slot_layout(&self) -> Option<&SlotLayout> {
        self.slot_layout.as_ref()
    }

    /// Engines connected now.
    pub(crate) fn connected(&self) -> usize {
        self.connections.len()
    }

    /// The reason for which the connected engine moves no KV. One that does not fit, beside one that moves KV, stops
    /// nobody: it may have been started at the wrong socket.
    pub(crate) fn unmoved(&self) -> Option<&str> {
        let mut unmoved = self.connections.values().map(|e| e.unmoved.as_str());
        let first = unmoved.next().filter(|why| !why.is_empty())?;
        unmoved.all(|why| !why.is_empty()).then_some(first)
    }

    /// Answers a hello. Returns the slot layout if it is new: every slot is then free and the epoch new.
    /// `busy`: slots are still held or quarantined, so the slot layout cannot change.
    ///
    /// # Errors
    /// Why the engine was refused.
    pub(crate) fn hello(
        &mut self,
        connection: Connection,
        hello: &EngineHello,
        busy: bool,
    ) -> Result<Option<SlotLayout>, Reason> {
        if !hello.unmoved.is_empty() && hello.v == VERSION {
            self.take_unmoved(connection, hello);
            return Ok(None);
        }
        let admitted = self
            .admit(hello, busy)
            .and_then(|admitted| Ok((admitted, self.events(hello)?)));
        let ((slot_layout, fresh), events) = match admitted {
            Ok(admitted) => admitted,
            Err(refused) => {
                warn!(
                    engine = hello.engine,
                    reason = %refused.reason,
                    "engine refused: {}",
                    refused.text
                );
                let reason = refused.reason;
                connection.refuse(ToEngine::Refused(refused));
                return Err(reason);
            }
        };
        info!(
            engine = hello.engine,
            connection = %connection.id(),
            role = ?hello.role,
            rank = hello.rank,
            slots = slot_layout.slots,
            slot_bytes = slot_layout.slot_bytes,
            device = hello.device,
            events = events.len(),
            "engine connected"
        );
        let welcome = Welcome {
            v: VERSION,
            id: self.id.clone(),
            epoch: slot_layout.epoch,
            memory: self.buffer.export().as_str().to_owned(),
            cuda: self.buffer.cuda().map(|memory| CudaMemory {
                uuid: memory.device().uuid().to_string(),
                handle: ByteBuf::from(*memory.handle()),
                bytes: memory.bytes(),
            }),
            slots: slot_layout.slots,
            slot_bytes: slot_layout.slot_bytes,
            connection: connection.id().0,
        };
        connection.welcome(ToEngine::Welcome(welcome), Arc::clone(&self.buffer));
        let id = connection.id();
        let greeted = Greeted {
            connection,
            events,
            unmoved: String::new(),
        };
        self.connections.insert(id, greeted);
        self.slot_layout = Some(slot_layout.clone());
        Ok(fresh.then_some(slot_layout))
    }

    /// Welcomes an engine that computes every prompt itself, without a buffer: it keeps the sidecar ready,
    /// so that the proxy goes on using the engine.
    fn take_unmoved(&mut self, connection: Connection, hello: &EngineHello) {
        warn!(
            engine = hello.engine,
            connection = %connection.id(),
            role = ?hello.role,
            rank = hello.rank,
            "the engine moves no KV and computes every prompt itself: {}",
            hello.unmoved
        );
        connection.send(ToEngine::Welcome(Welcome {
            v: VERSION,
            id: self.id.clone(),
            epoch: Epoch(0),
            memory: NO_MEMORY.to_owned(),
            cuda: None,
            slots: 0,
            slot_bytes: 0,
            connection: connection.id().0,
        }));
        let greeted = Greeted {
            unmoved: hello.unmoved.clone(),
            connection,
            events: Vec::new(),
        };
        self.connections.insert(greeted.connection.id(), greeted);
    }

    /// Sends to an engine, if it is still there.
    pub(crate) fn send(&self, engine: EngineId, message: ToEngine) {
        if let Some(greeted) = self.connections.get(&engine) {
            greeted.connection.send(message);
        }
    }

    /// Notes the end of a connection. Nobody waits for its events any more.
    pub(crate) fn gone(&mut self, engine: EngineId) {
        if let Some(greeted) = self.connections.remove(&engine) {
            greeted.events.iter().for_each(|event| event.orphan());
        }
    }

    /// An event of an engine that is still there.
    pub(crate) fn event(&self, engine: EngineId, event: u32) -> Option<Arc<Event>> {
        let events = &self.connections.get(&engine)?.events;
        events.get(usize::try_from(event).ok()?).map(Arc::clone)
    }

    /// Opens the engine's events, and checks that it is on the buffer's GPU.
    fn events(&self, hello: &EngineHello) -> Result<Vec<Arc<Event>>, Refused> {
        let refuse = |text| {
            let reason = Reason::BadRequest;
            Err(Refused { reason, text })
        };
        let Some(memory) = self.buffer.cuda() else {
            // Host memory: whoever fills it waits until it stands there.
            return Ok(Vec::new());
        };
        let ours = memory.device().uuid();
        let Some(theirs) = &hello.device else {
            return refuse(format!(
                "the buffer of rank {} is on {ours}, and the engine names no GPU: run it there, or \
                 set pd_buffer_device to cpu",
                hello.rank
            ));
        };
        if theirs.parse() != Ok(ours) {
            return refuse(format!(
                "the engine's rank {} runs on {theirs}, its buffer is on {ours}: set \
                 pd_buffer_device to the engine's GPU",
                hello.rank
            ));
        }
        if hello.events.len() > MAX_EVENTS {
            let count = hello.events.len();
            return refuse(format!("{count} events; at most {MAX_EVENTS} are taken"));
        }
        let open = |bytes: &ByteBuf| {
            let handle = cuda::Handle::try_from(&bytes[..])
                .map_err(|_| format!("an event's handle has {} bytes", bytes.len()))?;
            let event = Event::open(memory.device(), &handle).map_err(|e| e.to_string())?;
            Ok(Arc::new(event))
        };
        hello
            .events
            .iter()
            .map(open)
            .collect::<Result<_, String>>()
            .or_else(refuse)
    }

    fn admit(&self, hello: &EngineHello, busy: bool) -> Result<(SlotLayout, bool), Refused> {
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
        if let Some(slot_layout) = &self.slot_layout {
            let Some((field, ours, theirs)) = slot_layout.layout.difference(&hello.layout) else {
                return Ok((slot_layout.clone(), false));
            };
            let is_used = self.connections.values().any(|e| e.unmoved.is_empty());
            if is_used || busy {
                return refuse(
                    Reason::LayoutMismatch,
                    format!(
                        "{field} is {theirs} here but {ours} for the engine that uses this buffer: \
                         one sidecar serves one model"
                    ),
                );
            }
        }
        self.slot_layout_for(&hello.layout)
            .map(|slot_layout| (slot_layout, true))
    }

    fn slot_layout_for(&self, layout: &Layout) -> Result<SlotLayout, Refused> {
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
        let room = slots * u64::from(layout.chunk_tokens);
        if room < u64::from(self.max_prefill_tokens) {
            return refuse(format!(
                "pd_buffer_size of {} bytes holds {room} tokens and pd_max_prefill_len asks for {}: \
                 set the buffer to {} bytes or more",
                self.buffer.bytes(),
                self.max_prefill_tokens,
                slot_bytes * u64::from(self.max_prefill_tokens.div_ceil(layout.chunk_tokens))
            ));
        }
        Ok(SlotLayout {
            layout: layout.clone(),
            slots: u32::try_from(slots).unwrap_or(u32::MAX),
            slot_bytes,
            epoch: Epoch(rand::random_range(1..=u64::MAX)),
        })
    }
}
