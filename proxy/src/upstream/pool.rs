//! Connections to engines and sidecars, kept open between requests.
//!
//! The task that waits for an answer drives the connection itself. If each connection had a task of its own,
//! as in most HTTP clients, every chunk of a stream would need two task switches before the proxy could write
//! it to the client.

pub(crate) mod connection;

use std::collections::{HashMap, VecDeque};
use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderValue, Request, Response, Uri, header};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::connect::HttpConnector;
use tower::ServiceExt;

use crate::fleet::zone::{self, Resolver};
use connection::{Link, Outgoing, Stream, no_waker};

/// Scheme, host and port to which a connection leads.
type Origin = (Scheme, Authority);

/// Opens connections and keeps idle connections.
pub(crate) struct Pool {
    connector: HttpsConnector<HttpConnector<Resolver>>,
    idle: Mutex<Idle>,
}

#[derive(Default)]
struct Idle {
    /// Idle connections by origin; the connection that was used last is at the back.
    connections: HashMap<Origin, VecDeque<Waiting>>,
    /// Time of the last sweep; `None` before the first sweep.
    swept: Option<Instant>,
}

/// An idle connection, and the time at which it became idle.
struct Waiting {
    link: Link,
    since: Instant,
}

/// A request that got no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    /// No connection could be opened: no server has seen the request.
    #[error("{0}")]
    Connect(String),
    /// The connection ended, or the received bytes are not an HTTP answer.
    #[error("{0}")]
    Lost(String),
}

/// The body of an answer. After the body's last byte the connection goes back to the pool. If the body is
/// dropped earlier, the connection closes, so that the engine aborts the request.
pub(crate) struct LinkBody {
    incoming: Incoming,
    /// `None` after the connection has gone back to the pool.
    link: Option<Link>,
    origin: Origin,
    pool: Arc<Pool>,
}

impl Pool {
    /// Creates a pool without connections.
    pub(crate) fn new(connector: HttpsConnector<HttpConnector<Resolver>>) -> Self {
        Self {
            connector,
            idle: Mutex::default(),
        }
    }

    /// Sends a request and returns when the head of the answer has come.
    ///
    /// # Errors
    /// There was no answer.
    ///
    /// # Cancel safety
    /// Dropping the future closes the connection.
    pub(crate) async fn request(
        self: &Arc<Self>,
        mut request: Request<Outgoing>,
    ) -> Result<Response<LinkBody>, LinkError> {
        let uri = request.uri().clone();
        let (Some(scheme), Some(authority)) = (uri.scheme(), uri.authority()) else {
            return Err(LinkError::Connect(format!("{uri} names no host")));
        };
        let origin = (scheme.clone(), authority.clone());
        address(&mut request, &uri)?;
        while let Some(link) = self.take(&origin) {
            let again = request.clone();
            let sent = Instant::now();
            request = match link.send(request).await {
                Ok(answer) => return Ok(self.answer(origin, answer)),
                Err(mut error) => match error.take_message() {
                    // The connection was closed in the meantime and no byte of the request was written,
                    // so the request can safely be sent again.
                    Some(request) => request,
                    // The engine closed the connection while the request was in flight. An engine aborts
                    // a request when its connection ends, so the repeated request computes nothing
                    // twice.
                    None if is_closed(error.error()) && sent.elapsed() < JUST_CLOSED => {
                        request = again;
                        break;
                    }
                    None => return Err(LinkError::Lost(with_cause(error.error()))),
                },
            };
        }
        let link = Link::over(self.open(uri).await?).await;
        let link = link.map_err(|e| LinkError::Connect(with_cause(&e)))?;
        match link.send(request).await {
            Ok(answer) => Ok(self.answer(origin, answer)),
            Err(error) => Err(LinkError::Lost(with_cause(error.error()))),
        }
    }

    /// Opens a connection for this request only, which does not go back to the pool. Gives the request the form that
    /// its server expects.
    ///
    /// # Errors
    /// No connection could be opened.
    pub(crate) async fn connect(
        &self,
        request: &mut Request<Outgoing>,
    ) -> Result<Stream, LinkError> {
        let uri = request.uri().clone();
        address(request, &uri)?;
        self.open(uri).await
    }

    async fn open(&self, uri: Uri) -> Result<Stream, LinkError> {
        let connected = self.connector.clone().oneshot(uri).await;
        connected.map_err(|e| LinkError::Connect(with_cause(&*e)))
    }

    fn answer(
        self: &Arc<Self>,
        origin: Origin,
        (answer, link): (Response<Incoming>, Link),
    ) -> Response<LinkBody> {
        answer.map(|incoming| LinkBody {
            incoming,
            link: Some(link),
            origin,
            pool: Arc::clone(self),
        })
    }

    /// Returns the idle connection to `origin` that was used last and is still open; `None` if there is
    /// none.
    fn take(&self, origin: &Origin) -> Option<Link> {
        let now = Instant::now();
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = idle.connections.get_mut(origin)?;
        while let Some(Waiting { mut link, since }) = waiting.pop_back() {
            if now.duration_since(since) < IDLE && link.is_idle() {
                return Some(link);
            }
        }
        None
    }

    /// Returns a connection to the pool, or closes it if it cannot take another request.
    fn put(&self, origin: &Origin, mut link: Link) {
        if !link.is_idle() {
            return;
        }
        let since = Instant::now();
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.sweep(since);
        let waiting = Waiting { link, since };
        match idle.connections.get_mut(origin) {
            Some(others) => others.push_back(waiting),
            None => drop(idle.connections.insert(origin.clone(), [waiting].into())),
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").finish_non_exhaustive()
    }
}

impl Idle {
    /// Closes connections that have been idle for too long, including connections to engines that get no
    /// requests any more. The call-backs return a connection every few seconds, so this function runs
    /// regularly.
    fn sweep(&mut self, now: Instant) {
        if self.swept.is_some_and(|at| now.duration_since(at) < IDLE) {
            return;
        }
        self.swept = Some(now);
        self.connections.retain(|_, waiting| {
            waiting.retain(|one| now.duration_since(one.since) < IDLE);
            !waiting.is_empty()
        });
    }
}

impl Body for LinkBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let body = self.get_mut();
        let Some(link) = &mut body.link else {
            return Poll::Ready(None);
        };
        let incoming = &mut body.incoming;
        let mut next = || Pin::new(&mut *incoming).poll_frame(&mut no_waker());
        let mut frame = next();
        if frame.is_pending() {
            frame = link.drive_until(cx, next);
        }
        if matches!(frame, Poll::Ready(None))
            && let Some(link) = body.link.take()
        {
            body.pool.put(&body.origin, link);
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.link.is_none() || self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}

impl fmt::Debug for LinkBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LinkBody")
            .field("origin", &self.origin)
            .finish_non_exhaustive()
    }
}

/// Gives a request the form that a server expects: only the path in the request line, and the host in a
/// header.
fn address(request: &mut Request<Outgoing>, uri: &Uri) -> Result<(), LinkError> {
    let path = uri.path_and_query().cloned();
    *request.uri_mut() = path.unwrap_or(PathAndQuery::from_static("/")).into();
    let authority = uri.authority().map_or("", Authority::as_str);
    let host = authority
        .rsplit_once('@')
        .map_or(authority, |(_, host)| host);
    // A zone names an interface of this host. The zone means nothing to the server and is not sent.
    let zoned = uri
        .host()
        .and_then(zone::of)
        .map(|(address, _)| match uri.port() {
            Some(port) => format!("[{address}]:{port}"),
            None => format!("[{address}]"),
        });
    let host = HeaderValue::from_str(zoned.as_deref().unwrap_or(host))
        .map_err(|e| LinkError::Connect(e.to_string()))?;
    request.headers_mut().insert(header::HOST, host);
    Ok(())
}

/// Returns true if the connection ended before an answer, with or without a reset.
fn is_closed(error: &hyper::Error) -> bool {
    let source = error.source().and_then(|e| e.downcast_ref::<io::Error>());
    error.is_incomplete_message()
        || error.is_canceled()
        || source.is_some_and(|e| {
            let kind = e.kind();
            matches!(
                kind,
                io::ErrorKind::ConnectionReset
                    | io::ErrorKind::BrokenPipe
                    | io::ErrorKind::UnexpectedEof
            )
        })
}

/// Returns the text of an error with its sources. hyper's errors name the failure, and only their
/// sources name the cause.
pub(crate) fn with_cause(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// If a connection closes within this time after a request was sent, the engine had probably closed the
/// connection before the request came, so the proxy repeats the request. The proxy notices the close within
/// about one round trip. If a connection closes later, the cause is different, for example an engine that
/// died, and the proxy does not repeat the request.
const JUST_CLOSED: Duration = Duration::from_secs(1);

/// Longest idle time of a connection. vLLM's HTTP server closes idle connections after 5 s; a request on
/// a connection that is just closing would fail.
const IDLE: Duration = Duration::from_secs(3);
