//! Connects to one receiver: makes the handshake, chooses the wire, and reads the messages of its alloc port.

use std::sync::Arc;
use std::time::Duration;

use common::zmq::{DealerClient, FromServer, Protection};
use protocol::local::Target;
use protocol::message::{Hello, ToSender};
use protocol::{Reason, codec};
use tokio::sync::mpsc;
use tracing::warn;

use crate::net::host_id;
use crate::peer::handshake::{self, Identity};
use crate::transport::expected_rate::{Ends, ExpectedRate};
use crate::transport::set::Wires;
use crate::transport::{HandshakeFields, Link, Remote};

/// An event that a connection sends to its owner.
#[derive(Debug)]
pub(super) enum News {
    Up(Target, Box<Made>),
    Failed(Target, Reason, String),
    Message(Target, ToSender),
    Malformed(Target),
    Lost(Target),
}

/// The kind of a receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReceiverKind {
    /// A sidecar's receiver.
    Ours,
    /// LMCache's receiver. `cancels` is true for the asynchronous receiver, which frees keys on `CancelNotif`.
    Lmcache { cancels: bool },
}

/// The result of a handshake that succeeded.
#[derive(Debug)]
pub(super) struct Made {
    /// The receiver's hello; `None` for LMCache.
    pub(super) hello: Option<Hello>,
    pub(super) kind: ReceiverKind,
    pub(super) slots: u32,
    pub(super) link: Arc<dyn Link>,
    pub(super) why: String,
    pub(super) expected_rate: ExpectedRate,
}

impl Made {
    /// Returns the receiver's name for logs.
    pub(super) fn name(&self) -> &str {
        match (&self.hello, self.kind) {
            (Some(hello), _) => &hello.id,
            (None, ReceiverKind::Lmcache { cancels: true }) => "LMCache (async)",
            (None, _) => "LMCache (sync)",
        }
    }
}

/// The connection to one receiver, from the handshake to its loss.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) to: Target,
    pub(super) generation: u64,
    /// The sender's own identity. A sender exports no memory, so it has no pages; it has one row, because
    /// LMCache requires a row.
    pub(super) ours: Identity,
    pub(super) wires: Wires,
    /// The protection of the init and the alloc channel.
    pub(super) protection: Protection,
    pub(super) deadline: Duration,
    pub(super) events: mpsc::Sender<(u64, News)>,
}

impl Connection {
    pub(super) async fn run(self, identity: String, mut outgoing: mpsc::Receiver<Vec<u8>>) {
        let (made, mut dealer) = match self.open(&identity).await {
            Ok(opened) => opened,
            Err((reason, error)) => {
                let to = self.to.clone();
                return self.say(News::Failed(to, reason, error)).await;
            }
        };
        self.say(News::Up(self.to.clone(), Box::new(made))).await;
        loop {
            tokio::select! {
                biased;
                Some(payload) = outgoing.recv() => {
                    if let Err(error) = dealer.send(payload) {
                        warn!(to = ?self.to, %error, "message to a receiver dropped");
                    }
                }
                received = dealer.recv() => match received {
                    Ok(FromServer::Connected { .. }) => {}
                    Ok(FromServer::Message(bytes)) => match codec::decode(&bytes) {
                        Ok(message) => {
                            self.say(News::Message(self.to.clone(), message)).await;
                        }
                        Err(error) => {
                            warn!(to = ?self.to, %error, "malformed message");
                            self.say(News::Malformed(self.to.clone())).await;
                        }
                    },
                    Ok(FromServer::Lost) | Err(_) => {
                        return self.say(News::Lost(self.to.clone())).await;
                    }
                }
            }
        }
    }

    /// Makes the handshake and then the socket to the alloc port.
    async fn open(&self, identity: &str) -> Result<(Made, DealerClient), (Reason, String)> {
        let no_link = |error: String| (Reason::NoLink, error);
        let mut made = tokio::time::timeout(self.deadline, self.make())
            .await
            .map_err(|_| no_link(format!("no handshake within {:?}", self.deadline)))??;
        let mut dealer = DealerClient::connect(
            &self.to.host,
            self.to.alloc_port,
            identity,
            &self.protection,
        )
        .await
        .map_err(|error| no_link(format!("cannot make the alloc socket: {error}")))?;
        // A receiver that sends no hello belongs to LMCache. Only the type of its alloc socket shows whether
        // the receiver is asynchronous.
        if made.hello.is_none() {
            let cancels = self
                .connected_to_router(&mut dealer)
                .await
                .ok_or_else(|| no_link("the receiver's alloc port does not answer".to_owned()))?;
            made.kind = ReceiverKind::Lmcache { cancels };
        }
        Ok((made, dealer))
    }

    async fn make(&self) -> Result<Made, (Reason, String)> {
        let linked = handshake::handshake(&self.to, &self.ours, &self.protection, self.deadline)
            .await
            .map_err(|e| (e.reason(), e.to_string()))?;
        // Each wire checks the receiver's slots when it links, so that a wrong slot layout is an error before
        // the first write.
        let hello = linked.hello;
        let slots = linked.pages.slots;
        let mut remote = Remote {
            name: format!("{}:{}", self.to.host, self.to.init_port),
            id: match &self.protection {
                Protection::Keyed(_) => hello.as_ref().map(|hello| hello.id.clone()),
                Protection::Plain => None,
            },
            fields: HandshakeFields {
                metadata: linked.metadata,
                rows: linked.rows,
            },
            memory: linked.memory,
            slots,
            slot_bytes: linked.pages.slot_bytes,
            address: None,
        };
        let mut failed = Vec::new();
        let (link, chosen) = loop {
            let (transport, chosen) = self
                .wires
                .choose(hello.as_ref(), &self.to.host, &failed)
                .map_err(|e| (e.reason(), e.to_string()))?;
            remote.address.clone_from(&chosen.address);
            match transport.link(remote.clone()).await {
                Ok(link) => break (link, chosen),
                // The loop tries each wire at most once, because a wire that has failed is not chosen again.
                // LMCache has only one wire.
                Err(error) if self.wires.may_choose() && hello.is_some() => {
                    warn!(
                        peer = error.peer, transport = %error.kind, error = error.cause,
                        "a transport failed: trying the next"
                    );
                    failed.push((error.kind, error.cause));
                }
                Err(error) => return Err((Reason::NoLink, error.to_string())),
            }
        };
        // The memory and the hosts of both ends determine the rate to expect from the wire.
        let ends = Ends {
            ours: self.wires.memory(),
            theirs: remote.memory,
            same_host: hello
                .as_ref()
                .is_some_and(|hello| hello.host == host_id::identity()),
        };
        Ok(Made {
            hello,
            kind: ReceiverKind::Ours,
            expected_rate: ExpectedRate::of(link.kind(), ends),
            slots,
            link,
            why: chosen.why,
        })
    }

    /// Waits for the connection to an LMCache receiver's alloc port. Returns true if the receiver is
    /// asynchronous; `None` if the receiver does not answer in time.
    async fn connected_to_router(&self, dealer: &mut DealerClient) -> Option<bool> {
        let connected = async {
            loop {
                match dealer.recv().await {
                    Ok(FromServer::Connected { router }) => return Some(router),
                    Ok(_) => {}
                    Err(_) => return None,
                }
            }
        };
        tokio::time::timeout(self.deadline, connected).await.ok()?
    }

    async fn say(&self, event: News) {
        // The owner is gone only when the process ends.
        let sent = self.events.send((self.generation, event)).await;
        debug_assert!(sent.is_ok() || self.events.is_closed());
    }
}
