//! Simulation of the two engines' connectors.

use std::collections::{BTreeMap, BTreeSet};

use protocol::local::{
    Await, Computing, Ended, Granted, OfRequest, Ready, Release, Reserve, Staged,
};
use protocol::plan::Part;
use protocol::receiver;
use protocol::sender;
use protocol::{EngineId, Reason};

use super::kept::{Leg, prefill_id};
use super::model::Content;
use super::plan::RequestPlan;
use super::{Happening, MS, SECOND, World, target};

/// Simulated prefill engine.
pub(crate) struct PrefillEngine {
    pub(crate) id: EngineId,
    pub(crate) live: BTreeMap<String, Prefill>,
    pub(crate) pushed: usize,
    ended: usize,
    pub(crate) reserved: usize,
    lost: usize,
}

pub(crate) struct Prefill {
    plan: RequestPlan,
    computed: u32,
    upto: u32,
    /// Tokens that the decode side has, of the last grant.
    have: u32,
    granted: BTreeMap<u32, u32>,
    staged: BTreeSet<u32>,
    since: u64,
}

/// Step of the prefill engine.
#[derive(Debug)]
pub(crate) enum Step {
    Reserve(RequestPlan),
    Compute(String, EngineId),
    Stage(String, EngineId),
    Cancel(String, EngineId),
}

/// Simulated decode engine.
pub(crate) struct DecodeEngine {
    pub(crate) id: EngineId,
    live: BTreeMap<String, Decode>,
    pub(crate) plans: BTreeMap<String, RequestPlan>,
    pub(crate) delivered: usize,
    pub(crate) failed: Vec<Reason>,
    parked: usize,
    lost: usize,
}

struct Decode {
    plan: RequestPlan,
    reading: BTreeMap<u32, u32>,
    /// Content of each chunk that was shown.
    read: BTreeMap<u32, Content>,
    aborted: bool,
    since: u64,
    ended: bool,
}

/// Step of the decode engine.
#[derive(Debug)]
pub(crate) enum Turn {
    /// A kept request's decode request arrives.
    Queue(String, Leg),
    /// A decode request is aborted while it is queued.
    Dismiss(String, EngineId),
    Park(String),
    Read(String, EngineId, Vec<u32>),
    Abort(String, EngineId),
}

const DEADLINE: u64 = 40 * SECOND;
/// Maximum duration of a reservation: the stall timeout, and then the repetitions of the last
/// message.
const RESERVATION: u64 = 90 * SECOND;

impl PrefillEngine {
    pub(crate) fn new(id: EngineId) -> Self {
        Self {
            id,
            live: BTreeMap::new(),
            pushed: 0,
            ended: 0,
            reserved: 0,
            lost: 0,
        }
    }

    /// Forgets all reservations after the connection to the sidecar is lost, and connects again.
    pub(crate) fn sidecar_died(&mut self) {
        self.dies();
    }

    pub(crate) fn dies(&mut self) -> EngineId {
        let gone = self.id;
        self.lost += self.live.len();
        self.live.clear();
        self.id = EngineId(gone.0 + 2);
        gone
    }

    /// Returns an error text if a reservation has not ended exactly once.
    pub(crate) fn unended(&self) -> Option<String> {
        let all = self.live.is_empty() && self.ended + self.lost == self.reserved;
        let (ended, lost, reserved) = (self.ended, self.lost, self.reserved);
        (!all).then(|| format!("of {reserved} reservations {ended} ended, {lost} were lost"))
    }
}

impl DecodeEngine {
    pub(crate) fn new(id: EngineId) -> Self {
        Self {
            id,
            live: BTreeMap::new(),
            plans: BTreeMap::new(),
            delivered: 0,
            failed: Vec::new(),
            parked: 0,
            lost: 0,
        }
    }

    /// Returns the name of a request that waits for its KV.
    pub(crate) fn waits(&self) -> Option<String> {
        let waits = self.live.iter().find(|(_, r)| !r.ended);
        waits.map(|(name, _)| name.clone())
    }

    /// Returns true if the engine may begin a request with this id.
    pub(crate) fn is_free(&self, id: &str) -> bool {
        let live = self.live.get(id);
        live.is_none_or(|r| r.ended && r.reading.is_empty())
    }

    pub(crate) fn sidecar_died(&mut self) {
        self.dies();
    }

    pub(crate) fn dies(&mut self) -> EngineId {
        let gone = self.id;
        self.lost += self.live.values().filter(|r| !r.ended).count();
        self.live.clear();
        self.id = EngineId(gone.0 + 2);
        gone
    }

    /// Returns an error text if a parked request has not ended exactly once.
    pub(crate) fn unended(&self) -> Option<String> {
        let ended = self.delivered + self.failed.len();
        let (lost, parked) = (self.lost, self.parked);
        (ended + lost != parked)
            .then(|| format!("of {parked} parked requests {ended} ended, {lost} were lost"))
    }
}

impl World {
    pub(crate) fn tell_sender(&mut self, event: sender::Event) {
        self.after(20, Happening::ToSender(event, self.p_epoch));
    }

    pub(crate) fn tell_receiver(&mut self, event: receiver::Event) {
        self.after(20, Happening::ToReceiver(event, self.d_epoch));
    }

    pub(crate) fn prefill_step(&mut self, step: Step) {
        let engine = self.prefill.id;
        match step {
            Step::Reserve(plan) => self.reserve(plan),
            Step::Compute(name, id) if id == engine => self.compute(&name),
            Step::Stage(name, id) if id == engine => self.stage(&name),
            Step::Cancel(name, id) if id == engine && self.prefill.live.contains_key(&name) => {
                let req = OfRequest {
                    req: name.as_str().into(),
                };
                self.tell_sender(sender::Event::Cancel(engine, req));
            }
            _ => {}
        }
    }

    fn reserve(&mut self, plan: RequestPlan) {
        let (engine, name) = (self.prefill.id, prefill_id(&plan));
        if self.prefill.live.contains_key(&name) {
            return;
        }
        let upto = plan.step.min(plan.tokens);
        if plan.kept {
            self.keep_step(&plan, upto);
        } else {
            let reserve = Reserve {
                req: name.as_str().into(),
                to: target(),
                keys: self.keys(&plan),
                tokens: plan.tokens,
                upto,
                overlap: plan.overlap,
                ..Reserve::example()
            };
            self.tell_sender(sender::Event::Reserve(engine, reserve));
            self.prefill.reserved += 1;
            if let Some(ms) = plan.cancel_after_ms {
                let step = Step::Cancel(name.clone(), engine);
                self.after(u64::from(ms) * MS, Happening::Prefill(step));
            }
        }
        let prefill = Prefill {
            plan,
            computed: 0,
            upto,
            have: 0,
            granted: BTreeMap::new(),
            staged: BTreeSet::new(),
            since: self.now,
        };
        self.prefill.live.insert(name.clone(), prefill);
        let took = self.jitter(MS, 30 * MS);
        self.after(took, Happening::Prefill(Step::Compute(name, engine)));
    }

    /// Ends a step of the engine and begins the next step.
    fn compute(&mut self, name: &str) {
        let engine = self.prefill.id;
        let Some(request) = self.prefill.live.get_mut(name) else {
            return;
        };
        request.computed = request.upto;
        let answered = request.plan.kept && request.computed == request.plan.tokens;
        let answered = answered.then(|| request.plan.clone());
        if request.computed < request.plan.tokens {
            request.upto = (request.upto + request.plan.step).min(request.plan.tokens);
            let computing = Computing {
                req: name.into(),
                upto: request.upto,
                ..Computing::example()
            };
            self.tell_sender(sender::Event::Computing(engine, computing));
            let took = self.jitter(MS, 30 * MS);
            self.after(
                took,
                Happening::Prefill(Step::Compute(name.to_owned(), engine)),
            );
        }
        if let Some(plan) = answered {
            self.answer(&plan);
        }
        self.stage(name);
    }

    /// Gathers the chunks that are computed and that have a send slot.
    fn stage(&mut self, name: &str) {
        let engine = self.prefill.id;
        let Some(request) = self.prefill.live.get_mut(name) else {
            return;
        };
        let mut staged = Staged {
            req: name.into(),
            chunks: Vec::new(),
            gather_us: 10,
            event: None,
            layers: Vec::new(),
            ..Staged::example()
        };
        let plan = self.chunking.plan(request.plan.tokens, request.have);
        for (&chunk, &slot) in &request.granted {
            if plan.needs(chunk) <= request.computed && request.staged.insert(chunk) {
                staged.chunks.push(chunk);
                let content = (request.plan.name.clone(), plan.parts(chunk));
                self.wire.send[slot as usize] = Some(content);
            }
        }
        if !staged.chunks.is_empty() {
            self.tell_sender(sender::Event::Staged(engine, staged));
        }
    }

    pub(crate) fn prefill_granted(&mut self, engine: EngineId, granted: Granted) {
        if engine != self.prefill.id {
            return;
        }
        let name = granted.req.0;
        let Some(request) = self.prefill.live.get_mut(&name) else {
            self.fail("slots granted to a request that has ended");
        };
        request.have = granted.have_tokens;
        for (&chunk, &slot) in granted.chunks.iter().zip(&granted.slots) {
            if request.granted.insert(chunk, slot).is_some() {
                self.fail("a chunk is granted twice");
            }
        }
        self.after(20, Happening::Prefill(Step::Stage(name, engine)));
    }

    pub(crate) fn prefill_ended(&mut self, engine: EngineId, ended: &Ended) {
        if engine != self.prefill.id {
            return;
        }
        let Some(request) = self.prefill.live.remove(&ended.req.0) else {
            self.fail("a reservation ended twice");
        };
        let plan = self.chunking.plan(request.plan.tokens, request.have);
        let bytes: u64 = request.staged.iter().map(|c| plan.size(*c)).sum();
        if ended.reason.is_none() && ended.bytes != bytes {
            self.fail(&format!("{ended:?} after {bytes} bytes were pushed"));
        }
        self.prefill.ended += 1;
        self.prefill.pushed += usize::from(ended.reason.is_none());
        if self.now - request.since > RESERVATION {
            self.fail("a reservation ended late");
        }
    }

    pub(crate) fn decode_turn(&mut self, turn: Turn) {
        let engine = self.decode.id;
        match turn {
            Turn::Queue(name, leg) => self.queue(name, leg),
            Turn::Dismiss(name, id) if id == engine => self.dismiss(&name),
            Turn::Park(name) => self.park(&name),
            Turn::Read(name, id, chunks) if id == engine => self.read(&name, chunks),
            Turn::Abort(name, id) if id == engine => self.abort(&name),
            Turn::Read(..) | Turn::Abort(..) | Turn::Dismiss(..) => {}
        }
    }

    fn park(&mut self, name: &str) {
        let engine = self.decode.id;
        let before = self.decode.live.get(name);
        if before.is_some_and(|r| !r.ended || !r.reading.is_empty()) {
            return;
        }
        // The proxy sends only one decode request for each request.
        let plan = self
            .unqueue(name)
            .or_else(|| self.decode.plans.remove(name));
        let Some(plan) = plan else {
            return;
        };
        let parked = Await {
            req: name.into(),
            keys: self.keys(&plan),
            tokens: plan.tokens,
            have_tokens: plan.have_tokens(),
            deadline_ms: u32::try_from(DEADLINE / MS).unwrap_or(u32::MAX),
            written: false,
            ..Await::example()
        };
        self.tell_receiver(receiver::Event::Await(engine, parked));
        self.decode.parked += 1;
        if let Some(ms) = plan.abort_after_ms {
            let turn = Turn::Abort(name.to_owned(), engine);
            self.after(u64::from(ms) * MS, Happening::Decode(turn));
        }
        let decode = Decode {
            plan,
            reading: BTreeMap::new(),
            read: BTreeMap::new(),
            aborted: false,
            since: self.now,
            ended: false,
        };
        self.decode.live.insert(name.to_owned(), decode);
    }

    pub(crate) fn decode_ready(&mut self, engine: EngineId, ready: &Ready) {
        if engine != self.decode.id {
            return;
        }
        let name = ready.req.0.clone();
        let Some(request) = self.decode.live.get(&name) else {
            self.fail("chunks of a request that is not parked");
        };
        if request.ended {
            self.fail("chunks of a request that has ended");
        }
        if request.aborted {
            return; // the abort is in flight
        }
        let plan = request.plan.clone();
        for (&chunk, &slot) in ready.chunks.iter().zip(&ready.slots) {
            let expected = self.content(&plan, ready.first_token, chunk);
            let found = self.wire.land[slot as usize].as_ref();
            if found != Some(&expected) {
                self.fail(&format!("slot {slot} holds {found:?}, not {expected:?}"));
            }
            let Some(request) = self.decode.live.get_mut(&name) else {
                return;
            };
            request.reading.insert(chunk, slot);
            if request.read.insert(chunk, expected).is_some() {
                self.fail("a chunk is shown twice");
            }
            self.wire.reading.insert(slot);
        }
        let took = self.jitter(100, 10 * MS);
        let turn = Turn::Read(name, engine, ready.chunks.clone());
        self.after(took, Happening::Decode(turn));
    }

    /// Ends the scatter of chunks and releases them.
    fn read(&mut self, name: &str, chunks: Vec<u32>) {
        let engine = self.decode.id;
        let Some(request) = self.decode.live.get_mut(name) else {
            return;
        };
        if request.aborted {
            return;
        }
        // Chunks of an earlier request with this id have been released already.
        let chunks: Vec<u32> = chunks
            .into_iter()
            .filter(|chunk| request.reading.contains_key(chunk))
            .collect();
        for chunk in &chunks {
            if let Some(slot) = request.reading.remove(chunk) {
                self.wire.reading.remove(&slot);
                if self.wire.land[slot as usize].as_ref() != request.read.get(chunk) {
                    self.fail(&format!("slot {slot} changed while it was read"));
                }
            }
        }
        let release = Release {
            req: name.into(),
            chunks,
            scatter_us: 10,
            ..Release::example()
        };
        self.tell_receiver(receiver::Event::Release(engine, release));
    }

    fn abort(&mut self, name: &str) {
        let engine = self.decode.id;
        let Some(request) = self.decode.live.get_mut(name) else {
            return;
        };
        if request.ended && request.reading.is_empty() {
            return;
        }
        request.aborted = true;
        for slot in std::mem::take(&mut request.reading).into_values() {
            self.wire.reading.remove(&slot);
        }
        let req = OfRequest { req: name.into() };
        self.tell_receiver(receiver::Event::Abort(engine, req));
    }

    pub(crate) fn decode_ended(&mut self, engine: EngineId, ended: &Ended) {
        if engine != self.decode.id {
            return;
        }
        if self.legs.dismissed.remove(&ended.req.0) {
            return;
        }
        let Some(request) = self.decode.live.get_mut(&ended.req.0) else {
            self.fail("a request ended that is not parked");
        };
        if request.ended && !request.aborted {
            self.fail("a parked request ended twice");
        }
        if request.ended {
            return; // the answer to an abort that the engine sent before it got the end
        }
        request.ended = true;
        let late = self.now - request.since > DEADLINE + SECOND;
        let reading = !request.reading.is_empty();
        let (plan, read) = (request.plan.clone(), request.read.values());
        let read: Vec<Part> = read.flat_map(|(_, parts)| parts.clone()).collect();
        let missing = self.missing(&plan, &read);
        match ended.reason {
            None if reading || missing.is_some() => {
                self.fail(&format!("a request ended well without {missing:?}"));
            }
            None => self.decode.delivered += 1,
            Some(reason) => self.decode.failed.push(reason),
        }
        if late {
            self.fail("a parked request ended late");
        }
    }
}
