//! Requests, one after the other: random chunks staged, pushed, compared, released.

use std::time::{Duration, Instant};

use protocol::layout::{chunk_span, chunks_of};
use protocol::local::{Await, Release, Reserve, Staged, Target, ToEngine, ToSidecar};
use protocol::{Layout, RequestId};

use super::engine::Engine;

/// Both engines' halves, and what they have seen.
#[derive(Debug)]
pub(super) struct Rounds {
    prefill: Engine,
    decode: Engine,
    content: Box<dyn Content>,
    to: Target,
    layout: Layout,
    /// When the last chunks of this request were said to be staged.
    staged: Instant,
    /// Chunks of this request that may be read.
    ready: Vec<Place>,
    pub(super) chunks: u64,
    pub(super) wrong: u64,
    /// From staged to ready, of requests of one chunk.
    pub(super) one_chunk: Vec<Duration>,
    /// From staged to the last chunk ready, with the bytes, of requests that fill the buffer.
    pub(super) staged_ready: Vec<(u64, Duration)>,
    /// The same from the moment at which the bytes stood there, where that was after.
    pub(super) fired_ready: Vec<(u64, Duration)>,
}

/// The bytes of both buffers.
pub(super) trait Content: std::fmt::Debug {
    /// Fills chunks of the send buffer with new bytes. Gives the event, by its position in the hello,
    /// after which they stand there.
    fn fill(&mut self, places: &[Place], when: When) -> anyhow::Result<Option<u32>>;
    /// When the bytes of the last fill stood there, if that was later than it returned.
    fn filled(&mut self) -> Option<Instant>;
    /// Whether a chunk of the landing buffer has the bytes that the chunk was filled with.
    fn arrived(&mut self, place: Place) -> anyhow::Result<Arrived>;
}

/// A chunk in a buffer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) chunk: u32,
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

/// When the bytes stand, seen from the moment at which they are said to be staged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum When {
    /// Before.
    Before,
    /// Some milliseconds later, if the buffer is such that there is a difference.
    Later,
}

/// What came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arrived {
    Same,
    Different,
}

/// Every so many requests has a single chunk, whose time says what the handshake costs.
const SINGLE_EVERY: u64 = 4;
/// Every so many of the others is filled only after it was said to be staged.
const LATE_EVERY: u64 = 3;
/// Nothing here takes longer, on any host that is worth testing.
const PATIENCE: Duration = Duration::from_secs(10);

impl Rounds {
    pub(super) fn new(
        prefill: Engine,
        decode: Engine,
        content: Box<dyn Content>,
        to: Target,
        layout: Layout,
    ) -> Self {
        Self {
            content,
            prefill,
            decode,
            to,
            layout,
            staged: Instant::now(),
            ready: Vec::new(),
            chunks: 0,
            wrong: 0,
            one_chunk: Vec::new(),
            staged_ready: Vec::new(),
            fired_ready: Vec::new(),
        }
    }

    /// Pushes for `time`.
    pub(super) async fn run(&mut self, time: Duration) -> anyhow::Result<()> {
        let end = Instant::now() + time;
        let slots = self.prefill.welcome.slots.min(self.decode.welcome.slots);
        let mut round = 0;
        while Instant::now() < end {
            let chunks = if round % SINGLE_EVERY == 0 { 1 } else { slots };
            // The last chunk is a partial one, but for single ones.
            let tokens = chunks * self.layout.chunk_tokens - if chunks > 1 { 100 } else { 0 };
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
        let count = chunks_of(tokens, self.layout.chunk_tokens);
        let keys: Vec<String> = (0..count)
            .map(|i| format!("selftest@1@0@{round:x}{i:08x}@uint8"))
            .collect();
        let parked = Await {
            req: req.clone(),
            keys: keys.clone(),
            tokens,
            have_tokens: 0,
            deadline_ms: 10_000,
            written: false,
        };
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
                let count = chunks_of(tokens, self.layout.chunk_tokens) as usize;
                // Looking at them takes longer than the push: not before all have come.
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

    /// Where chunks stand in a buffer.
    fn places(&self, chunks: &[u32], slots: &[u32], tokens: u32) -> Vec<Place> {
        let per_token = self.layout.token_bytes().unwrap_or(0);
        let place = |(&chunk, &slot)| {
            let (from, to) = chunk_span(chunk, tokens, 0, self.layout.chunk_tokens);
            Place {
                chunk,
                offset: u64::from(slot) * self.prefill.welcome.slot_bytes,
                bytes: u64::from(to - from) * per_token,
            }
        };
        chunks.iter().zip(slots).map(place).collect()
    }
}
