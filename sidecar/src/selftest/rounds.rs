//! Requests, one after the other: random chunks staged, pushed, compared, released.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use protocol::layout::{chunk_span, chunks_of};
use protocol::local::{Await, Release, Reserve, Staged, Target, ToEngine, ToSidecar};
use protocol::{Layout, RequestId};

use super::engine::Engine;
use crate::memory::Buffer;
use crate::side::Side;

/// Both engines' halves, and what they have seen.
#[derive(Debug)]
pub(super) struct Rounds {
    prefill: Engine,
    decode: Engine,
    send: Arc<Buffer>,
    land: Arc<Buffer>,
    to: Target,
    layout: Layout,
    sums: BTreeMap<u32, u64>,
    pub(super) chunks: u64,
    pub(super) wrong: u64,
    /// From the reservation to the last chunk ready, of requests of one chunk.
    pub(super) one_chunk: Vec<Duration>,
}

/// Every so many requests has a single chunk, whose time says what the handshake costs.
const SINGLE_EVERY: u64 = 4;
/// Nothing here takes longer, on any host that is worth testing.
const PATIENCE: Duration = Duration::from_secs(10);

impl Rounds {
    pub(super) fn new(
        prefill: Engine,
        decode: Engine,
        mut buffers: BTreeMap<Side, Arc<Buffer>>,
        to: Target,
        layout: Layout,
    ) -> anyhow::Result<Self> {
        let mut take = |side| {
            buffers
                .remove(&side)
                .ok_or_else(|| anyhow::anyhow!("no {side:?} buffer"))
        };
        Ok(Self {
            send: take(Side::Sender)?,
            land: take(Side::Receiver)?,
            prefill,
            decode,
            to,
            layout,
            sums: BTreeMap::new(),
            chunks: 0,
            wrong: 0,
            one_chunk: Vec::new(),
        })
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
            let began = Instant::now();
            tokio::time::timeout(PATIENCE, self.request(round, tokens))
                .await
                .map_err(|_| anyhow::anyhow!("request {round} did not end in {PATIENCE:?}"))??;
            if chunks == 1 {
                self.one_chunk.push(began.elapsed());
            }
            round += 1;
        }
        Ok(())
    }

    async fn request(&mut self, round: u64, tokens: u32) -> anyhow::Result<()> {
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
                message = self.prefill.recv() => pushed |= self.on_prefill(&req, tokens, message?).await?,
                message = self.decode.recv() => landed |= self.on_decode(&req, tokens, message?).await?,
            }
        }
        Ok(())
    }

    async fn on_prefill(
        &mut self,
        req: &RequestId,
        tokens: u32,
        message: ToEngine,
    ) -> anyhow::Result<bool> {
        match message {
            ToEngine::Granted(granted) => {
                let began = Instant::now();
                for (&chunk, &slot) in granted.chunks.iter().zip(&granted.slots) {
                    let (offset, bytes) = self.place(chunk, slot, tokens);
                    self.send.fill_random(offset, bytes, rand::random())?;
                    self.sums.insert(chunk, self.send.sum(offset, bytes)?);
                }
                let gather_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
                let staged = Staged {
                    req: req.clone(),
                    chunks: granted.chunks,
                    gather_us,
                    event: None,
                };
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
        message: ToEngine,
    ) -> anyhow::Result<bool> {
        match message {
            ToEngine::Ready(ready) => {
                for (&chunk, &slot) in ready.chunks.iter().zip(&ready.slots) {
                    let (offset, bytes) = self.place(chunk, slot, tokens);
                    let sum = self.land.sum(offset, bytes)?;
                    self.chunks += 1;
                    self.wrong += u64::from(self.sums.remove(&chunk) != Some(sum));
                }
                let release = Release {
                    req: req.clone(),
                    chunks: ready.chunks,
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

    /// Where a chunk stands in a buffer: offset and bytes.
    fn place(&self, chunk: u32, slot: u32, tokens: u32) -> (u64, u64) {
        let (from, to) = chunk_span(chunk, tokens, 0, self.layout.chunk_tokens);
        let per_token = self.layout.token_bytes().unwrap_or(0);
        let offset = u64::from(slot) * self.prefill.welcome.slot_bytes;
        (offset, u64::from(to - from) * per_token)
    }
}
