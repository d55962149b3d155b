//! Runs requests one after the other. Each request stages, pushes, compares and releases random chunks.

use std::time::{Duration, Instant};

use protocol::local::{Await, Release, Reserve, Staged, Target, ToEngine, ToSidecar};
use protocol::plan::Chunking;
use protocol::{Layout, RequestId};

use super::engine::Engine;

/// The connections of both simulated engines, and the results of their requests.
#[derive(Debug)]
pub(super) struct Rounds {
    prefill: Engine,
    decode: Engine,
    content: Box<dyn Content>,
    to: Target,
    chunk_tokens: u32,
    chunking: Chunking,
    /// Time at which the last chunks of this request were reported as staged.
    staged: Instant,
    /// Chunks of this request that are ready to be read.
    ready: Vec<Place>,
    pub(super) chunks: u64,
    pub(super) wrong: u64,
    /// Time from the prefill engine's `Staged` message until the chunk is ready, for requests of one chunk.
    pub(super) one_chunk: Vec<Duration>,
    /// Bytes, and the time from the last `Staged` message until the last chunk is ready, for requests that
    /// fill the buffer.
    pub(super) staged_ready: Vec<(u64, Duration)>,
    /// As `staged_ready`, for requests whose chunks were filled after they were reported as staged. The time
    /// of such a request begins when its filling ends.
    pub(super) fired_ready: Vec<(u64, Duration)>,
}

/// The bytes of both buffers.
pub(super) trait Content: std::fmt::Debug {
    /// Fills chunks of the send buffer with new bytes. Returns the index, in the hello's list of events, of
    /// the event that fires when the chunks are filled; absent if they are filled already.
    fn fill(&mut self, places: &[Place], when: When) -> anyhow::Result<Option<u32>>;
    /// Returns the time at which the last filling ended; absent if it ended before `fill` returned.
    fn filled(&mut self) -> Option<Instant>;
    /// Compares a chunk of the landing buffer with the bytes that the chunk was filled with.
    fn arrived(&mut self, place: Place) -> anyhow::Result<Arrived>;
}

/// A chunk in a buffer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) chunk: u32,
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

/// The end of the filling, relative to the time at which the chunks are reported as staged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum When {
    /// The filling ends before the chunks are reported.
    Before,
    /// The filling ends some milliseconds after the report. On host memory, `Later` means the same as
    /// `Before`.
    Later,
}

/// The result of comparing one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arrived {
    Same,
    Different,
}

/// Requests whose number is a multiple of this value have a single chunk. The time of these requests shows
/// the cost of the messages.
const SINGLE_EVERY: u64 = 4;
/// Requests whose number is a multiple of this value are filled only after they were reported as staged.
const LATE_EVERY: u64 = 3;
/// Longest time of one request. No usable host needs more time, even for the request that makes the link.
const PATIENCE: Duration = Duration::from_secs(30);

impl Rounds {
    pub(super) fn new(
        prefill: Engine,
        decode: Engine,
        content: Box<dyn Content>,
        to: Target,
        layout: &Layout,
    ) -> Self {
        Self {
            content,
            prefill,
            decode,
            to,
            chunk_tokens: layout.chunk_tokens,
            chunking: Chunking::of(layout),
            staged: Instant::now(),
            ready: Vec::new(),
            chunks: 0,
            wrong: 0,
            one_chunk: Vec::new(),
            staged_ready: Vec::new(),
            fired_ready: Vec::new(),
        }
    }

    /// Runs requests for `time`.
    pub(super) async fn run(&mut self, time: Duration) -> anyhow::Result<()> {
        let end = Instant::now() + time;
        let slots = self.prefill.welcome.slots.min(self.decode.welcome.slots);
        let mut round = 0;
        while Instant::now() < end {
            let chunks = if round % SINGLE_EVERY == 0 { 1 } else { slots };
            // A request of several chunks ends with a partial chunk, because real prompts do.
            let tokens = chunks * self.chunk_tokens - if chunks > 1 { 100 } else { 0 };
            let when = if round % LATE_EVERY == 0 {
                When::Later
            } else {
                When::Before
            };
            tokio::time::timeout(PATIENCE, self.request(round, tokens, when))
                .await
                .map_err(|_| anyhow::anyhow!("request {round} did not end in {PATIENCE:?}"))??;
            round += 1;
        }
        Ok(())
    }

    async fn request(&mut self, round: u64, tokens: u32, when: When) -> anyhow::Result<()> {
        let req = RequestId(format!("selftest-{round}"));
        let count = self.chunking.plan(tokens, 0).chunks();
        let keys: Vec<String> = (0..count)
            .map(|i| format!("selftest@1@0@{round:x}{i:08x}@uint8"))
            .collect();
        let parked = Await {
            req: req.clone(),
            keys: keys.clone(),
            tokens,
            have_tokens: 0,
            deadline_ms: 30_000,
            written: false,
        };
        // The decode request parks first, so that the measured time does not include a wait for this request.
        self.decode.send(&ToSidecar::Await(parked)).await?;
        let reserve = Reserve {
            req: req.clone(),
            to: self.to.clone(),
            keys,
            tokens,
            upto: tokens,
            overlap: true,
        };
        self.prefill.send(&ToSidecar::Reserve(reserve)).await?;
        let (mut pushed, mut landed) = (false, false);
        while !(pushed && landed) {
            tokio::select! {
                message = self.prefill.recv() => pushed |= self.on_prefill(&req, tokens, when, message?).await?,
                message = self.decode.recv() => landed |= self.on_decode(&req, tokens, when, message?).await?,
            }
        }
        Ok(())
    }

    async fn on_prefill(
        &mut self,
        req: &RequestId,
        tokens: u32,
        when: When,
        message: ToEngine,
    ) -> anyhow::Result<bool> {
        match message {
            ToEngine::Granted(granted) => {
                if granted.chunks.is_empty() {
                    return Ok(false);
                }
                let began = Instant::now();
                let places = self.places(&granted.chunks, &granted.slots, tokens);
                let event = self.content.fill(&places, when)?;
                let gather_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
                let staged = Staged {
                    req: req.clone(),
                    chunks: granted.chunks,
                    gather_us,
                    event,
                    layers: Vec::new(),
                };
                self.staged = Instant::now();
                self.prefill.send(&ToSidecar::Staged(staged)).await?;
                Ok(false)
            }
            ToEngine::Ended(ended) => match ended.reason {
                None => Ok(true),
                Some(reason) => anyhow::bail!("the sender ended {req}: {reason}"),
            },
            other => anyhow::bail!("unexpected {other:?}"),
        }
    }

    async fn on_decode(
        &mut self,
        req: &RequestId,
        tokens: u32,
        when: When,
        message: ToEngine,
    ) -> anyhow::Result<bool> {
        match message {
            ToEngine::Ready(ready) => {
                let places = self.places(&ready.chunks, &ready.slots, tokens);
                self.ready.extend(places);
                let count = self.chunking.plan(tokens, 0).chunks() as usize;
                // A comparison takes longer than the push, so the chunks are compared only after all chunks
                // have arrived.
                if self.ready.len() < count {
                    return Ok(false);
                }
                let now = Instant::now();
                let filled = self.content.filled().unwrap_or(self.staged);
                let bytes = self.ready.iter().map(|place| place.bytes).sum();
                match (count, when) {
                    (1, When::Before) => self.one_chunk.push(now - self.staged),
                    (1, When::Later) => {}
                    (_, When::Before) => self.staged_ready.push((bytes, now - self.staged)),
                    (_, When::Later) => {
                        self.fired_ready
                            .push((bytes, now.saturating_duration_since(filled)));
                    }
                }
                let ready = std::mem::take(&mut self.ready);
                let chunks = ready.iter().map(|place| place.chunk).collect();
                for place in ready {
                    self.chunks += 1;
                    let arrived = self.content.arrived(place)?;
                    self.wrong += u64::from(arrived == Arrived::Different);
                }
                let release = Release {
                    req: req.clone(),
                    chunks,
                    scatter_us: 0,
                };
                self.decode.send(&ToSidecar::Release(release)).await?;
                Ok(false)
            }
            ToEngine::Ended(ended) => match ended.reason {
                None => Ok(true),
                Some(reason) => anyhow::bail!("the receiver ended {req}: {reason}"),
            },
            other => anyhow::bail!("unexpected {other:?}"),
        }
    }

    /// Returns the place of each chunk in a buffer.
    fn places(&self, chunks: &[u32], slots: &[u32], tokens: u32) -> Vec<Place> {
        let plan = self.chunking.plan(tokens, 0);
        let place = |(&chunk, &slot)| Place {
            chunk,
            offset: u64::from(slot) * self.prefill.welcome.slot_bytes,
            bytes: plan.size(chunk),
        };
        chunks.iter().zip(slots).map(place).collect()
    }
}
