//! The connecting side of the alloc and fetch ports.

use bytes::Bytes;
use omq_tokio::SocketType;

use super::keyed::{Dealer, News, Protection};
use super::plain_dealer::PlainDealer;
use super::{Closed, MAX_ALLOC_BYTES, SendError, delimited};

/// A DEALER socket to one receiver's alloc port. It reconnects by itself. After the socket is
/// dropped, it still sends queued messages for at most 300 ms.
#[derive(Debug)]
pub struct DealerClient(Kind);

#[derive(Debug)]
enum Kind {
    Plain(Box<PlainDealer>),
    Keyed {
        dealer: Dealer,
        /// True if a failed attempt to connect counts as a loss.
        once: bool,
    },
}

/// The result of [`DealerClient::recv`].
#[derive(Clone, Debug, PartialEq)]
pub enum FromServer {
    /// The connection is up, for the first time or again.
    Connected {
        /// True if the peer's socket is a ROUTER; false for a REP.
        router: bool,
    },
    /// A message.
    Message(Bytes),
    /// The connection has ended; the socket tries to reconnect. With [`DealerClient::connect_once`] also: the connection
    /// could not be made.
    Lost,
}

impl DealerClient {
    /// Begins to connect. `identity` names this sender at the receiver and has at most 255 bytes. The identity must
    /// not be guessable, because a receiver whose peers prove no key accepts the first connection that uses it.
    ///
    /// # Errors
    /// Fails only if the socket's own task has ended.
    pub async fn connect(
        host: &str,
        port: u16,
        identity: &str,
        protection: &Protection,
    ) -> Result<Self, Closed> {
        let keyed = match protection {
            Protection::Plain => {
                let plain = PlainDealer::connect(host, port, identity).await?;
                return Ok(Self(Kind::Plain(Box::new(plain))));
            }
            Protection::Keyed(keyed) => keyed.clone(),
        };
        let mut identity = Bytes::copy_from_slice(identity.as_bytes());
        identity.truncate(255);
        let plain = SocketType::Dealer;
        let dealer = Dealer::connect(host, port, identity, MAX_ALLOC_BYTES, keyed, plain);
        let once = false;
        Ok(Self(Kind::Keyed { dealer, once }))
    }

    /// Begins to connect, as [`DealerClient::connect`]. If the peer refuses the connection,
    /// [`DealerClient::recv`] returns [`FromServer::Lost`] at once.
    ///
    /// # Errors
    /// Fails only if the socket's own task has ended.
    pub async fn connect_once(
        host: &str,
        port: u16,
        identity: &str,
        protection: &Protection,
    ) -> Result<Self, Closed> {
        if let Protection::Plain = protection {
            let plain = PlainDealer::connect_once(host, port, identity).await?;
            return Ok(Self(Kind::Plain(Box::new(plain))));
        }
        let mut client = Self::connect(host, port, identity, protection).await?;
        if let Kind::Keyed { once, .. } = &mut client.0 {
            *once = true;
        }
        Ok(client)
    }

    /// Waits for a message or a change of the connection.
    ///
    /// # Errors
    /// Fails only if the socket's own task has ended.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn recv(&mut self) -> Result<FromServer, Closed> {
        let (dealer, once) = match &mut self.0 {
            Kind::Plain(plain) => return plain.recv().await,
            Kind::Keyed { dealer, once } => (dealer, *once),
        };
        loop {
            return Ok(match dealer.recv().await? {
                News::Connected { socket, .. } => FromServer::Connected {
                    router: socket == Some(SocketType::Router),
                },
                News::Message(payload) => FromServer::Message(payload),
                News::Lost => FromServer::Lost,
                News::Failed(_) | News::Slow if once => FromServer::Lost,
                News::Failed(_) | News::Slow => continue,
            });
        }
    }

    /// Queues a message and never waits. While there is no connection, the message stays in the queue.
    ///
    /// # Errors
    /// See [`SendError`].
    pub fn send(&mut self, payload: impl Into<Bytes>) -> Result<(), SendError> {
        match &mut self.0 {
            Kind::Plain(plain) => plain.send(payload.into()),
            Kind::Keyed { dealer, .. } => dealer.send(delimited(payload.into())),
        }
    }
}
