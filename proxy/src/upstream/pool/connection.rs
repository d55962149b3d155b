//! One HTTP connection. The task that waits for an answer drives the connection.

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

/// The byte stream of a connection.
pub(crate) type Stream = MaybeHttpsStream<TokioIo<TcpStream>>;

/// The body of a request.
pub(crate) type Outgoing = Full<Bytes>;

/// The HTTP/1 state machine, which turns requests into bytes and bytes into answers. The state
/// machine is boxed, because a `Link` is moved often.
type Wire = Box<Connection<Stream, Outgoing>>;

/// One connection.
pub(super) struct Link {
    sender: SendRequest<Outgoing>,
    /// `None` after the connection has ended.
    wire: Option<Wire>,
}

impl Link {
    /// Creates a connection over an open stream.
    pub(super) async fn over(stream: Stream) -> hyper::Result<Self> {
        let (sender, wire) = handshake(stream).await?;
        Ok(Self {
            sender,
            wire: Some(Box::new(wire)),
        })
    }

    /// Sends a request and waits for the head of the answer.
    pub(super) async fn send(
        mut self,
        request: Request<Outgoing>,
    ) -> Result<(Response<Incoming>, Self), TrySendError<Request<Outgoing>>> {
        // The future is polled with a waker that wakes nothing. Without `unconstrained`, a used-up task
        // budget would make the future wait for a wake-up that never comes.
        let mut answer = pin!(unconstrained(self.sender.try_send_request(request)));
        let answer =
            poll_fn(|cx| self.drive_until(cx, || answer.as_mut().poll(&mut no_waker()))).await?;
        Ok((answer, self))
    }

    /// Returns true if the connection can take a request.
    pub(super) fn is_idle(&mut self) -> bool {
        self.drive(&mut no_waker());
        self.wire.is_some() && self.sender.is_ready()
    }

    /// Drives the connection until `poll` is ready. `poll` and the first call of `drive` use a waker that
    /// wakes nothing. With the task's waker, data that passes between `poll` and the connection would wake
    /// the task that is already running. Only the last call of `drive` registers the task's waker.
    pub(super) fn drive_until<T>(
        &mut self,
        cx: &mut Context<'_>,
        mut poll: impl FnMut() -> Poll<T>,
    ) -> Poll<T> {
        self.drive(&mut no_waker());
        if let Poll::Ready(ready) = poll() {
            return Poll::Ready(ready);
        }
        self.drive(cx);
        poll()
    }

    /// Reads and writes as much as is possible without waiting. Ignores an error of the connection,
    /// because the task that waits for the answer gets this error in place of the answer.
    fn drive(&mut self, cx: &mut Context<'_>) {
        if let Some(wire) = &mut self.wire
            && Pin::new(wire).poll(cx).is_ready()
        {
            self.wire = None;
        }
    }
}

/// Returns a context that wakes no task.
pub(super) fn no_waker() -> Context<'static> {
    Context::from_waker(Waker::noop())
}
