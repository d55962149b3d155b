//! One engine connection. The connection's reader passes the engine's messages to the task that owns the
//! protocol machines. If the socket has room, the task that owns the machines also writes the answers, at
//! once. If the socket has no room, the connection's writer writes the answers later.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use protocol::EngineId;
use protocol::local::{Drained, ToEngine, ToSidecar};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::FromEngine;
use super::frame::{self, FrameError};
use crate::engine::drain::Drain;
use crate::memory::{Buffer, Export};

/// Longest time between the start of a connection and its hello.
const HELLO: Duration = Duration::from_secs(5);
/// Maximum number of messages that wait for an engine that does not read. An engine has at most a few hundred
/// requests in flight, with a few messages each. So an engine with more waiting messages is stuck, and the
/// sidecar disconnects the engine.
const OUTBOX: usize = 4096;
/// After the sidecar has disconnected an engine, the engine may still read its slots for this time. The
/// engine first finishes the copies that it has announced to its own scheduler, which takes milliseconds. If
/// the engine closed the connection itself, or its process ended, it no longer reads.
const READS: Duration = Duration::from_secs(2);

/// The sending half of an engine connection.
#[derive(Clone, Debug)]
pub(crate) struct Connection {
    id: EngineId,
    outbox: mpsc::Sender<Outgoing>,
    /// Number of messages in the outbox that are not written yet.
    waiting: Arc<AtomicUsize>,
    /// The writing half, which is dropped when the connection ends.
    writer: Weak<OwnedWriteHalf>,
    /// Cancelled when the outbox overflows: the connection then ends, because an open connection must not
    /// lose a message.
    overflow: CancellationToken,
}

#[derive(Debug)]
enum Outgoing {
    Frame(Vec<u8>),
    WithBuffer(ToEngine, Arc<Buffer>),
    Last(ToEngine),
}

impl Connection {
    /// Returns the connection's number.
    pub(crate) fn id(&self) -> EngineId {
        self.id
    }

    /// Answers a hello with the buffer.
    pub(crate) fn welcome(&self, message: ToEngine, buffer: Arc<Buffer>) {
        self.put(Outgoing::WithBuffer(message, buffer));
    }

    /// Answers a hello with a refusal; the connection ends.
    pub(crate) fn refuse(&self, message: ToEngine) {
        self.put(Outgoing::Last(message));
    }

    /// Sends a message. Disconnects the engine if [`OUTBOX`] messages already wait for it.
    pub(crate) fn send(&self, message: ToEngine) {
        let mut frame = frame::encode(&message);
        // Usually no other message waits. This function then writes the message at once, so that the engine
        // does not wait for a task switch.
        if self.waiting.load(Ordering::Acquire) == 0
            && let Some(writer) = self.writer.upgrade()
            && let Ok(written) = writer.try_write(&frame)
        {
            frame.drain(..written);
        }
        if !frame.is_empty() {
            self.put(Outgoing::Frame(frame));
        }
    }

    fn put(&self, outgoing: Outgoing) {
        self.waiting.fetch_add(1, Ordering::AcqRel);
        match self.outbox.try_send(outgoing) {
            Ok(()) => {}
            // The connection has ended, and its task reports this.
            Err(TrySendError::Closed(_)) => {
                debug!(engine = %self.id, "the engine has disconnected")
            }
            Err(TrySendError::Full(_)) => self.overflow.cancel(),
        }
    }
}

/// The reason why a connection has ended.
enum End {
    /// The engine closed the connection, or the connection broke.
    Theirs(String),
    /// The sidecar disconnected the engine.
    Ours(String),
}

/// Serves one connection until it ends.
pub(super) async fn serve(
    id: EngineId,
    stream: UnixStream,
    events: mpsc::Sender<FromEngine>,
    drain: Drain,
) {
    let (mut reader, writer) = stream.into_split();
    let mut buffer = Vec::new();
    let first = tokio::time::timeout(HELLO, frame::read(&mut reader, &mut buffer)).await;
    let hello = match first {
        Ok(Ok(ToSidecar::Hello(hello))) => hello,
        Ok(Ok(ToSidecar::Drain(asked))) => {
            drain.begin();
            tokio::select! {
                biased;
                _ = frame::read(&mut reader, &mut buffer) => {} // the command has ended
                () = drain.fetched(), if asked.until_fetched => answer_drain(&writer, &drain).await,
                () = std::future::ready(()), if !asked.until_fetched => answer_drain(&writer, &drain).await,
            }
            return;
        }
        Ok(Ok(other)) => {
            warn!(engine = %id, ?other, "engine connection closed: its first message is not a hello");
            return;
        }
        Ok(Err(error)) => {
            warn!(engine = %id, %error, "engine connection closed before its hello");
            return report(&error, &events).await;
        }
        Err(_) => {
            warn!(engine = %id, "engine connection closed: no hello within {HELLO:?}");
            return;
        }
    };
    // The queue is bounded, so that an engine that does not read cannot use up memory.
    let (outbox, inbox) = mpsc::channel(OUTBOX);
    let (writer, waiting) = (Arc::new(writer), Arc::default());
    let connection = Connection {
        id,
        outbox,
        waiting: Arc::clone(&waiting),
        writer: Arc::downgrade(&writer),
        overflow: CancellationToken::new(),
    };
    let overflow = connection.overflow.clone();
    if events
        .send(FromEngine::Hello(connection, hello))
        .await
        .is_err()
    {
        return;
    }
    let ended = tokio::select! {
        biased;
        ended = read_all(id, &mut reader, buffer, &events) => ended,
        ended = write_all(&writer, inbox, &waiting) => ended,
        () = overflow.cancelled() => End::Ours("the engine does not read its messages".to_owned()),
    };
    match ended {
        End::Theirs(reason) => info!(engine = %id, reason, "engine disconnected"),
        End::Ours(reason) => {
            warn!(engine = %id, reason, "engine disconnected");
            // The engine is alive and may still read its slots. Without this pause, the slots could be
            // written again while the engine reads them.
            cut(&writer);
            tokio::time::sleep(READS).await;
        }
    }
    drop(writer);
    // At the end of the process, the task that owns the machines no longer exists, and nothing needs this
    // report.
    if events.send(FromEngine::Gone(id)).await.is_err() {
        debug!(engine = %id, "shutting down");
    }
}

/// Answers a command that asked for the drain.
async fn answer_drain(writer: &OwnedWriteHalf, drain: &Drain) {
    let kept = drain.unfetched();
    let frame = frame::encode(&ToEngine::Drained(Drained { kept }));
    if let Err(error) = write(writer, &frame).await {
        debug!(%error, "the command that asked for the drain has ended");
    }
}

async fn read_all(
    id: EngineId,
    reader: &mut (impl tokio::io::AsyncRead + Unpin),
    mut buffer: Vec<u8>,
    events: &mpsc::Sender<FromEngine>,
) -> End {
    loop {
        match frame::read(reader, &mut buffer).await {
            Ok(message) => {
                if events.send(FromEngine::Message(id, message)).await.is_err() {
                    return End::Theirs("shutting down".to_owned());
                }
            }
            Err(FrameError::Closed) => {
                return End::Theirs("the engine closed the connection".to_owned());
            }
            Err(error @ FrameError::Io(_)) => return End::Theirs(error.to_string()),
            Err(error) => {
                report(&error, events).await;
                return End::Ours(error.to_string());
            }
        }
    }
}

/// Reports a frame that is not a message, so that the metrics count it.
async fn report(error: &FrameError, events: &mpsc::Sender<FromEngine>) {
    let malformed = matches!(error, FrameError::TooLong(_) | FrameError::Malformed(_));
    if malformed && events.send(FromEngine::Malformed).await.is_err() {
        debug!("shutting down");
    }
}

async fn write_all(
    writer: &OwnedWriteHalf,
    mut inbox: mpsc::Receiver<Outgoing>,
    waiting: &AtomicUsize,
) -> End {
    while let Some(outgoing) = inbox.recv().await {
        let sent = match outgoing {
            Outgoing::Frame(frame) => write(writer, &frame).await,
            Outgoing::WithBuffer(message, buffer) => {
                let frame = frame::encode(&message);
                match buffer.export() {
                    Export::Memfd(fd) => send_with_fd(writer, &frame, fd).await,
                    // The handle of GPU memory is in the message.
                    Export::Cuda => write(writer, &frame).await,
                }
            }
            Outgoing::Last(message) => {
                return End::Theirs(match write(writer, &frame::encode(&message)).await {
                    Ok(()) => "the sidecar refused the engine".to_owned(),
                    Err(error) => error.to_string(),
                });
            }
        };
        if let Err(error) = sent {
            return End::Theirs(error.to_string());
        }
        waiting.fetch_sub(1, Ordering::AcqRel);
    }
    End::Theirs("shutting down".to_owned())
}

async fn write(writer: &OwnedWriteHalf, mut frame: &[u8]) -> io::Result<()> {
    while !frame.is_empty() {
        writer.writable().await?;
        match writer.try_write(frame) {
            Ok(written) => frame = &frame[written..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Closes both directions, so that the engine sees the end at once, even if another task still holds the
/// socket.
fn cut(writer: &OwnedWriteHalf) {
    let stream = writer.as_ref().as_fd();
    if let Err(error) = rustix::net::shutdown(stream, rustix::net::Shutdown::Both) {
        debug!(%error, "the engine has already closed the connection");
    }
}

/// Sends a frame and, with its first byte, a file descriptor.
async fn send_with_fd(writer: &OwnedWriteHalf, frame: &[u8], fd: BorrowedFd<'_>) -> io::Result<()> {
    let stream = writer.as_ref();
    let sent = stream
        .async_io(Interest::WRITABLE, || {
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            let fds = [fd];
            // The buffer for ancillary data has room for exactly one descriptor.
            let fits = ancillary.push(SendAncillaryMessage::ScmRights(&fds));
            debug_assert!(fits, "space for one descriptor");
            Ok(rustix::net::sendmsg(
                stream.as_fd(),
                &[io::IoSlice::new(frame)],
                &mut ancillary,
                SendFlags::NOSIGNAL,
            )?)
        })
        .await?;
    write(writer, &frame[sent..]).await
}
