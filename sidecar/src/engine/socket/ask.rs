//! The other side of the socket, for commands that ask a running sidecar.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use protocol::codec;
use protocol::local::{Drain, ToEngine, ToSidecar};

/// Asks the sidecar at `socket` to drain, and returns the number of requests whose KV it still keeps.
/// With `until_fetched` the sidecar answers only when it keeps no KV any more.
///
/// # Errors
/// No sidecar listens on the socket, or no answer comes within `timeout` (`TimedOut`).
pub(crate) fn drain(socket: &Path, until_fetched: bool, timeout: Duration) -> io::Result<u32> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(timeout))?;
    let body = codec::encode(&ToSidecar::Drain(Drain { until_fetched }));
    let length = u32::try_from(body.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_le_bytes()[..], &body].concat())?;
    let mut length = [0; 4];
    stream.read_exact(&mut length).map_err(timed_out)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > super::frame::MAX_FRAME {
        return Err(io::Error::other("the answer is too long"));
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).map_err(timed_out)?;
    match codec::decode(&body).map_err(io::Error::other)? {
        ToEngine::Drained(drained) => Ok(drained.kept),
        other => Err(io::Error::other(format!(
            "an answer of another kind: {other:?}"
        ))),
    }
}

/// Gives the end of a timeout one kind; the kernel reports it as `WouldBlock`.
fn timed_out(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock {
        io::ErrorKind::TimedOut.into()
    } else {
        error
    }
}
