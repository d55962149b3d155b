//! Length-prefixed msgpack frames on a unix stream.

use std::io;

use protocol::codec::{self, DecodeError};
use protocol::local::{ToEngine, ToSidecar};
use tokio::io::{AsyncRead, AsyncReadExt};

/// Longest frame: the keys of a request of a million tokens have 600 KB.
pub(super) const MAX_FRAME: usize = 1 << 20;

/// Why a stream of frames ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum FrameError {
    /// The other side closed between two frames.
    #[error("closed")]
    Closed,
    /// A frame announces more than it may.
    #[error("a frame of {0} bytes; at most {MAX_FRAME} are taken")]
    TooLong(usize),
    /// A frame holds no message.
    #[error(transparent)]
    Malformed(#[from] DecodeError),
    /// The stream broke, possibly within a frame.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Reads one frame into `buffer` and decodes it.
///
/// # Cancel safety
/// Not cancel safe: a frame may have been read in part.
pub(super) async fn read(
    stream: &mut (impl AsyncRead + Unpin),
    buffer: &mut Vec<u8>,
) -> Result<ToSidecar, FrameError> {
    let mut length = [0; 4];
    match stream.read_exact(&mut length).await {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(FrameError::Closed);
        }
        Err(error) => return Err(error.into()),
    }
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_FRAME {
        return Err(FrameError::TooLong(length));
    }
    buffer.resize(length, 0);
    stream.read_exact(buffer).await?;
    Ok(codec::decode(buffer)?)
}

/// A message as it goes over the stream.
pub(super) fn encode(message: &ToEngine) -> Vec<u8> {
    let body = codec::encode(message);
    // Messages to engines are bounded by the slots of a buffer: far below 4 GiB.
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
    let mut frame = Vec::with_capacity(4 + body.len());
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(&body);
    frame
}
