//! The rate between two running sidecars whose engines have not started yet.
//!
//! On each of the two hosts, the doctor takes the place of the engine at its sidecar: `--push` beside the sender,
//! `--answer` beside the receiver. So the bytes take the ports, keys and wires that the real KV will take.

use std::time::{Duration, Instant};

use protocol::Layout;
use protocol::Reason;
use protocol::RequestId;
use protocol::dlist::Memory;
use protocol::local::{Await, EngineRole, Release, Reserve, Staged, Target, ToEngine, ToSidecar};
use protocol::plan::Chunking;

use super::finding::{Rate, Results, kinds};
use super::pages::{self, Program};
use super::reach;
use crate::config::Config;
use crate::memory::cuda::{self, Which};
use crate::selftest::engine::{Engine, Gpu};
use crate::transport::expected_rate::{Ends, ExpectedRate};
use crate::transport::table;

kinds! {
    NO_SIDECAR = Error "pair-no-sidecar":
        "--push and --answer need a running sidecar with this configuration, and no engine at it";
        "start the sidecar with the same configuration; end its engine, or start the engine after the measurement";
    NOTHING_MOVED = Error "pair-moves-nothing":
        "KV of engines would not move between these two sidecars either";
        "docs/reference/reasons.md explains the reason; look at the logs of both sidecars";
    SLOW_PAIR = Warning "pair-slow":
        "the wire is slower than even the slowest wire of its kind, so it takes another way than you expect";
        "docs/troubleshooting.md explains the causes in the section `Transfers are slow`";
}

/// Pushes requests to a receiver for `seconds`, and judges the rate.
pub(super) fn push(config: &Config, to: &Target, seconds: u64, results: &mut Results) {
    let bound = Duration::from_secs(seconds.max(1));
    match reach::block(pushes(config, to, bound)) {
        Ok(Ok(moved)) => judge(config, to, &moved, results),
        Ok(Err(Failure::Sidecar(error))) | Err(error) => results.add(&NO_SIDECAR, error),
        Ok(Err(Failure::Transfer(error))) => results.add(&NOTHING_MOVED, error),
    }
}

/// Takes the place of the decode engine until a measurement has ended.
pub(super) fn answer(config: &Config, results: &mut Results) {
    match reach::block(answers(config)) {
        Ok(Ok(moved)) => {
            let text = format!(
                "{} requests with {} bytes have arrived",
                moved.requests, moved.bytes
            );
            results.fact("pair", text);
        }
        Ok(Err(Failure::Sidecar(error))) | Err(error) => results.add(&NO_SIDECAR, error),
        Ok(Err(Failure::Transfer(error))) => results.add(&NOTHING_MOVED, error),
    }
}

/// The requests that have moved.
#[derive(Debug, Default)]
struct Moved {
    requests: u64,
    bytes: u64,
}

/// The reason why a measurement has ended early.
#[derive(Debug)]
enum Failure {
    /// The own sidecar cannot be used.
    Sidecar(String),
    /// The two sidecars move nothing.
    Transfer(String),
}

async fn connect(config: &Config, role: EngineRole) -> Result<Engine, Failure> {
    let device = config
        .devices
        .first()
        .and_then(Option::as_ref)
        .and_then(uuid);
    let gpu = Gpu {
        device,
        events: Vec::new(),
    };
    let connected = Engine::connect(&config.socket, role, layout(config), gpu);
    let connected = tokio::time::timeout(reach::BOUND, connected).await;
    let at = config.socket.display();
    match connected {
        Ok(Ok(engine)) => Ok(engine),
        Ok(Err(error)) => Err(Failure::Sidecar(format!("{at}: {error:#}"))),
        Err(_) => Err(Failure::Sidecar(format!(
            "{at}: the sidecar does not answer"
        ))),
    }
}

/// Returns the UUID of a GPU; `None` if this process does not see it.
fn uuid(which: &Which) -> Option<String> {
    match which {
        Which::Uuid(uuid) => Some(uuid.to_string()),
        Which::Ordinal(ordinal) => Some(cuda::all().ok()?.get(*ordinal as usize)?.to_string()),
    }
}

/// Returns the layout of both sides: chunks of one MiB, and one layer.
fn layout(config: &Config) -> Layout {
    let chunk_tokens = config.chunk_tokens.unwrap_or(CHUNK_TOKENS);
    Layout {
        model: "doctor".to_owned(),
        dtype: "uint8".to_owned(),
        layers: 1,
        kv_heads: 1,
        head_size: (CHUNK_BYTES / chunk_tokens).max(1),
        mla: true,
        chunk_tokens,
        groups: Vec::new(),
        quantization: String::new(),
    }
}

/// Returns the id, the tokens and the keys of a request. Both sides compute the same.
fn request(number: u64, layout: &Layout) -> (RequestId, u32, Vec<String>) {
    let keys = (0..CHUNKS).map(|chunk| format!("doctor@1@0@{number:x}-{chunk:x}@uint8"));
    let req = RequestId(format!("doctor-{number}"));
    (req, CHUNKS * layout.chunk_tokens, keys.collect())
}

async fn pushes(config: &Config, to: &Target, time: Duration) -> Result<Moved, Failure> {
    let layout = layout(config);
    let mut engine = connect(config, EngineRole::Prefill).await?;
    let mut moved = Moved::default();
    let answered = Instant::now() + FIRST;
    let mut end = None;
    loop {
        let (req, tokens, keys) = request(moved.requests, &layout);
        let reserve = Reserve {
            req: req.clone(),
            to: to.clone(),
            keys,
            tokens,
            upto: tokens,
            overlap: true,
        };
        send(&mut engine, ToSidecar::Reserve(reserve)).await?;
        let ended = loop {
            match next(&mut engine, REQUEST).await? {
                ToEngine::Granted(granted) if granted.req == req && !granted.chunks.is_empty() => {
                    let staged = Staged {
                        req: req.clone(),
                        chunks: granted.chunks,
                        gather_us: 0,
                        event: None,
                        layers: Vec::new(),
                    };
                    send(&mut engine, ToSidecar::Staged(staged)).await?;
                }
                ToEngine::Ended(ended) if ended.req == req => {
                    break ended;
                }
                _ => {}
            }
        };
        match ended.reason {
            None => {
                moved.requests += 1;
                moved.bytes += ended.bytes;
                if Instant::now() >= *end.get_or_insert_with(|| Instant::now() + time) {
                    return Ok(moved);
                }
            }
            Some(reason)
                if moved.requests == 0 && is_early(reason) && Instant::now() < answered =>
            {
                tokio::time::sleep(AGAIN).await;
            }
            Some(reason) => {
                return Err(Failure::Transfer(format!(
                    "the sender ended request {} with the reason {reason}",
                    moved.requests + 1
                )));
            }
        }
    }
}

/// Returns true if the reason can mean that the other host's `--answer` has not started yet.
fn is_early(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::NoEngine | Reason::StaleEpoch | Reason::Unclaimed
    )
}

async fn answers(config: &Config) -> Result<Moved, Failure> {
    let layout = layout(config);
    let mut engine = connect(config, EngineRole::Decode).await?;
    let sizes = Chunking::of(&layout);
    let mut moved = Moved::default();
    let deadline = Instant::now() + FIRST;
    loop {
        let (req, tokens, keys) = request(moved.requests, &layout);
        let parked = Await {
            req: req.clone(),
            keys,
            tokens,
            have_tokens: 0,
            deadline_ms: PARKED_MS,
            written: false,
        };
        send(&mut engine, ToSidecar::Await(parked)).await?;
        let reason = loop {
            match next(&mut engine, REQUEST).await? {
                ToEngine::Ready(ready) if ready.req == req => {
                    let plan = sizes.plan(tokens, 0);
                    moved.bytes += ready
                        .chunks
                        .iter()
                        .map(|chunk| plan.size(*chunk))
                        .sum::<u64>();
                    let release = Release {
                        req: req.clone(),
                        chunks: ready.chunks,
                        scatter_us: 0,
                    };
                    send(&mut engine, ToSidecar::Release(release)).await?;
                }
                ToEngine::Ended(ended) if ended.req == req => break ended.reason,
                _ => {}
            }
        };
        match reason {
            None => moved.requests += 1,
            // The sender has ended its measurement.
            Some(_) if moved.requests > 0 => return Ok(moved),
            Some(_) if Instant::now() < deadline => {}
            Some(reason) => {
                let text = format!(
                    "no request has arrived within {FIRST:?}; the last ended with the reason {reason}"
                );
                return Err(Failure::Transfer(text));
            }
        }
    }
}

async fn send(engine: &mut Engine, message: ToSidecar) -> Result<(), Failure> {
    let sent = engine.send(&message).await;
    sent.map_err(|error| {
        Failure::Sidecar(format!("the sidecar has closed the connection: {error}"))
    })
}

async fn next(engine: &mut Engine, bound: Duration) -> Result<ToEngine, Failure> {
    match tokio::time::timeout(bound, engine.recv()).await {
        Ok(Ok(message)) => Ok(message),
        Ok(Err(error)) => Err(Failure::Sidecar(format!(
            "the sidecar has closed the connection: {error:#}"
        ))),
        Err(_) => Err(Failure::Transfer(format!(
            "no answer from the sidecar within {bound:?}"
        ))),
    }
}

/// Compares the rate that the sender has measured with the rate to expect.
fn judge(config: &Config, to: &Target, moved: &Moved, results: &mut Results) {
    let page = pages::read(&config.admin_url(config.admin.port));
    let Ok(Program::Sidecar(status)) = page.map(|running| running.kind) else {
        results.fact(
            "pair",
            format!("{} requests moved, rate unknown", moved.requests),
        );
        return;
    };
    let peer = format!("{}:{}", to.host, to.alloc_port);
    let Some(link) = status.links.into_iter().find(|link| link.peer == peer) else {
        return;
    };
    let memory = if config.devices.iter().any(Option::is_some) {
        Memory::Vram
    } else {
        Memory::Dram
    };
    let Some(kind) = table::all().find(|kind| kind.as_str() == link.transport) else {
        return;
    };
    let expected = ExpectedRate::of(
        kind,
        Ends {
            ours: memory,
            theirs: memory,
            same_host: kind.needs_gpu(),
        },
    );
    results.fact(
        "pair",
        format!("{peer}: {} ({})", link.transport, link.why.escape_debug()),
    );
    let Some(rate) = link.measured_gb_per_s else {
        return;
    };
    let moves = format!("{} to {peer} moves {rate:.3} GB/s", link.transport);
    let rate = Rate {
        transport: link.transport,
        memory: format!("this host to {peer}"),
        gb_per_s: rate,
        at_least_gb_per_s: expected.least_gb_s,
        route: String::new(),
    };
    results.rate(&SLOW_PAIR, &moves, expected.hint, rate);
}

/// Tokens of a chunk if the configuration names none: LMCache's default.
const CHUNK_TOKENS: u32 = 256;
/// Bytes of a chunk.
const CHUNK_BYTES: u32 = 1 << 20;
/// Chunks of a request. A sender counts only writes of at least 4 MiB for its rate.
const CHUNKS: u32 = 8;
/// Longest time of one message of the own sidecar, which itself limits each request.
const REQUEST: Duration = Duration::from_secs(40);
/// Time for which a request waits for its sender.
const PARKED_MS: u32 = 5_000;
/// Time for which each side waits for the first request: long enough to type the other command on the other host.
const FIRST: Duration = Duration::from_secs(300);
/// Time between two attempts of the prefill side while the other side has not started.
const AGAIN: Duration = Duration::from_millis(200);
