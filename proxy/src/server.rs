//! Accepts client connections, each with its deadlines, and closes them gracefully.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use http::Request;
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
use tracing::{debug, error, warn};

use crate::patience::Patience;

/// Where clients connect.
pub struct Port {
    /// The socket.
    pub listener: TcpListener,
    /// Makes TLS of their connections.
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

/// What one connection may do.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at once.
    pub connections: usize,
    /// Longest wait for a request's head, or for a client that does not read its answer.
    pub client_timeout: Duration,
}

/// Serves until `stop`, then lets answers that are being written finish.
pub async fn serve(port: Port, router: Router, limits: Limits, stop: CancellationToken) {
    let Port { listener, acceptor } = port;
    let places = Arc::new(Semaphore::new(limits.connections));
    let mut connections = JoinSet::new();
    loop {
        let (stream, peer, place) = select! {
            biased;
            () = stop.cancelled() => break,
            accepted = accept(&listener, &places) => accepted,
            Some(ended) = connections.join_next() => {
                // A defect that one request has met; the others go on.
                if let Err(e) = ended {
                    error!(error = %e, "a connection's task has failed");
                }
                continue;
            }
        };
        if let Err(e) = stream.set_nodelay(true) {
            debug!(error = %e, "the client has gone already");
            continue;
        }
        let client = Client {
            peer,
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
    drop(listener);
    let all_closed = async { while connections.join_next().await.is_some() {} };
    if timeout(LAST_WORDS, all_closed).await.is_err() {
        debug!("connections were still open at the end");
    }
    connections.shutdown().await;
}

/// The next connection, once there is a place for it.
async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> (TcpStream, SocketAddr, OwnedSemaphorePermit) {
    // Never closed.
    let place = Arc::clone(places)
        .acquire_owned()
        .await
        .expect("the semaphore stays open");
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => return (stream, peer, place),
            Err(e) => {
                // Out of file descriptors, mostly: some are freed as others finish.
                warn!(error = %e, "cannot accept a connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// One connection's client.
struct Client {
    peer: SocketAddr,
    router: Router,
    limits: Limits,
    stop: CancellationToken,
    _place: OwnedSemaphorePermit,
}

impl Client {
    async fn serve_tls(self, acceptor: TlsAcceptor, stream: TcpStream) {
        match timeout(self.limits.client_timeout, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => self.serve(stream).await,
            Ok(Err(e)) => debug!(error = %e, "no TLS with a client"),
            Err(_) => debug!("a client did not finish its TLS handshake in time"),
        }
    }

    async fn serve<S>(self, stream: S)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (router, peer) = (self.router, self.peer);
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(peer);
            let router = router.clone();
            async move {
                Ok::<_, Infallible>(router.oneshot(request).await.unwrap_or_else(|e| match e {}))
            }
        });
        let io = TokioIo::new(Patience::new(stream, self.limits.client_timeout));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits.client_timeout)
            .serve_connection(io, service);
        let mut connection = pin!(connection);
        let ended = select! {
            biased;
            ended = connection.as_mut() => ended,
            () = self.stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(e) = ended {
            debug!(error = %e, "client connection ended");
        }
    }
}

/// What answers cut off at the end of draining get, to be written and read.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// After a failed accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
