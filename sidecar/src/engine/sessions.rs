//! The engine connections of one role of one rank, and the slot layout that these engines share.

use std::collections::BTreeMap;
use std::sync::Arc;

use protocol::local::{CudaMemory, EngineHello, Keeper, Refused, ToEngine, Welcome};
use protocol::plan::Chunking;
use protocol::{EngineId, Epoch, Layout, Reason, VERSION};
use serde_bytes::ByteBuf;
use tracing::{info, warn};

use crate::config::Config;
use crate::engine::socket::Connection;
use crate::memory::Buffer;
use crate::memory::cuda::{self, Event};

/// The connected engines, and the buffer's slot layout, which is computed from the shape of the engines'
/// chunks.
#[derive(Debug)]
pub(crate) struct Engines {
    buffer: Arc<Buffer>,
    /// Name of the sidecar, for the welcome messages.
    id: String,
    /// Tokens of a chunk as configured; absent if the engine decides.
    chunk_tokens: Option<u32>,
    /// Tokens that must fit into the buffer at the same time.
    max_prefill_tokens: u32,
    /// Address at which decode sides fetch kept KV; absent if the engines keep none.
    fetch: Option<Keeper>,
    connections: BTreeMap<EngineId, Greeted>,
    slot_layout: Option<SlotLayout>,
}

/// An engine that was welcomed.
#[derive(Debug)]
struct Greeted {
    connection: Connection,
    /// CUDA events by which the engine reports that slots are filled.
    events: Vec<Arc<Event>>,
    /// The reason why the engine moves no KV; empty if it moves KV.
    unmoved: String,
}

/// The division of the buffer into slots, for one layout of KV.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SlotLayout {
    /// The shape of a chunk.
    pub(crate) layout: Layout,
    /// Number of slots.
    pub(crate) slots: u32,
    /// Bytes of a slot.
    pub(crate) slot_bytes: u64,
    /// Random number that is new for each slot layout.
    pub(crate) epoch: Epoch,
}

/// The buffer and the settings that a slot layout must fit.
#[derive(Debug)]
struct Limits {
    buffer_bytes: u64,
    /// Tokens of a chunk as configured; absent if the engine decides.
    chunk_tokens: Option<u32>,
    /// Tokens that must fit into the buffer at the same time.
    max_prefill_tokens: u32,
}

/// Smallest number of slots: the engine reads one slot while the sender writes another.
const MIN_SLOTS: u32 = 2;

/// [`Welcome::memory`] for an engine that moves no KV.
const NO_MEMORY: &str = "none";

/// Largest number of CUDA events of one engine. A prefill engine needs one event for each gather in flight.
const MAX_EVENTS: usize = 1024;

impl Engines {
    pub(crate) fn new(
        id: String,
        buffer: Arc<Buffer>,
        config: &Config,
        fetch: Option<Keeper>,
    ) -> Self {
        Self {
            buffer,
            id,
            chunk_tokens: config.chunk_tokens,
            max_prefill_tokens: config.max_prefill_tokens,
            fetch,
            connections: BTreeMap::new(),
            slot_layout: None,
        }
    }

    /// Returns the slot layout; absent until the first hello of an engine that moves KV.
    pub(crate) fn slot_layout(&self) -> Option<&SlotLayout> {
        self.slot_layout.as_ref()
    }

    /// Returns the number of connected engines.
    pub(crate) fn connected(&self) -> usize {
        self.connections.len()
    }

    /// Returns the reason why no connected engine moves KV; absent if at least one engine moves KV, or if no
    /// engine is connected. If at least one engine moves KV, the others are ignored, because an engine that
    /// moves no KV may have been started with the wrong socket.
    pub(crate) fn unmoved(&self) -> Option<&str> {
        let mut unmoved = self.connections.values().map(|e| e.unmoved.as_str());
        let first = unmoved.next().filter(|why| !why.is_empty())?;
        unmoved.all(|why| !why.is_empty()).then_some(first)
    }

    /// Answers a hello. Returns the slot layout if it is new: every slot is then free and the epoch is new.
    /// `busy` means that slots are still held or quarantined; then the slot layout cannot change.
    ///
    /// # Errors
    /// The reason why the engine was refused.
    pub(crate) fn hello(
        &mut self,
        connection: Connection,
        hello: &EngineHello,
        busy: bool,
    ) -> Result<Option<SlotLayout>, Reason> {
        // An engine that moves no KV has no layout to check.
        if !hello.unmoved.is_empty() && hello.v == VERSION {
            self.take_unmoved(connection, hello);
            return Ok(None);
        }
        // The engine must not get the buffer before its version, layout and GPU are checked.
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
            fetch: self.fetch.clone(),
        };
        // The engine needs the buffer before any message about slots, so the welcome goes first.
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

    /// Welcomes an engine that moves no KV, without a buffer. The connection keeps the sidecar ready, so that
    /// the proxy still uses the engine, which computes every prompt itself.
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
            fetch: None,
        }));
        let greeted = Greeted {
            unmoved: hello.unmoved.clone(),
            connection,
            events: Vec::new(),
        };
        self.connections.insert(greeted.connection.id(), greeted);
    }

    /// Sends a message to an engine, if the engine is still connected.
    pub(crate) fn send(&self, engine: EngineId, message: ToEngine) {
        if let Some(greeted) = self.connections.get(&engine) {
            greeted.connection.send(message);
        }
    }

    /// Removes an ended connection, so that no write waits for the engine's events any more.
    pub(crate) fn gone(&mut self, engine: EngineId) {
        if let Some(greeted) = self.connections.remove(&engine) {
            greeted.events.iter().for_each(|event| event.orphan());
        }
    }

    /// Returns an event of an engine; absent if the engine has disconnected or has no such event.
    pub(crate) fn event(&self, engine: EngineId, event: u32) -> Option<Arc<Event>> {
        let events = &self.connections.get(&engine)?.events;
        events.get(usize::try_from(event).ok()?).map(Arc::clone)
    }

    /// Opens the engine's events, and checks that the engine runs on the GPU of the buffer.
    fn events(&self, hello: &EngineHello) -> Result<Vec<Arc<Event>>, Refused> {
        let refuse = |text| {
            let reason = Reason::BadRequest;
            Err(Refused { reason, text })
        };
        let Some(memory) = self.buffer.cuda() else {
            // With host memory the engine reports a slot only after the copy into the slot has ended, so the
            // engine needs no event.
            return Ok(Vec::new());
        };
        let ours = memory.device().uuid();
        let Some(theirs) = &hello.device else {
            return refuse(format!(
                "the buffer of rank {} is on {ours}, and the engine names no GPU: run the engine \
                 on that GPU, or set pd_buffer_device to cpu",
                hello.rank
            ));
        };
        if theirs.parse() != Ok(ours) {
            return refuse(format!(
                "rank {} of the engine runs on {theirs}, but the buffer of this rank is on {ours}: set \
                 pd_buffer_device to the engine's GPU",
                hello.rank
            ));
        }
        if hello.events.len() > MAX_EVENTS {
            let count = hello.events.len();
            return refuse(format!(
                "the hello has {count} events, more than {MAX_EVENTS}"
            ));
        }
        let open = |bytes: &ByteBuf| {
            let handle = cuda::Handle::try_from(&bytes[..])
                .map_err(|_| format!("the handle of an event has {} bytes", bytes.len()))?;
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
                        "{field} is {theirs} for this engine, but {ours} for the engine that uses this buffer already: \
                         one sidecar serves one model"
                    ),
                );
            }
        }
        let limits = Limits {
            buffer_bytes: self.buffer.bytes(),
            chunk_tokens: self.chunk_tokens,
            max_prefill_tokens: self.max_prefill_tokens,
        };
        SlotLayout::of(&hello.layout, &limits).map(|slot_layout| (slot_layout, true))
    }
}

impl SlotLayout {
    /// Divides the buffer into slots of the size of a chunk.
    fn of(layout: &Layout, limits: &Limits) -> Result<Self, Refused> {
        let refuse = |text| {
            Err(Refused {
                reason: Reason::LayoutMismatch,
                text,
            })
        };
        if let Some(configured) = limits.chunk_tokens
            && configured != layout.chunk_tokens
        {
            return refuse(format!(
                "chunk_size is {configured} in the sidecar's configuration and {} in the \
                 connector's: set them equal",
                layout.chunk_tokens
            ));
        }
        if let Err(fault) = layout.check() {
            return refuse(format!(
                "the layout of the engine's KV is malformed: {fault}"
            ));
        }
        let Some(slot_bytes) = layout.chunk_bytes().filter(|&bytes| bytes > 0) else {
            return refuse(format!(
                "a chunk of this layout has 0 bytes or too many: {layout:?}"
            ));
        };
        let slots = limits.buffer_bytes / slot_bytes;
        if slots < u64::from(MIN_SLOTS) {
            return refuse(format!(
                "pd_buffer_size of {} bytes holds {slots} chunks of {slot_bytes} bytes; at least \
                 {MIN_SLOTS} are needed: set it to {} or more",
                limits.buffer_bytes,
                slot_bytes * u64::from(MIN_SLOTS)
            ));
        }
        // A state takes slots of its own, and even the shortest prompt has a state.
        let longest = limits.max_prefill_tokens.max(1);
        let needed = Chunking::of(layout).plan(longest, 0).wanted() as u64;
        if slots < needed {
            let room = slots * u64::from(layout.chunk_tokens);
            return refuse(format!(
                "pd_buffer_size of {} bytes holds {slots} chunks ({room} tokens), and a prompt of {longest} tokens \
                 (pd_max_prefill_len) needs {needed}: set the buffer to {} bytes or more",
                limits.buffer_bytes,
                slot_bytes.saturating_mul(needed)
            ));
        }
        Ok(Self {
            layout: layout.clone(),
            slots: u32::try_from(slots).unwrap_or(u32::MAX),
            slot_bytes,
            epoch: Epoch(rand::random_range(1..=u64::MAX)),
        })
    }
}

#[cfg(test)]
mod tests;
