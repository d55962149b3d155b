//! One connection of a keyed socket, after the TLS handshake: the library's driver and the queues to it.

use std::time::Instant;

use bytes::Bytes;
use omq_tokio::Message;
use omq_tokio::engine::{
    ConnectionDriver, PeerDriverCommand, PeerDriverConfig, PeerDriverData, PeerEvent,
};
use omq_tokio::proto::connection::{ConnectionConfig, Role};
use omq_tokio::proto::{Connection, SocketType};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::stream::Stream;
use crate::zmq::{HANDSHAKE_TIMEOUT, HEARTBEAT, HEARTBEAT_TIMEOUT, LINGER, SEND_QUEUE, SendError};

/// The side of the process that owns a link, and its ZeroMQ socket.
#[derive(Clone, Debug)]
pub(super) struct Ours {
    pub(super) role: Role,
    pub(super) socket: SocketType,
    pub(super) identity: Bytes,
    pub(super) max_message: usize,
}

/// The queues to one connection. The connection ends when the last link to it is dropped.
#[derive(Debug)]
pub(super) struct Link {
    commands: mpsc::Sender<PeerDriverCommand>,
    data: mpsc::Sender<PeerDriverData>,
    cancel: CancellationToken,
}

/// The events of links, with the number of each link. The order of one link's events is kept.
pub(super) type Events = mpsc::Sender<(u64, PeerEvent)>;

/// The driver of one connection.
pub(super) type Driver = ConnectionDriver<Stream>;

/// Returns the driver of a connection, which the caller runs, and the queues to it.
pub(super) fn link(stream: Stream, number: u64, ours: &Ours, events: Events) -> (Driver, Link) {
    let config = ConnectionConfig::new(ours.role, ours.socket)
        .identity(ours.identity.clone())
        .max_message_size(ours.max_message);
    // A connection needs few commands: activation and the end.
    let (commands, inbox) = mpsc::channel(4);
    let (data, outgoing) = mpsc::channel(SEND_QUEUE as usize);
    let cancel = CancellationToken::new();
    let timing = PeerDriverConfig {
        handshake_timeout: Some(HANDSHAKE_TIMEOUT),
        heartbeat_interval: Some(HEARTBEAT),
        heartbeat_timeout: Some(HEARTBEAT_TIMEOUT),
        heartbeat_ttl: Some(HEARTBEAT_TIMEOUT),
        ..PeerDriverConfig::default()
    };
    let connection = Connection::new(config);
    let driver = ConnectionDriver::with_config(
        stream,
        connection,
        inbox,
        events,
        number,
        cancel.clone(),
        timing,
    )
    .with_data_inbox(outgoing);
    let link = Link {
        commands,
        data,
        cancel,
    };
    (driver, link)
}

impl Link {
    /// Lets messages pass. The driver waits for this command after ZeroMQ's handshake.
    pub(super) fn activate(&self) {
        // The queue is empty at this time. If the connection has ended, its end is on the way as an event.
        self.commands
            .try_send(PeerDriverCommand::ActivateDataPlane)
            .ok();
    }

    /// Queues a message and never waits.
    pub(super) fn send(&self, message: Message) -> Result<(), SendError> {
        let sent = self.data.try_send(PeerDriverData::SendMessage(message));
        sent.map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => SendError::Full,
            mpsc::error::TrySendError::Closed(_) => SendError::Gone,
        })
    }

    /// Returns true if the queue has room for a message.
    pub(super) fn has_room(&self) -> bool {
        self.data.capacity() > 0 || self.data.is_closed()
    }

    /// Ends the connection at once.
    pub(super) fn cut(&self) {
        self.cancel.cancel();
    }

    /// Sends the queued messages for a limited time, then ends the connection.
    pub(super) async fn drain(self) {
        let deadline = Instant::now() + LINGER;
        // The driver takes commands before data, so the data must have left the queue first.
        while self.data.capacity() < SEND_QUEUE as usize
            && !self.data.is_closed()
            && Instant::now() < deadline
        {
            tokio::time::sleep(DRAIN_LOOK).await;
        }
        let deadline = Some(deadline);
        let close = PeerDriverCommand::DrainAndClose { deadline };
        if self.commands.try_send(close).is_ok() {
            let closed = self.data.closed();
            tokio::time::timeout(LINGER, closed).await.ok();
        }
        self.cancel.cancel();
    }
}

/// Time between two looks whether a queue is empty.
const DRAIN_LOOK: std::time::Duration = std::time::Duration::from_millis(1);
