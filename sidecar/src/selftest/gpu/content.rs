//! The engines' work on the GPU: filling and reading slots.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use protocol::local::Welcome;
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};
use serde_bytes::ByteBuf;

use super::super::rounds::{Arrived, Content, Place, When};
use crate::memory::cuda::{Device, DeviceMemory, Event, Handle, Imported, Stage, Stream};

/// The GPU work of both engines. Each engine is a [`Half`].
#[derive(Debug)]
pub(super) struct GpuContent {
    prefill: Half,
    decode: Half,
    send: Imported,
    land: Imported,
    /// Random bytes on the prefill engine's GPU. Each chunk is filled with a range of these bytes.
    pool: Arc<DeviceMemory>,
    copy: Vec<u8>,
    /// Destination of copies whose only purpose is to delay a late filling.
    ballast: Arc<DeviceMemory>,
    stage: Stage,
    /// Offset in the pool of the bytes of each chunk.
    from: BTreeMap<u32, u64>,
    next: usize,
    /// The thread that waits for the end of a late filling and returns its time; absent if no filling is
    /// late.
    watch: Option<JoinHandle<Option<Instant>>>,
}

/// One engine's GPU with its stream and events.
#[derive(Debug)]
pub(super) struct Half {
    device: Arc<Device>,
    stream: Arc<Stream>,
    events: Vec<Event>,
}

impl Half {
    pub(super) fn new(device: Arc<Device>) -> anyhow::Result<Self> {
        Ok(Self {
            stream: Arc::new(Stream::new(&device)?),
            events: Vec::new(),
            device,
        })
    }

    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    /// Makes events that the sidecar can open, and returns their handles.
    pub(super) fn share(&mut self, count: usize) -> anyhow::Result<Vec<ByteBuf>> {
        let mut handles = Vec::new();
        for _ in 0..count {
            let (event, handle) = Event::shared(&self.device)?;
            self.events.push(event);
            handles.push(ByteBuf::from(handle));
        }
        Ok(handles)
    }

    fn open(&self, welcome: &Welcome) -> anyhow::Result<Imported> {
        let cuda = welcome.cuda.as_ref();
        let cuda = cuda.ok_or_else(|| anyhow::anyhow!("the buffer is not on a GPU"))?;
        anyhow::ensure!(
            cuda.uuid == self.device.uuid().to_string(),
            "the buffer is on {}, not on {}",
            cuda.uuid,
            self.device.uuid()
        );
        let handle = Handle::try_from(&cuda.handle[..])?;
        Ok(Imported::open(&self.device, &handle, cuda.bytes)?)
    }
}

impl GpuContent {
    pub(super) fn new(
        prefill: Half,
        send: &Welcome,
        decode: Half,
        land: &Welcome,
    ) -> anyhow::Result<Self> {
        let bytes = POOL_BYTES.max(2 * send.slot_bytes);
        let pool = DeviceMemory::take(Arc::clone(&prefill.device), bytes)?;
        let mut copy = vec![0; usize::try_from(bytes)?];
        SmallRng::from_os_rng().fill_bytes(&mut copy);
        pool.write(0, &copy)?;
        Ok(Self {
            send: prefill.open(send)?,
            land: decode.open(land)?,
            stage: Stage::new(&decode.device, STAGE_BYTES)?,
            ballast: DeviceMemory::take(Arc::clone(&prefill.device), POOL_BYTES)?,
            pool,
            copy,
            prefill,
            decode,
            from: BTreeMap::new(),
            next: 0,
            watch: None,
        })
    }
}

impl Content for GpuContent {
    fn fill(&mut self, places: &[Place], when: When) -> anyhow::Result<Option<u32>> {
        let stream = &self.prefill.stream;
        if when == When::Later {
            let len = self.ballast.bytes();
            for _ in 0..BALLAST_BYTES / len {
                stream.push(&self.pool, 0, &self.ballast, 0, len)?;
            }
        }
        for place in places {
            let last = self.pool.bytes() - place.bytes;
            let at = rand::rng().random_range(0..=last) & !(ALIGN - 1);
            stream.push(&self.pool, at, &self.send, place.offset, place.bytes)?;
            self.from.insert(place.chunk, at);
        }
        // A request ends before the next begins, so no event is recorded again while the sidecar waits for
        // it.
        let index = self.next % self.prefill.events.len();
        self.next += 1;
        stream.record(&self.prefill.events[index])?;
        match when {
            When::Before => stream.wait()?,
            When::Later => {
                // This wait polls without pauses, to find the exact end. A sidecar pauses between two
                // checks of an engine's event.
                let stream = Arc::clone(stream);
                let wait = move || stream.wait().ok().map(|()| Instant::now());
                self.watch = Some(std::thread::spawn(wait));
            }
        }
        Ok(Some(u32::try_from(index)?))
    }

    fn filled(&mut self) -> Option<Instant> {
        self.watch.take()?.join().ok().flatten()
    }

    fn arrived(&mut self, place: Place) -> anyhow::Result<Arrived> {
        let Some(from) = self.from.remove(&place.chunk) else {
            return Ok(Arrived::Different);
        };
        let mut done = 0;
        while done < place.bytes {
            let len = usize::try_from(place.bytes - done)?.min(self.stage.len());
            self.stage.fetch(&self.land, place.offset + done, len)?;
            let at = usize::try_from(from + done)?;
            if self.stage.block()[..len] != self.copy[at..at + len] {
                return Ok(Arrived::Different);
            }
            done += len as u64;
        }
        Ok(Arrived::Same)
    }
}

impl Drop for GpuContent {
    fn drop(&mut self) {
        // All copies must end before the buffers are unmapped, even after a failed request.
        for half in [&self.prefill, &self.decode] {
            if let Err(error) = half.stream.wait() {
                eprintln!("the GPU failed: {error}");
            }
        }
    }
}

/// Number of the prefill engine's events.
pub(super) const EVENTS: usize = 8;
/// Smallest size of the pool of random bytes.
const POOL_BYTES: u64 = 128 << 20;
/// Bytes that are copied before a late filling: about 10 ms at 4 TB/s, with reads and writes.
const BALLAST_BYTES: u64 = 20 << 30;
/// Alignment of chunks in the pool, for fast copies.
const ALIGN: u64 = 256;
const STAGE_BYTES: usize = 32 << 20;
