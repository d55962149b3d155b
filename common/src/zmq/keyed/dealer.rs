//! The connecting side of a port whose peers prove a key.

use std::time::Duration;

use bytes::Bytes;
use omq_tokio::Message;
use omq_tokio::engine::PeerEvent;
use omq_tokio::proto::connection::Role as Side;
use omq_tokio::proto::{Event, SocketType};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tracing::{debug, warn};

use super::Keyed;
use super::link::{Link, Ours, link};
use super::stream::{Refused, dial};
use crate::zmq::{
    Closed, HANDSHAKE_TIMEOUT, LINGER, RECEIVE_QUEUE, RECONNECT_MAX, RECONNECT_MIN, SEND_QUEUE,
    SendError, payload, rare,
};

/// A connection to one address, made again and again by its task.
#[derive(Debug)]
pub(crate) struct Dealer {
    outgoing: mpsc::Sender<Message>,
    news: mpsc::Receiver<News>,
}

/// An event of a connection.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum News {
    /// The connection is up, for the first time or again.
    Connected {
        /// The type of the peer's socket.
        socket: Option<SocketType>,
        /// The identity of the peer's socket, which the peer has chosen.
        identity: Bytes,
        /// True if the peer has proved a key.
        is_keyed: bool,
    },
    /// A message.
    Message(Bytes),
    /// The connection has ended.
    Lost,
    /// A connection could not be made. The text is the reason.
    Failed(String),
    /// The peer made no handshake in time. It may get no core at the moment, so the next attempt can succeed.
    Slow,
}

impl Dealer {
    /// Begins to connect. A peer without a key, where one is permitted, gets a socket of the type `plain`.
    pub(crate) fn connect(
        host: &str,
        port: u16,
        identity: Bytes,
        max_message: usize,
        keyed: Keyed,
        plain: SocketType,
    ) -> Self {
        let (outgoing, waiting) = mpsc::channel(SEND_QUEUE as usize);
        let (tell, news) = mpsc::channel(RECEIVE_QUEUE as usize);
        let task = Task {
            host: host.to_owned(),
            port,
            keyed,
            ours: Ours {
                role: Side::Client,
                socket: SocketType::Dealer,
                identity,
                max_message,
            },
            plain,
            waiting,
            tell,
            failures: 0,
        };
        // The task ends soon after the sender of its queue is dropped: it first sends the queued messages.
        drop(tokio::spawn(task.run()));
        Self { outgoing, news }
    }

    /// Queues a message and never waits. While there is no connection, the message stays in the queue.
    pub(crate) fn send(&self, message: Message) -> Result<(), SendError> {
        let sent = self.outgoing.try_send(message);
        sent.map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => SendError::Full,
            mpsc::error::TrySendError::Closed(_) => SendError::Gone,
        })
    }

    /// Waits for the next event.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub(crate) async fn recv(&mut self) -> Result<News, Closed> {
        self.news.recv().await.ok_or(Closed)
    }

    /// Returns the next event if there is one now.
    pub(crate) fn try_recv(&mut self) -> Option<News> {
        self.news.try_recv().ok()
    }

    /// Sends queued messages for a limited time, then disconnects.
    pub(crate) async fn close(self, within: Duration) {
        let Self { outgoing, mut news } = self;
        drop(outgoing);
        let ended = async { while news.recv().await.is_some() {} };
        tokio::time::timeout(within, ended).await.ok();
    }
}

/// The reason of a handshake that was not made in time, as in the metric of refused handshakes.
const SLOW: &str = "timeout";

struct Task {
    host: String,
    port: u16,
    keyed: Keyed,
    ours: Ours,
    plain: SocketType,
    waiting: mpsc::Receiver<Message>,
    tell: mpsc::Sender<News>,
    failures: u64,
}

impl Task {
    async fn run(mut self) {
        let mut pause = RECONNECT_MIN;
        loop {
            let dialed = async {
                let dialed = dial(&self.host, self.port, &self.keyed);
                let dialed = tokio::time::timeout(HANDSHAKE_TIMEOUT, dialed).await;
                dialed.unwrap_or_else(|_| {
                    Err(Refused {
                        reason: SLOW,
                        text: format!("no handshake within {HANDSHAKE_TIMEOUT:?}"),
                    })
                })
            };
            let failed = match dialed.await {
                Ok((stream, _)) => {
                    let (up, error) = self.serve(stream).await;
                    if up {
                        pause = RECONNECT_MIN;
                    }
                    if self.waiting.is_closed() {
                        return;
                    }
                    match up {
                        true => News::Lost,
                        false => News::Failed(error),
                    }
                }
                Err(refused) => {
                    self.failures += 1;
                    if refused.reason != "unreached" && rare(self.failures) {
                        warn!(
                            host = self.host,
                            port = self.port,
                            reason = refused.reason,
                            total = self.failures,
                            "cannot connect: {}",
                            refused.text
                        );
                    }
                    match refused.reason {
                        SLOW => News::Slow,
                        _ => News::Failed(refused.text),
                    }
                }
            };
            // Messages that wait for a connection are lost when the caller has dropped the socket.
            if self.tell.send(failed).await.is_err() || self.waiting.is_closed() {
                return;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RECONNECT_MAX);
        }
    }

    /// Serves one connection until it ends. Returns true if it was up, and the reason of the end.
    async fn serve(&mut self, stream: super::stream::Stream) -> (bool, String) {
        let peer = stream
            .peer()
            .map_or_else(|e| e.to_string(), |a| a.to_string());
        let is_keyed = stream.is_keyed();
        let socket = match is_keyed {
            true => self.ours.socket,
            false => self.plain,
        };
        let ours = Ours {
            socket,
            ..self.ours.clone()
        };
        let (events, mut happened) = mpsc::channel(RECEIVE_QUEUE as usize);
        let (driver, link) = link(stream, 0, &ours, events);
        // The driver is owned by this task: it ends with the set.
        let mut driving = JoinSet::new();
        driving.spawn(driver.run());
        let mut up = false;
        loop {
            tokio::select! {
                biased;
                event = happened.recv() => {
                    let news = match event {
                        Some((_, PeerEvent::Event(Event::HandshakeSucceeded { peer_properties, .. }))) => {
                            up = true;
                            link.activate();
                            News::Connected {
                                socket: peer_properties.socket_type,
                                identity: peer_properties.identity.clone().unwrap_or_default(),
                                is_keyed,
                            }
                        }
                        Some((_, PeerEvent::Event(Event::Message(message)))) => match payload(&message) {
                            Some(payload) => News::Message(payload),
                            None => continue,
                        },
                        Some((_, PeerEvent::Event(Event::Command(_)))) => continue,
                        Some((_, PeerEvent::Closed { error })) => {
                            debug!(peer, ?error, "connection ended");
                            return (up, error.unwrap_or_else(|| "the peer has ended the connection".to_owned()));
                        }
                        None => return (up, "the connection has ended".to_owned()),
                    };
                    if self.tell.send(news).await.is_err() {
                        // Nobody reads any more. The queued messages are still sent.
                        self.end(link, &mut driving).await;
                        return (up, String::new());
                    }
                }
                message = self.waiting.recv(), if up && link.has_room() => match message {
                    Some(message) => {
                        if let Err(SendError::Gone) = link.send(message) {
                            debug!(peer, "a message was lost with its connection");
                        }
                    }
                    None => {
                        self.end(link, &mut driving).await;
                        return (up, String::new());
                    }
                },
                // The caller has dropped the socket. Its queued messages still wait for the connection for a while.
                () = lingered(&self.tell), if !up => return (up, String::new()),
            }
        }
    }

    /// Sends the queued messages for a limited time.
    async fn end(&mut self, link: Link, driving: &mut JoinSet<omq_tokio::error::Result<()>>) {
        self.waiting.close();
        while let Ok(message) = self.waiting.try_recv() {
            if link.send(message).is_err() {
                break;
            }
        }
        link.drain().await;
        driving.abort_all();
    }
}

/// Waits until the receiver of the events is dropped, and then for [`LINGER`].
async fn lingered(tell: &mpsc::Sender<News>) {
    tell.closed().await;
    tokio::time::sleep(LINGER).await;
}
