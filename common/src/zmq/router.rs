//! The bound side of the init, alloc and fetch ports.

use std::sync::Arc;

use bytes::Bytes;
use omq_tokio::SocketType;
use protocol::receiver::Route;

use super::keyed::{Protection, Router};
use super::plain_router::PlainRouter;
use super::{BindError, Closed, SendError, Traffic};
use crate::identity::Member;

/// A bound ROUTER socket: the init, the alloc or the fetch port.
///
/// Serves REQ and DEALER peers. A DEALER may leave out the empty delimiter frame. An answer has a delimiter frame if
/// the peer's message had a delimiter frame.
#[derive(Debug)]
pub struct RouterServer(Kind);

#[derive(Debug)]
enum Kind {
    Plain(Box<PlainRouter>),
    Keyed(Box<Router>),
}

/// The result of [`RouterServer::recv`].
#[derive(Clone, Debug, PartialEq)]
pub enum FromPeer {
    /// A message.
    Message(Route, Bytes),
    /// A connection whose messages were delivered has ended. The route is not used again.
    Lost(Route),
}

impl RouterServer {
    /// Binds `host:port`. Port 0 takes any free port, which [`RouterServer::port`] returns.
    ///
    /// # Errors
    /// See [`BindError`].
    pub async fn bind(
        host: &str,
        port: u16,
        max_message: usize,
        protection: &Protection,
    ) -> Result<Self, BindError> {
        Ok(Self(match protection {
            Protection::Plain => {
                Kind::Plain(Box::new(PlainRouter::bind(host, port, max_message).await?))
            }
            Protection::Keyed(keyed) => {
                let (keyed, plain) = (keyed.clone(), SocketType::Router);
                let router = Router::bind(host, port, max_message, keyed, plain, "").await?;
                Kind::Keyed(Box::new(router))
            }
        }))
    }

    /// Returns the port that was bound.
    pub fn port(&self) -> u16 {
        match &self.0 {
            Kind::Plain(router) => router.port(),
            Kind::Keyed(router) => router.port(),
        }
    }

    /// Waits for the next message or loss. A connection's messages are returned before its loss.
    ///
    /// # Errors
    /// Fails only if the socket's own task has ended.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn recv(&mut self) -> Result<FromPeer, Closed> {
        match &mut self.0 {
            Kind::Plain(router) => router.recv().await,
            Kind::Keyed(router) => router.recv().await,
        }
    }

    /// Queues a message to a peer, with a delimiter frame if the peer sends delimiter frames. Never waits.
    ///
    /// # Errors
    /// See [`SendError`].
    pub fn send(&mut self, route: Route, payload: impl Into<Bytes>) -> Result<(), SendError> {
        match &mut self.0 {
            Kind::Plain(router) => router.send(route, payload.into()),
            Kind::Keyed(router) => router.send(route, payload.into()),
        }
    }

    /// Ends a connection, e.g. of a peer that sends malformed messages. [`FromPeer::Lost`] follows.
    pub fn disconnect(&mut self, route: Route) {
        match &mut self.0 {
            Kind::Plain(router) => router.disconnect(route),
            Kind::Keyed(router) => router.disconnect(route),
        }
    }

    /// Returns a name for the peer: the principal of a peer that has proved a key. For other peers, the identity that
    /// the peer chose, as text, or the peer's address if the peer chose no identity. Logs show this name. A peer whose
    /// messages contain no name has only this name.
    pub fn name(&self, route: Route) -> Option<String> {
        match &self.0 {
            Kind::Plain(router) => router.name(route),
            Kind::Keyed(router) => router.name(route),
        }
    }

    /// Returns the name in the roster of the key that the peer has proved; `None` if the peer has proved no key.
    pub fn principal(&self, route: Route) -> Option<Arc<str>> {
        self.member(route).map(|member| Arc::clone(&member.name))
    }

    /// Returns the entry in the roster of the key that the peer has proved; `None` if the peer has proved no key.
    pub fn member(&self, route: Route) -> Option<&Member> {
        match &self.0 {
            Kind::Plain(_) => None,
            Kind::Keyed(router) => router.owner(route),
        }
    }

    /// Returns the peer's address, `ip:port`; `None` if the route has ended.
    pub fn address(&self, route: Route) -> Option<&str> {
        match &self.0 {
            Kind::Plain(router) => router.address(route),
            Kind::Keyed(router) => router.address(route),
        }
    }

    /// Returns the counters of the port, which the port continues to update.
    pub fn traffic(&self) -> Traffic {
        match &self.0 {
            Kind::Plain(router) => router.traffic(),
            Kind::Keyed(router) => router.traffic(),
        }
    }

    /// Stops listening and sends queued answers for at most 300 ms.
    pub async fn close(self) {
        match self.0 {
            Kind::Plain(router) => router.close().await,
            Kind::Keyed(router) => router.close().await,
        }
    }
}
