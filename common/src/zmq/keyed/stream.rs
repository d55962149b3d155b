//! One TCP connection with the TLS handshake, or without it where a peer needs no key.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use omq_tokio::engine::driver::DriverStream;
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{self, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use super::Keyed;
use crate::host::bare;
use crate::identity::{self, Auth, Expected, Member, PublicKey};
use crate::zmq::TCP_TIMEOUT;

/// A connection to a peer.
#[derive(Debug)]
pub(super) enum Stream {
    /// The peer has proved no key.
    Plain(TcpStream),
    /// The peer has proved its key.
    Tls(Box<TlsStream<TcpStream>>),
}

/// Reason why a connection was refused in the handshake.
#[derive(Debug)]
pub(super) struct Refused {
    /// Name in metrics.
    pub(super) reason: &'static str,
    /// The error, for logs.
    pub(super) text: String,
}

/// A connection, and the owner of the key that the peer has proved; `None` without a key.
pub(super) type Made = (Stream, Option<(PublicKey, Member)>);

/// Completes the handshake of an accepted connection. The caller sets the deadline.
pub(super) async fn accept(
    tcp: TcpStream,
    keyed: &Keyed,
    config: Arc<ServerConfig>,
) -> Result<Made, Refused> {
    options(&tcp).map_err(|e| tls(&e))?;
    // A TLS client speaks first, and its first byte is the type of a handshake record. A ZeroMQ peer begins with
    // 0xff. The byte stays in the socket for the handshake.
    let mut first = [0u8];
    match tcp.peek(&mut first).await {
        Ok(0) => return Err(refused("tls", "the peer has closed the connection")),
        Ok(_) if first[0] == TLS_HANDSHAKE => {}
        Ok(_) if first[0] == ZMTP_GREETING && keyed.identity.auth() == Auth::Prefer => {
            return Ok((Stream::Plain(tcp), None));
        }
        Ok(_) if first[0] == ZMTP_GREETING => {
            let text = "the peer proves no key; set sidecar.auth and a key there, or use prefer here for the time of a migration";
            return Err(refused("plain", text));
        }
        Ok(_) => return Err(refused("tls", "the peer speaks neither TLS nor ZeroMQ")),
        Err(error) => return Err(tls(&error)),
    }
    let tls_stream = TlsAcceptor::from(config).accept(tcp).await;
    let tls_stream = tls_stream.map_err(|e| tls(&e))?;
    let expected = Expected {
        roles: keyed.roles,
        ..Expected::default()
    };
    made(TlsStream::Server(tls_stream), keyed, &expected)
}

/// Connects to an address and completes the handshake. The caller sets the deadline.
pub(super) async fn dial(host: &str, port: u16, keyed: &Keyed) -> Result<Made, Refused> {
    let bare = bare(host);
    let connect = || async {
        let tcp = TcpStream::connect((bare, port)).await;
        let tcp = tcp.map_err(|e| refused("unreached", e.to_string()))?;
        options(&tcp).map_err(|e| tls(&e))?;
        Ok::<_, Refused>(tcp)
    };
    let expected = Expected {
        roles: keyed.roles,
        host: Some(bare.to_owned()),
        keys: keyed.keys.clone(),
        ..Expected::default()
    };
    let tcp = connect().await?;
    let config = identity::client(&keyed.identity, expected.clone());
    // The name is not sent and not checked: the key identifies the peer.
    let name = ServerName::IpAddress(std::net::Ipv4Addr::LOCALHOST.into());
    match TlsConnector::from(config).connect(name, tcp).await {
        Ok(stream) => made(TlsStream::Client(stream), keyed, &expected),
        Err(error) if keyed.identity.auth() == Auth::Prefer && speaks_no_tls(&error) => {
            Ok((Stream::Plain(connect().await?), None))
        }
        Err(error) if speaks_no_tls(&error) => Err(refused(
            "plain",
            "the peer proves no key; set its auth and a key, or use prefer here for the time of a migration",
        )),
        Err(error) => Err(tls(&error)),
    }
}

/// Takes the peer's key from a completed handshake. The key was checked in the handshake; the second check notices a
/// roster that has changed since.
fn made(stream: TlsStream<TcpStream>, keyed: &Keyed, expected: &Expected) -> Result<Made, Refused> {
    let shown = stream.get_ref().1.peer_certificates();
    let key = identity::proved(shown).ok_or_else(|| refused("tls", "the peer has shown no key"))?;
    match expected.check(&keyed.identity, &key) {
        Ok(member) => Ok((Stream::Tls(Box::new(stream)), Some((key, member)))),
        Err(refusal) => Err(refused(refusal.as_str(), refusal.to_string())),
    }
}

/// Returns true if the peer answered with bytes that are not TLS, as a ZeroMQ peer does.
fn speaks_no_tls(error: &io::Error) -> bool {
    let cause = error.get_ref().and_then(|e| e.downcast_ref());
    matches!(cause, Some(rustls::Error::InvalidMessage(_)))
}

fn tls(error: &io::Error) -> Refused {
    match identity::refusal(error) {
        Some(refusal) => refused(refusal.as_str(), refusal.to_string()),
        None => refused("tls", error.to_string()),
    }
}

fn refused(reason: &'static str, text: impl Into<String>) -> Refused {
    Refused {
        reason,
        text: text.into(),
    }
}

/// Sets the options that the library sets on its own connections: no delay of small messages, and bounds for a peer
/// whose host has vanished.
fn options(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    sockopt::set_socket_keepalive(tcp, true)?;
    sockopt::set_tcp_keepidle(tcp, Duration::from_secs(10))?;
    sockopt::set_tcp_keepintvl(tcp, Duration::from_secs(5))?;
    sockopt::set_tcp_keepcnt(tcp, 3)?;
    let timeout = u32::try_from(TCP_TIMEOUT.as_millis()).unwrap_or(u32::MAX);
    sockopt::set_tcp_user_timeout(tcp, timeout)?;
    Ok(())
}

impl Stream {
    /// Returns true if the peer has proved a key.
    pub(super) fn is_keyed(&self) -> bool {
        matches!(self, Self::Tls(_))
    }

    /// Returns the peer's address.
    pub(super) fn peer(&self) -> io::Result<SocketAddr> {
        match self {
            Self::Plain(tcp) => tcp.peer_addr(),
            Self::Tls(tls) => tls.get_ref().0.peer_addr(),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_read(cx, buf),
            Self::Tls(tls) => Pin::new(tls).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_write(cx, bytes),
            Self::Tls(tls) => Pin::new(tls).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_write_vectored(cx, bytes),
            Self::Tls(tls) => Pin::new(tls).poll_write_vectored(cx, bytes),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_flush(cx),
            Self::Tls(tls) => Pin::new(tls).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_shutdown(cx),
            Self::Tls(tls) => Pin::new(tls).poll_shutdown(cx),
        }
    }
}

impl DriverStream for Stream {
    type Reader = ReadHalf<Self>;
    type Writer = WriteHalf<Self>;

    fn split(self, _: bool) -> (Self::Reader, Self::Writer) {
        tokio::io::split(self)
    }
}

/// First byte of a TLS handshake.
const TLS_HANDSHAKE: u8 = 0x16;
/// First byte of a ZeroMQ greeting.
const ZMTP_GREETING: u8 = 0xff;
