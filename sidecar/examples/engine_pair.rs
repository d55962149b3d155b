//! Drives benchmarks: acts as a prefill engine and a decode engine at the sockets of two sidecars, without
//! models, and without reading or writing the slots.
//!
//! ```text
//! engine_pair SENDER_SOCKET RECEIVER_SOCKET RECEIVER_HOST INIT_PORT ALLOC_PORT CHUNK_BYTES CHUNKS ROUNDS
//! ```
//! The program prints one line of JSON. The line has, for each round, the microseconds from the reservation
//! until the last chunk is ready. The sidecars' own records show the phases of each round.

use std::env;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use protocol::local::{
    Await, EngineHello, EngineRole, Release, Reserve, Staged, Target, ToEngine, ToSidecar,
};
use protocol::{Layout, RequestId, VERSION, codec};

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [
        sender,
        receiver,
        host,
        init,
        alloc,
        chunk_bytes,
        chunks,
        rounds,
    ] = &arguments[..]
    else {
        anyhow::bail!(
            "SENDER_SOCKET RECEIVER_SOCKET RECEIVER_HOST INIT_PORT ALLOC_PORT CHUNK_BYTES CHUNKS ROUNDS"
        );
    };
    let layout = layout(chunk_bytes.parse()?)?;
    let mut pair = Pair {
        decode: Engine::connect(receiver, EngineRole::Decode, &layout)?,
        prefill: Engine::connect(sender, EngineRole::Prefill, &layout)?,
        to: Target {
            host: host.clone(),
            init_port: init.parse()?,
            alloc_port: alloc.parse()?,
        },
        chunks: chunks.parse()?,
    };
    let rounds: u32 = rounds.parse()?;
    let mut times = Vec::new();
    for round in 0..rounds {
        times.push(pair.round(round)?);
    }
    println!("{}", serde_json::to_string(&times)?);
    Ok(())
}

struct Pair {
    prefill: Engine,
    decode: Engine,
    to: Target,
    chunks: u32,
}

impl Pair {
    /// Runs one request. Returns the microseconds from the request's reservation until its last chunk is
    /// ready.
    fn round(&mut self, round: u32) -> anyhow::Result<f64> {
        let req = RequestId(format!("bench-{}-{round}", std::process::id()));
        let tokens = self.chunks * CHUNK_TOKENS;
        // These keys are as long as LMCache's keys with a 64-bit hash.
        let keys: Vec<String> = (0..self.chunks)
            .map(|chunk| format!("{MODEL}@1@0@{round:08x}{chunk:08x}@uint8"))
            .collect();
        self.decode.send(&ToSidecar::Await(Await {
            req: req.clone(),
            keys: keys.clone(),
            tokens,
            have_tokens: 0,
            deadline_ms: 10_000,
            written: false,
        }))?;
        // As with real engines, the decode request is already parked when its prefill ends.
        std::thread::sleep(Duration::from_millis(2));
        let began = Instant::now();
        self.prefill.send(&ToSidecar::Reserve(Reserve {
            req: req.clone(),
            to: self.to.clone(),
            keys,
            tokens,
            upto: tokens,
            overlap: true,
        }))?;
        let mut staged = 0;
        while staged < self.chunks {
            match self.prefill.recv()? {
                ToEngine::Granted(granted) => {
                    staged += u32::try_from(granted.chunks.len())?;
                    if !granted.chunks.is_empty() {
                        self.prefill.send(&ToSidecar::Staged(Staged {
                            req: req.clone(),
                            chunks: granted.chunks,
                            gather_us: 0,
                            event: None,
                            layers: Vec::new(),
                        }))?;
                    }
                }
                other => anyhow::bail!("prefill: {other:?}"),
            }
        }
        let mut ready = 0;
        let mut took = Duration::ZERO;
        while ready < self.chunks {
            match self.decode.recv()? {
                ToEngine::Ready(message) => {
                    took = began.elapsed();
                    ready += u32::try_from(message.chunks.len())?;
                    self.decode.send(&ToSidecar::Release(Release {
                        req: req.clone(),
                        chunks: message.chunks,
                        scatter_us: 0,
                    }))?;
                }
                other => anyhow::bail!("decode: {other:?}"),
            }
        }
        for engine in [&mut self.prefill, &mut self.decode] {
            match engine.recv()? {
                ToEngine::Ended(ended) if ended.reason.is_none() => {}
                other => anyhow::bail!("expected the end of the request, got {other:?}"),
            }
        }
        Ok(took.as_secs_f64() * 1e6)
    }
}

struct Engine {
    stream: UnixStream,
}

impl Engine {
    fn connect(socket: &str, role: EngineRole, layout: &Layout) -> anyhow::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut engine = Self { stream };
        engine.send(&ToSidecar::Hello(EngineHello {
            v: VERSION,
            engine: "benchmark".to_owned(),
            role,
            rank: 0,
            world_size: 1,
            layout: layout.clone(),
            device: None,
            events: Vec::new(),
            unmoved: String::new(),
        }))?;
        match engine.recv()? {
            ToEngine::Welcome(_) => Ok(engine),
            other => anyhow::bail!("expected a welcome, got {other:?}"),
        }
    }

    fn send(&mut self, message: &ToSidecar) -> anyhow::Result<()> {
        let body = codec::encode(message);
        let mut frame = u32::try_from(body.len())?.to_le_bytes().to_vec();
        frame.extend(body);
        Ok(self.stream.write_all(&frame)?)
    }

    fn recv(&mut self) -> anyhow::Result<ToEngine> {
        let mut length = [0; 4];
        self.stream.read_exact(&mut length)?;
        let mut body = vec![0; u32::from_le_bytes(length) as usize];
        self.stream.read_exact(&mut body)?;
        Ok(codec::decode(&body)?)
    }
}

/// Makes a layout with chunks of `chunk_bytes` bytes: one layer, and one latent per token.
fn layout(chunk_bytes: u32) -> anyhow::Result<Layout> {
    anyhow::ensure!(
        chunk_bytes > 0 && chunk_bytes.is_multiple_of(CHUNK_TOKENS),
        "CHUNK_BYTES must be a multiple of {CHUNK_TOKENS}"
    );
    Ok(Layout {
        model: MODEL.to_owned(),
        dtype: "uint8".to_owned(),
        layers: 1,
        kv_heads: 1,
        head_size: chunk_bytes / CHUNK_TOKENS,
        mla: true,
        chunk_tokens: CHUNK_TOKENS,
        groups: Vec::new(),
        quantization: String::new(),
    })
}

const MODEL: &str = "meta-llama/Llama-3.1-8B-Instruct";
const CHUNK_TOKENS: u32 = 256;
/// The read timeout of the sockets. No message takes longer.
const PATIENCE: Duration = Duration::from_secs(20);
