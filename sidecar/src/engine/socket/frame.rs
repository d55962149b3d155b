//! Length-prefixed msgpack frames on a unix stream.

use std::io;

use protocol::codec::{self, DecodeError};
use protocol::local::{ToEngine, ToSidecar};
use tokio::io::{AsyncRead, AsyncReadExt};

/// Longest frame: the keys of a request of a million tokens take 600 KB.
pub(super) const MAX_FRAME: usize = 1 << 20;

/// The reason why a stream of frames ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum FrameError {
    /// The other side closed between two frames.
    #[error("closed")]
    Closed,
    /// A frame is longer than [`MAX_FRAME`].
    #[error("a frame of {0} bytes is longer than {MAX_FRAME} bytes")]
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

/// Returns the frame of a message.
pub(super) fn encode(message: &ToEngine) -> Vec<u8> {
    let body = codec::encode(message);
    // The number of slots limits the length of a message to an engine to far less than 4 GiB.
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
    let mut frame = Vec::with_capacity(4 + body.len());
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(&body);
    frame
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    const HELLO: &[u8] = include_bytes!("../../../../protocol/fixtures/hello.bin");
    const AWAIT: &[u8] = include_bytes!("../../../../protocol/fixtures/await.bin");
    const RESERVE: &[u8] = include_bytes!("../../../../protocol/fixtures/reserve.bin");

    /// Reads a stream to its end and returns the number of its messages.
    async fn read_all(mut stream: &[u8]) -> (usize, FrameError) {
        let mut buffer = Vec::new();
        let mut messages = 0;
        loop {
            let left = stream.len();
            match read(&mut stream, &mut buffer).await {
                Ok(_) => messages += 1,
                Err(error) => return (messages, error),
            }
            assert!(stream.len() < left, "it goes on");
        }
    }

    fn stream() -> Vec<u8> {
        let frame = |body: &[u8]| {
            let length = u32::try_from(body.len()).unwrap();
            [&length.to_le_bytes(), body].concat()
        };
        [HELLO, AWAIT, RESERVE].map(frame).concat()
    }

    #[tokio::test]
    async fn a_stream_is_read_to_its_end() {
        let (messages, end) = read_all(&stream()).await;
        assert_eq!(messages, 3);
        assert!(matches!(end, FrameError::Closed), "{end}");
    }

    #[tokio::test]
    async fn no_change_of_a_stream_does_more_than_end_it() {
        let mut random = StdRng::seed_from_u64(2);
        let whole = stream();
        for _ in 0..20_000 {
            let mut bytes = whole.clone();
            for _ in 0..random.random_range(1..4) {
                let at = random.random_range(0..bytes.len());
                bytes[at] = random.random();
            }
            bytes.truncate(random.random_range(1..=bytes.len()));
            let (messages, _) = read_all(&bytes).await;
            assert!(messages <= 3 + whole.len() / 4);
        }
    }

    #[tokio::test]
    async fn an_announced_length_reserves_nothing() {
        let too_long = u32::try_from(MAX_FRAME).unwrap() + 1;
        let (messages, end) = read_all(&too_long.to_le_bytes()).await;
        assert!(
            messages == 0 && matches!(end, FrameError::TooLong(_)),
            "{end}"
        );
    }
}
