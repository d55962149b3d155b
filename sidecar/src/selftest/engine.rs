//! The engine's half of the local protocol, as far as a self-test needs it. One connection acts as a vLLM
//! worker without a model.

use std::io;
use std::path::Path;

use protocol::codec;
use protocol::local::{EngineHello, EngineRole, ToEngine, ToSidecar, Welcome};
use protocol::{Layout, VERSION};
use serde_bytes::ByteBuf;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// A connection to a sidecar that has sent its welcome.
#[derive(Debug)]
pub(crate) struct Engine {
    stream: UnixStream,
    pub(crate) welcome: Welcome,
}

/// The GPU and the events that an engine sends in its hello; empty for an engine on host memory.
#[derive(Debug, Default)]
pub(crate) struct Gpu {
    pub(crate) device: Option<String>,
    pub(crate) events: Vec<ByteBuf>,
}

impl Engine {
    /// Connects, sends the hello and waits for the welcome.
    pub(crate) async fn connect(
        socket: &Path,
        role: EngineRole,
        layout: Layout,
        gpu: Gpu,
    ) -> anyhow::Result<Self> {
        let mut stream = UnixStream::connect(socket).await?;
        let hello = ToSidecar::Hello(EngineHello {
            v: VERSION,
            engine: "selftest".to_owned(),
            role,
            rank: 0,
            world_size: 1,
            layout,
            device: gpu.device,
            events: gpu.events,
            unmoved: String::new(),
        });
        write(&mut stream, &hello).await?;
        // The kernel closes the descriptor that comes with the welcome. This process does not need the
        // descriptor, because it has the buffer already.
        match read(&mut stream).await? {
            ToEngine::Welcome(welcome) => Ok(Self { stream, welcome }),
            other => anyhow::bail!("expected a welcome, got {other:?}"),
        }
    }

    pub(crate) async fn send(&mut self, message: &ToSidecar) -> io::Result<()> {
        write(&mut self.stream, message).await
    }

    /// Waits for the next message.
    ///
    /// # Cancel safety
    /// Cancel safe only until the first byte of a frame has come. The rest of the frame follows at once.
    pub(crate) async fn recv(&mut self) -> anyhow::Result<ToEngine> {
        self.stream.readable().await?;
        read(&mut self.stream).await
    }
}

async fn write(stream: &mut UnixStream, message: &ToSidecar) -> io::Result<()> {
    let body = codec::encode(message);
    let length = u32::try_from(body.len()).map_err(io::Error::other)?;
    stream.write_all(&length.to_le_bytes()).await?;
    stream.write_all(&body).await
}

async fn read(stream: &mut UnixStream) -> anyhow::Result<ToEngine> {
    let length = stream.read_u32_le().await? as usize;
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    Ok(codec::decode(&body)?)
}
