//! Accepts client connections, sets their deadlines, and closes them gracefully.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::response::Response;
use http::header::CONNECTION;
use http::{HeaderValue, Request};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::select;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use tracing::{debug, error, info, warn};

use crate::openai::error::{ApiError, Code};
use crate::server::incoming;
use crate::server::seats::{BusyBody, Seat, Seats};
use crate::server::session::NextSession;
use crate::server::write_timeout::WriteTimeout;
use crate::state::app::App;
use crate::telemetry::metrics::clients::Connected;

/// The port to which clients connect.
pub(crate) struct Port {
    /// The listening socket.
    pub listener: TcpListener,
    /// Does the TLS handshake of a connection; `None` if clients connect without TLS.
    pub acceptor: Option<TlsAcceptor>,
}

impl std::fmt::Debug for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Port")
            .field("listener", &self.listener)
            .field("tls", &self.acceptor.is_some())
            .finish()
    }
}

/// Limits on the client connections.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Maximum number of connections at the same time, without the reserve.
    pub connections: usize,
    /// Longest wait for the TLS handshake, for a request's head, and for a client that does not read its
    /// answer.
    pub client_timeout: Duration,
}

/// Serves until `stop` is cancelled, and then waits up to 1 s for answers that are being written.
pub(crate) async fn serve(
    app: Arc<App>,
    port: Port,
    router: Router,
    limits: Limits,
    stop: CancellationToken,
) {
    let Port { listener, acceptor } = port;
    let seats = Arc::new(Seats::new(limits.connections));
    // A connection that has been asked to leave may still write, so it counts until it is closed.
    let places = Arc::new(Semaphore::new(limits.connections + RESERVE));
    let mut connections = JoinSet::new();
    loop {
        let (stream, peer, place) = select! {
            biased;
            () = stop.cancelled() => break,
            accepted = accept(&listener, &places) => accepted,
            Some(ended) = connections.join_next() => {
                // The task has panicked because of a defect. Only this connection ends.
                if let Err(e) = ended {
                    error!(error = %e, "the task of a client connection has failed");
                }
                continue;
            }
        };
        if let Err(e) = stream.set_nodelay(true) {
            debug!(error = %e, "the client has left already");
            continue;
        }
        // Take a seat before the task starts, so that the limit holds even if the tasks run late.
        let seat = seats.sit(Instant::now());
        if seat.displaces {
            app.metrics.idle_closed();
        }
        let client = Client {
            peer,
            _connected: app.metrics.connected(),
            app: Arc::clone(&app),
            seat: Arc::new(seat),
            router: router.clone(),
            limits,
            stop: stop.clone(),
            _place: place,
        };
        match &acceptor {
            None => connections.spawn(client.serve(stream)),
            Some(acceptor) => connections.spawn(client.serve_tls(acceptor.clone(), stream)),
        };
    }
    // Close the port first, so that no client connects to a proxy that stops.
    drop(listener);
    let all_closed = async { while connections.join_next().await.is_some() {} };
    if timeout(LAST_WORDS, all_closed).await.is_err() {
        debug!("client connections were still open at the end");
    }
    connections.shutdown().await;
}

/// Waits for a place, and then for the next connection.
async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> (TcpStream, SocketAddr, OwnedSemaphorePermit) {
    // The semaphore is never closed, so the call cannot fail.
    let place = Arc::clone(places)
        .acquire_owned()
        .await
        .expect("the semaphore stays open");
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => return (stream, peer, place),
            Err(e) => {
                // An accept most likely fails because the process has no file descriptor left. Wait
                // until other connections have closed.
                warn!(error = %e, "cannot accept a connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// A client connection with everything that serves it.
struct Client {
    peer: SocketAddr,
    app: Arc<App>,
    seat: Arc<Seat>,
    router: Router,
    limits: Limits,
    stop: CancellationToken,
    _place: OwnedSemaphorePermit,
    _connected: Connected,
}

impl Client {
    /// Does the TLS handshake within the client timeout, and then serves the connection.
    async fn serve_tls(self, acceptor: TlsAcceptor, stream: TcpStream) {
        let leave = self.seat.leave.clone();
        let handshake = timeout(self.limits.client_timeout, acceptor.accept(stream));
        let Some(handshake) = leave.run_until_cancelled(handshake).await else {
            return;
        };
        match handshake {
            Ok(Ok(stream)) => self.serve(stream).await,
            Ok(Err(e)) => debug!(error = %e, "the TLS handshake with a client failed"),
            Err(_) => debug!("a client did not finish its TLS handshake in time"),
        }
    }

    /// Serves the connection until it ends, the proxy stops, or a new connection takes its place.
    async fn serve<S>(self, stream: S)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (router, peer, app) = (self.router, self.peer, self.app);
        let seat = Arc::clone(&self.seat);
        let from = incoming::Connection {
            peer: peer.ip(),
            session: NextSession::default(),
        };
        let session = from.session.clone();
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(from.clone());
            let (router, app) = (router.clone(), Arc::clone(&app));
            let (busy, is_reserve) = (seat.begin(), seat.is_reserve);
            async move {
                let mut response = if is_reserve && request.uri().path().starts_with("/v1/") {
                    no_place(&app)
                } else {
                    router.oneshot(request).await.unwrap_or_else(|e| match e {})
                };
                if is_reserve {
                    let close = HeaderValue::from_static("close");
                    response.headers_mut().insert(CONNECTION, close);
                }
                Ok::<_, Infallible>(response.map(|body| Body::new(BusyBody::new(body, busy))))
            }
        });
        let io = TokioIo::new(WriteTimeout::new(stream, self.limits.client_timeout));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits.client_timeout)
            .serve_connection(io, service)
            .with_upgrades();
        let mut connection = pin!(connection);
        let ended = select! {
            biased;
            ended = connection.as_mut() => ended,
            () = self.stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
            () = self.seat.leave.cancelled() => {
                connection.as_mut().graceful_shutdown();
                match timeout(LEAVE_TIME, connection.as_mut()).await {
                    Ok(ended) => ended,
                    // A request began just before the connection was asked to leave, so the request may
                    // finish.
                    Err(_) if self.seat.is_busy() => connection.await,
                    Err(_) => Ok(()),
                }
            }
        };
        if let Err(e) = ended {
            debug!(error = %e, "client connection ended");
        }
        // The connection has changed its protocol. It keeps its place until the session ends.
        if let Some(session) = session.take() {
            let _busy = self.seat.begin();
            session.run().await;
        }
    }
}

/// Returns the error for a `/v1/` request on a connection of the reserve.
fn no_place(app: &App) -> Response {
    let most = app.config.max_connections;
    let text = format!("{most} connections are busy with requests (--max-connections)");
    let error = ApiError::new(Code::TooManyConnections, text);
    app.metrics.rejected(error.code());
    info!(code = error.code().as_str(), %error, "rejected");
    error.into_response()
}

/// Number of connections beyond `--max-connections`: for health probes, scrapers and the operator.
pub(crate) const RESERVE: usize = 64;

/// Time in which a connection that has lost its place can write its buffered data.
const LEAVE_TIME: Duration = Duration::from_millis(200);

/// Time in which the proxy writes the last bytes of answers that it breaks off after draining, so that
/// clients still get the error.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Pause after a failed accept. Without the pause, the accept would fail again and again, and use up a
/// core.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
