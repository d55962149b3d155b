//! Plan of a simulation, as data that proptest can shrink.

use proptest::prelude::*;

use super::model::{Model, models};
use super::wire::Attack;

/// Plan of one run.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) model: Model,
    pub(crate) send_slots: u32,
    pub(crate) land_slots: u32,
    /// True if the receiving process itself writes into the slots (TCP). A write into a closed slot
    /// then fails instead of landing.
    pub(crate) guarded: bool,
    /// False if the receiver verifies no tags.
    pub(crate) verifies: bool,
    pub(crate) net: NetPlan,
    pub(crate) requests: Vec<RequestPlan>,
    /// After this many milliseconds requests with the same ids come again, because LMCache's proxy
    /// counts its ids from 1 at each start. Absent if no ids come again. An engine does not begin a
    /// request if it still has another request with the same id.
    pub(crate) again_ms: Option<u16>,
    pub(crate) faults: Vec<(u16, Fault)>,
}

/// Returns a plan without faults, with eight slots on each side.
pub(crate) fn plan(requests: Vec<RequestPlan>) -> Plan {
    Plan {
        seed: 1,
        model: Model::Plain,
        send_slots: 8,
        land_slots: 8,
        guarded: false,
        verifies: true,
        net: NetPlan::default(),
        requests,
        again_ms: None,
        faults: Vec::new(),
    }
}

/// Faults of control messages.
#[derive(Clone, Debug, Default)]
pub(crate) struct NetPlan {
    /// Percentage of messages that are lost.
    pub(crate) lost: u8,
    /// Percentage of messages that arrive twice.
    pub(crate) doubled: u8,
    /// Maximum delay in milliseconds. Each message has a random delay from 0 to this maximum, so
    /// messages overtake each other.
    pub(crate) delay_ms: u16,
}

/// One request and what its engines do.
#[derive(Clone, Debug)]
pub(crate) struct RequestPlan {
    pub(crate) name: String,
    pub(crate) reserve_at_ms: Option<u16>,
    pub(crate) park: Park,
    pub(crate) tokens: u32,
    /// Percentage of the tokens that the decode side already has.
    pub(crate) have: u8,
    pub(crate) overlap: bool,
    /// True if the prefill request names no receiver. The decode request then comes after the
    /// prefill request's answer and the delay of `park`, and waits in a queue.
    pub(crate) kept: bool,
    /// Milliseconds for which a kept request's decode request waits in the queue of the decode
    /// engine.
    pub(crate) queue_ms: u16,
    /// Milliseconds after which the router sends a kept request's decode request again under
    /// another id; absent if the router sends it only once.
    pub(crate) twice_ms: Option<u16>,
    /// Number of tokens that the prefill engine computes in a step.
    pub(crate) step: u32,
    /// Milliseconds from the reservation to the cancel; absent if the engine does not cancel.
    pub(crate) cancel_after_ms: Option<u16>,
    /// Milliseconds from parking to the abort; absent if the engine does not abort.
    pub(crate) abort_after_ms: Option<u16>,
}

/// Time at which the decode request parks.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Park {
    Never,
    AtMs(u16),
    /// The request parks this many milliseconds after the proxy has got the message that prefill
    /// has begun.
    OnProgress(u16),
    /// The request parks this many milliseconds after the proxy has got the message that the push
    /// has ended.
    OnNotify(u16),
}

/// Faults.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    KillSender,
    KillReceiver,
    /// The receiver is replaced between the handshake and the first message. The sender's link
    /// leads to memory that no longer exists, and no message tells the sender about the change.
    SwapReceiver,
    KillPrefill,
    KillDecode,
    /// The control connection breaks; both sides notice.
    Disconnect,
    /// No message arrives for this many milliseconds. The sides notice the partition only if it is
    /// long.
    Partition(u16),
    /// The next write fails; no byte of it can still arrive.
    FailWrite,
    /// The next write fails, and bytes of it may still arrive.
    LoseWrite,
    /// The checksums of the next write are wrong.
    CorruptWrite,
    /// An attacker on the path changes a piece of the next write, exchanges two, or repeats one. Only over TCP.
    Attack(Attack),
    /// Both sidecars refuse new requests from now on.
    Drain,
    /// A malicious peer asks for slots, sometimes with its own keys for another sender's request.
    /// The peer also sends cancels in LMCache's form.
    Stranger,
}

impl RequestPlan {
    /// Returns a request that parks at once and has no KV yet.
    pub(crate) fn simple(name: &str, tokens: u32) -> Self {
        Self {
            name: name.to_owned(),
            reserve_at_ms: Some(1),
            park: Park::AtMs(0),
            tokens,
            have: 0,
            overlap: true,
            kept: false,
            queue_ms: 0,
            twice_ms: None,
            step: 8,
            cancel_after_ms: None,
            abort_after_ms: None,
        }
    }

    pub(crate) fn have_tokens(&self) -> u32 {
        (self.tokens * u32::from(self.have) / 100).min(self.tokens - 1)
    }
}

fn park() -> impl Strategy<Value = Park> {
    prop_oneof![
        1 => Just(Park::Never),
        2 => (0..200u16).prop_map(Park::AtMs),
        4 => (0..50u16).prop_map(Park::OnProgress),
        3 => (0..50u16).prop_map(Park::OnNotify),
    ]
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        2 => Just(Fault::KillSender),
        2 => Just(Fault::KillReceiver),
        1 => Just(Fault::SwapReceiver),
        1 => Just(Fault::KillPrefill),
        1 => Just(Fault::KillDecode),
        2 => Just(Fault::Disconnect),
        1 => (1..20_000u16).prop_map(Fault::Partition),
        1 => Just(Fault::FailWrite),
        1 => Just(Fault::LoseWrite),
        1 => Just(Fault::CorruptWrite),
        1 => Just(Fault::Attack(Attack::Change)),
        1 => Just(Fault::Attack(Attack::Exchange)),
        1 => Just(Fault::Attack(Attack::Repeat)),
        1 => Just(Fault::Drain),
        2 => Just(Fault::Stranger),
    ]
}

fn request(index: usize) -> impl Strategy<Value = RequestPlan> {
    let when = proptest::option::weighted(0.9, 0..400u16);
    let early = || proptest::option::weighted(0.15, 0..600u16);
    (
        when,
        park(),
        1..40u32,
        0..100u8,
        (any::<bool>(), kept()),
        1..24u32,
        early(),
        early(),
    )
        .prop_map(
            move |(
                reserve_at_ms,
                park,
                tokens,
                have,
                (overlap, (kept, queue_ms, twice_ms)),
                step,
                cancel_after_ms,
                abort_after_ms,
            )| {
                RequestPlan {
                    name: format!("r{index}"),
                    reserve_at_ms,
                    park,
                    tokens,
                    have: if have < 50 { 0 } else { have },
                    overlap,
                    kept,
                    queue_ms,
                    twice_ms,
                    step,
                    cancel_after_ms,
                    abort_after_ms,
                }
            },
        )
}

/// Returns the fields `kept`, `queue_ms` and `twice_ms`.
fn kept() -> impl Strategy<Value = (bool, u16, Option<u16>)> {
    let queue = prop_oneof![3 => 0..300u16, 1 => 0..20_000u16];
    let twice = proptest::option::weighted(0.2, 0..1000u16);
    (any::<bool>(), queue, twice)
}

fn requests() -> impl Strategy<Value = Vec<RequestPlan>> {
    proptest::collection::vec(request(0), 1..8).prop_map(|mut requests| {
        for (index, request) in requests.iter_mut().enumerate() {
            request.name = format!("r{index}");
        }
        requests
    })
}

/// Returns a strategy for any plan.
pub(crate) fn plans() -> impl Strategy<Value = Plan> {
    let net = (0..30u8, 0..30u8, 0..300u16).prop_map(|(lost, doubled, delay_ms)| NetPlan {
        lost,
        doubled,
        delay_ms,
    });
    let net = prop_oneof![1 => Just(NetPlan::default()), 2 => net];
    let faults = proptest::collection::vec((0..2000u16, fault()), 0..6);
    (
        (any::<u64>(), models()),
        1..10u32,
        1..10u32,
        any::<bool>(),
        net,
        requests(),
        proptest::option::weighted(0.3, 0..3000u16),
        faults,
    )
        .prop_map(
            |((seed, model), send_slots, land_slots, guarded, net, requests, again_ms, faults)| {
                Plan {
                    seed,
                    model,
                    send_slots,
                    land_slots,
                    guarded,
                    verifies: true,
                    net,
                    requests,
                    again_ms,
                    faults,
                }
            },
        )
}
