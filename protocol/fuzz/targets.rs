//! The functions of all fuzz targets. The fuzz targets include this file, and so does the ordinary test that runs the
//! corpora.
#![allow(dead_code)]

use std::fmt::Debug;

use protocol::codec::{self, Message};
use protocol::keep::{ToFetcher, ToKeeper};
use protocol::keys::Key;
use protocol::local::{ToEngine, ToSidecar};
use protocol::message::{CancelNotif, Init, Query, ToReceiver, ToSender};
use protocol::receiver::{self, Receiver, Route, SenderId};
use protocol::registration::{FromProxy, ToProxy};
use protocol::sender::{self, Sender};
use protocol::{EngineId, Epoch, Layout, LeaseId, Time, TransferId, dlist, metadata};
use serde::Serialize;

/// Decodes messages of the init port, in both directions.
pub(crate) fn init(data: &[u8]) {
    round_trip::<Init>(data);
}

/// Decodes messages of the alloc port, in both directions.
pub(crate) fn alloc(data: &[u8]) {
    round_trip::<ToReceiver>(data);
    round_trip::<ToSender>(data);
}

/// Decodes messages of the registration, query and fetch ports, in both directions.
pub(crate) fn registration(data: &[u8]) {
    round_trip::<Query>(data);
    round_trip::<ToKeeper>(data);
    round_trip::<ToFetcher>(data);
    round_trip::<ToProxy>(data);
    round_trip::<FromProxy>(data);
}

/// Decodes messages of the local socket, in both directions.
pub(crate) fn local(data: &[u8]) {
    round_trip::<ToSidecar>(data);
    round_trip::<ToEngine>(data);
}

/// Checks that accepted bytes are complete msgpack, and that the message stays the same when it is encoded
/// and decoded again.
fn round_trip<T: Message + Serialize + PartialEq + Debug>(data: &[u8]) {
    let Ok(message) = codec::decode::<T>(data) else {
        return;
    };
    let mut rest = data;
    assert!(rmpv::decode::read_value(&mut rest).is_ok() && rest.is_empty());
    let again = codec::encode(&message);
    assert_eq!(codec::decode::<T>(&again).as_ref(), Ok(&message));
}

/// Checks that an accepted list stays the same when it is built and parsed again, and that it has
/// no more rows than the input has bytes.
pub(crate) fn dlist(data: &[u8]) {
    if let Ok((memory, rows)) = dlist::parse(data) {
        assert!(rows.len() * 24 <= data.len());
        let again = dlist::build(&rows, memory);
        assert_eq!(dlist::parse(&again), Ok((memory, rows)));
    }
}

/// Checks that the agent's name is a part of the metadata blob.
pub(crate) fn metadata(data: &[u8]) {
    if let Some(name) = metadata::agent_name(data) {
        assert!(data.windows(name.len()).any(|w| w == name));
    }
}

/// Checks that an accepted key stays the same when it is written and parsed again.
pub(crate) fn keys(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(key) = Key::parse(text) {
        let again = key.to_string();
        assert_eq!(Key::parse(&again), Ok(key));
    }
}

/// Passes length-prefixed messages to both state machines. No message may lose a slot or cause a panic.
pub(crate) fn machines(mut data: &[u8]) {
    let mut pair = Pair::new();
    while let Some((&[kind, low, high], rest)) = data.split_first_chunk() {
        let len = usize::from(u16::from_le_bytes([low, high]));
        let (body, rest) = rest.split_at(len.min(rest.len()));
        data = rest;
        pair.step(kind, body);
        pair.settle();
    }
}

/// Both state machines. The pair keeps the ids of the last lease and of the writes, because random
/// messages would never contain a valid id.
struct Pair {
    p: Sender,
    d: Receiver,
    now: Time,
    lease: LeaseId,
    writes: Vec<TransferId>,
}

impl Pair {
    fn step(&mut self, kind: u8, body: &[u8]) {
        self.now = Time(self.now.0 + 10_000 * u64::from(kind >> 3));
        let (now, engine, route) = (self.now, EngineId(1), Route(1));
        match kind & 7 {
            0 => {
                if let Ok(message) = codec::decode(body) {
                    let message = self.under_lease(message);
                    let lmcache = SenderId {
                        id: "10.0.0.1/1".into(),
                        epoch: Epoch(0),
                    };
                    let introduced = receiver::Event::Introduced {
                        route,
                        sender: lmcache,
                        linked: kind & 8 == 0,
                    };
                    self.d.handle(now, introduced);
                    self.d.handle(now, receiver::Event::Peer { route, message });
                }
            }
            1 => {
                if let Ok(message) = codec::decode(body) {
                    let to = target();
                    self.p.handle(now, sender::Event::Peer { to, message });
                }
            }
            2 => self.engine_says(body),
            3 => self.p.handle(
                now,
                sender::Event::Linked {
                    to: target(),
                    epoch: EPOCH,
                    v: u32::from(body.first().is_none_or(|b| b & 1 == 0)),
                    slots: SLOTS,
                    transport: "tcp".into(),
                    cancels: body.first().is_some_and(|b| b & 2 == 0),
                },
            ),
            4 => self.d.handle(now, receiver::Event::PeerLost { route }),
            5 => {
                self.d.handle(now, receiver::Event::EngineGone(engine));
                self.p.handle(now, sender::Event::EngineGone(engine));
            }
            6 => {
                for transfer in std::mem::take(&mut self.writes) {
                    let sums = Vec::new();
                    self.p.handle(
                        now,
                        sender::Event::Done {
                            transfer,
                            sums,
                            began: None,
                        },
                    );
                }
            }
            _ => {
                self.p.handle(now, sender::Event::Deadline);
                self.d.handle(now, receiver::Event::Deadline);
            }
        }
    }

    fn engine_says(&mut self, body: &[u8]) {
        let (now, engine) = (self.now, EngineId(1));
        let event = match codec::decode(body) {
            Ok(ToSidecar::Reserve(m)) => sender::Event::Reserve(engine, m),
            Ok(ToSidecar::Keep(m)) => sender::Event::Keep(engine, m),
            Ok(ToSidecar::Computing(m)) => sender::Event::Computing(engine, m),
            Ok(ToSidecar::Staged(m)) => sender::Event::Staged(engine, m),
            Ok(ToSidecar::Cancel(m)) => sender::Event::Cancel(engine, m),
            Ok(ToSidecar::Expect(m)) => {
                return self.d.handle(now, receiver::Event::Expect(engine, m));
            }
            Ok(ToSidecar::Await(m)) => {
                return self.d.handle(now, receiver::Event::Await(engine, m));
            }
            Ok(ToSidecar::Release(m)) => {
                return self.d.handle(now, receiver::Event::Release(engine, m));
            }
            Ok(ToSidecar::Abort(m)) => {
                return self.d.handle(now, receiver::Event::Abort(engine, m));
            }
            Ok(ToSidecar::Hello(_) | ToSidecar::Drain(_)) | Err(_) => return,
        };
        self.p.handle(now, event);
    }

    /// Replaces a lease of 0 by the last lease that was granted.
    fn under_lease(&self, mut message: ToReceiver) -> ToReceiver {
        let lease = match &mut message {
            ToReceiver::Writing(m) => &mut m.lease,
            ToReceiver::Written(m) => &mut m.lease,
            ToReceiver::Extend(m) => &mut m.lease,
            ToReceiver::CancelNotif(CancelNotif { x: Some(x), .. }) => &mut x.lease,
            ToReceiver::CancelNotif(_) | ToReceiver::AllocRequest(_) => return message,
        };
        if *lease == LeaseId(0) {
            *lease = self.lease;
        }
        message
    }

    /// Exchanges the messages of both state machines until neither has an action left.
    fn settle(&mut self) {
        let now = self.now;
        loop {
            if let Some(action) = self.p.poll_action() {
                match action {
                    sender::Action::Send { message, .. } => {
                        let route = Route(1);
                        self.d.handle(now, receiver::Event::Peer { route, message });
                    }
                    sender::Action::Answer { message, .. } => {
                        let from = keeper();
                        self.d
                            .handle(now, receiver::Event::Keeper { from, message });
                    }
                    sender::Action::Write { transfer, .. } => self.writes.push(transfer),
                    _ => {}
                }
            } else if let Some(action) = self.d.poll_action() {
                match action {
                    receiver::Action::Send { message, .. } => {
                        let to = target();
                        self.p.handle(now, sender::Event::Peer { to, message });
                    }
                    receiver::Action::Ask { message, .. } => {
                        let from = sender::FetcherId(1);
                        self.p.handle(now, sender::Event::Fetcher { from, message });
                    }
                    receiver::Action::Open { lease, .. } => self.lease = lease,
                    receiver::Action::CheckCanary { slots } => {
                        let written =
                            |slot: &protocol::SlotIndex| (now.0 >> 17) & 1 == u64::from(slot.0 & 1);
                        let (gone, there) = slots.into_iter().partition(written);
                        self.d
                            .handle(now, receiver::Event::CanaryChecked { gone, there });
                    }
                    _ => {}
                }
            } else {
                break;
            }
        }
        let (p, d) = (self.p.gauges(), self.d.gauges());
        assert_eq!(p.free + p.held, SLOTS);
        assert_eq!(d.free + d.held + d.quarantined, SLOTS);
    }
}

/// The fetch port of the fixture `expect`.
fn keeper() -> protocol::local::Keeper {
    protocol::local::Keeper {
        host: "10.0.0.1".into(),
        port: 7600,
    }
}

fn target() -> protocol::local::Target {
    protocol::local::Target {
        host: "10.0.0.2".into(),
        init_port: 7300,
        alloc_port: 7400,
    }
}

const SLOTS: u32 = 4;
const EPOCH: Epoch = Epoch(2);

impl Pair {
    fn new() -> Self {
        let second = std::time::Duration::from_secs(1);
        let layout = Layout {
            model: "tiny-llama".into(),
            dtype: "bfloat16".into(),
            layers: 2,
            kv_heads: 2,
            head_size: 16,
            mla: false,
            chunk_tokens: 256,
            ..Layout::example()
        };
        let token_bytes = layout.token_bytes().unwrap_or(0);
        let chunk = layout.clone();
        let sender = Sender::new(sender::Config {
            id: "prefill-0".into(),
            epoch: Epoch(1),
            slots: SLOTS,
            layout,
            max_requests: 8,
            heartbeat: second,
            wait: second,
            park: second / 20,
            repeat: second / 2,
            link: second,
            stall: 30 * second,
            max_keep: 10 * second,
            push_off: false,
        });
        let receiver = Receiver::new(receiver::Config {
            epoch: EPOCH,
            slots: SLOTS,
            token_bytes,
            chunk_tokens: 256,
            max_requests: 8,
            max_quarantined: 2,
            no_sender: 5 * second,
            unclaimed: 10 * second,
            max_lease: 30 * second,
            max_wait: 10 * second,
            lmcache_wait: second,
            layout: Some(chunk),
            address: Some(target()),
            max_expect: 10 * second,
            seed: 1,
        });
        Self {
            p: sender,
            d: receiver,
            now: Time(0),
            lease: LeaseId(0),
            writes: Vec::new(),
        }
    }
}
