//! The receiving side of an engine's KV events: a SUB socket, and a DEALER socket for events that were missed.

use std::time::Duration;

use bytes::Bytes;
use omq_tokio::{Message, MonitorEvent, MonitorRecvError, MonitorStream, Socket, SocketType};

use super::{Closed, RECONNECT_MAX, endpoint, options};

/// A SUB socket to one publisher. It reconnects by itself.
#[derive(Debug)]
pub struct Subscriber {
    socket: Socket,
    monitor: MonitorStream,
    host: String,
    port: u16,
    redial: Option<tokio::time::Instant>,
}

/// The result of [`Subscriber::recv`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Published {
    /// A connection is up, for the first time or again. Messages may have been missed.
    Connected,
    /// A message with its number.
    Numbered(u64, Bytes),
    /// A message with other frames than the publisher's.
    Odd,
}

/// A DEALER socket that asks a publisher for messages again.
#[derive(Debug)]
pub struct Replay {
    socket: Socket,
}

impl Subscriber {
    /// Begins to connect, and subscribes to all topics with this prefix.
    ///
    /// # Errors
    /// Fails only if the socket's own task has ended, or if the host is not a name.
    pub async fn connect(host: &str, port: u16, topic: &str) -> Result<Self, Closed> {
        let options = options(MAX_EVENT_BYTES).recv_hwm(EVENT_QUEUE);
        let socket = Socket::new(SocketType::Sub, options);
        let monitor = socket.monitor();
        let topic = Bytes::copy_from_slice(topic.as_bytes());
        socket.subscribe(topic).await.map_err(|_| Closed)?;
        let there = endpoint(host, port);
        socket.connect(there).await.map_err(|_| Closed)?;
        Ok(Self {
            socket,
            monitor,
            host: host.to_owned(),
            port,
            redial: None,
        })
    }

    /// Waits for a message or a new connection.
    ///
    /// # Errors
    /// Fails only if the socket's own task has ended.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn recv(&mut self) -> Result<Published, Closed> {
        loop {
            let redial = self.redial;
            tokio::select! {
                biased;
                event = self.monitor.recv() => match event {
                    Ok(MonitorEvent::HandshakeSucceeded { .. }) => return Ok(Published::Connected),
                    // The library makes no further attempt after a refused handshake.
                    Ok(MonitorEvent::ConnectStopped { .. }) => {
                        self.redial = Some(tokio::time::Instant::now() + RECONNECT_MAX);
                    }
                    Err(MonitorRecvError::Closed) => return Err(Closed),
                    Ok(_) | Err(_) => {}
                },
                message = self.socket.recv() => {
                    let message = message.map_err(|_| Closed)?;
                    return Ok(numbered(&message).map_or(Published::Odd, |(number, payload)| {
                        Published::Numbered(number, payload)
                    }));
                }
                () = tokio::time::sleep_until(redial.unwrap_or_else(tokio::time::Instant::now)),
                    if redial.is_some() =>
                {
                    self.redial = None;
                    let there = endpoint(&self.host, self.port);
                    self.socket.connect(there).await.map_err(|_| Closed)?;
                }
            }
        }
    }
}

impl Replay {
    /// Begins to connect, and asks for all messages from number `from` on.
    ///
    /// # Errors
    /// Fails only if the socket's own task has ended, or if the host is not a name.
    pub async fn ask(host: &str, port: u16, from: u64) -> Result<Self, Closed> {
        let options = options(MAX_EVENT_BYTES)
            .recv_hwm(EVENT_QUEUE)
            .linger(Duration::ZERO);
        let socket = Socket::new(SocketType::Dealer, options);
        let there = endpoint(host, port);
        socket.connect(there).await.map_err(|_| Closed)?;
        let from = Bytes::copy_from_slice(&from.to_be_bytes());
        let question = Message::multipart([Bytes::new(), from]);
        socket.send(question).await.map_err(|_| Closed)?;
        Ok(Self { socket })
    }

    /// Waits for the next message; `None` at the end. The caller sets the deadline.
    ///
    /// # Errors
    /// Fails if the socket's own task has ended, or if a message has other frames than the publisher's.
    pub async fn next(&mut self) -> Result<Option<(u64, Bytes)>, Closed> {
        let message = self.socket.recv().await.map_err(|_| Closed)?;
        let (number, payload) = numbered(&message).ok_or(Closed)?;
        Ok((number != END).then_some((number, payload)))
    }
}

/// Returns the number and the payload of a message: its last two frames.
fn numbered(message: &Message) -> Option<(u64, Bytes)> {
    let last = message.len().checked_sub(1)?;
    let number = message.part_slice(last.checked_sub(1)?)?;
    let number = u64::from_be_bytes(number.try_into().ok()?);
    Some((number, message.part_bytes(last)?))
}

/// The number that ends a replay: -1.
const END: u64 = u64::MAX;

/// Maximum length of a message, in bytes. One step of an engine stores at most some 100,000 tokens, with at most 6
/// bytes per token.
pub const MAX_EVENT_BYTES: usize = 4 << 20;

/// Maximum number of received messages that wait. An engine sends at most one message per step.
const EVENT_QUEUE: u32 = 256;
