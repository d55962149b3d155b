//! One connection, driven by whoever waits for its answer.

use std::future::{Future as _, poll_fn};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;
use hyper::client::conn::http1::{Connection, SendRequest, handshake};
use hyper_rustls::MaybeHttpsStream;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::coop::unconstrained;

/// What it runs over.
type Stream = MaybeHttpsStream<TokioIo<TcpStream>>;

/// What a request carries.
pub(super) type Outgoing = Full<Bytes>;

/// What turns requests into bytes and bytes into answers; boxed, because it is moved about.
type Wire = Box<Connection<Stream, Outgoing>>;

/// One connection.
pub(super) struct Link {
    sender: SendRequest<Outgoing>,
    /// `None` once it has ended.
    wire: Option<Wire>,
}

impl Link {
    /// Over a stream that is open.
    pub(super) async fn over(stream: Stream) -> hyper::Result<Self> {
        let (sender, wire) = handshake(stream).await?;
        Ok(Self {
            sender,
            wire: Some(Box::new(wire)),
        })
    }

    /// Sends a request and waits for the answer's head.
    pub(super) async fn send(
        mut self,
        request: Request<Outgoing>,
    ) -> Result<(Response<Incoming>, Self), TrySendError<Request<Outgoing>>> {
        // What would make it wait for a wake-up of its own, a used-up budget, would not be heard.
        let mut answer = pin!(unconstrained(self.sender.try_send_request(request)));
        let answer =
            poll_fn(|cx| self.drive_until(cx, || answer.as_mut().poll(&mut nobody()))).await?;
        Ok((answer, self))
    }

    /// It can take a request.
    pub(super) fn is_idle(&mut self) -> bool {
        self.drive(&mut nobody());
        self.wire.is_some() && self.sender.is_ready()
    }

    /// Drives the connection until `poll`, which hears of nothing else, is ready. What passes between the
    /// two would wake the very task that is running, so nobody is to be woken until there is no more of it.
    pub(super) fn drive_until<T>(
        &mut self,
        cx: &mut Context<'_>,
        mut poll: impl FnMut() -> Poll<T>,
    ) -> Poll<T> {
        self.drive(&mut nobody());
        if let Poll::Ready(ready) = poll() {
            return Poll::Ready(ready);
        }
        self.drive(cx);
        poll()
    }

    /// Reads and writes what can be. How a connection ends is told to whoever waits for its answer.
    fn drive(&mut self, cx: &mut Context<'_>) {
        if let Some(wire) = &mut self.wire
            && Pin::new(wire).poll(cx).is_ready()
        {
            self.wire = None;
        }
    }
}

/// Wakes nobody.
pub(super) fn nobody() -> Context<'static> {
    Context::from_waker(Waker::noop())
}
