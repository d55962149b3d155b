//! Connects to a receiver's data port and greets it, inside TLS where keys are used.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use common::host::bare;
use common::identity::{self, Auth, Channel, Expected, Identity, Role};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

use super::frame::{Answer, Hello, Refusal};
use super::seal::Seals;
use super::socket::prepare;
use crate::transport::protection::Protection;

/// The settings for a new link.
#[derive(Clone, Debug)]
pub(super) struct Terms {
    /// The key of this process and the roster; `None` if no peer proves a key.
    pub(super) identity: Option<Identity>,
    /// The weakest protection that this sender accepts.
    pub(super) least: Protection,
    pub(super) streams: usize,
    pub(super) connect: Duration,
    pub(super) stall: Duration,
    /// Bytes of a slot of the send buffer; 0 before the first slot layout.
    pub(super) slot_bytes: u64,
}

/// The receiver to greet.
#[derive(Debug)]
pub(super) struct Greeting<'a> {
    /// The host in the receiver's advert, which the roster may limit.
    pub(super) host: &'a str,
    pub(super) addresses: &'a [SocketAddr],
    pub(super) hello: Hello,
    pub(super) terms: &'a Terms,
    /// The name that the receiver has proved on the init channel, with its rank; `None` if it has proved no key.
    pub(super) receiver: Option<&'a str>,
}

/// The reason why a greeting failed.
enum Failed {
    /// The receiver has given this reason.
    Refused(Refusal),
    /// The receiver has ended the connection or speaks no TLS, as a receiver without keys does.
    NoTls(String),
    Other(String),
}

type Greeted = (TcpStream, Option<Seals>);

/// Connects, sends the hello and waits for the answer.
pub(super) async fn greet(to: &Greeting<'_>) -> Result<Greeted, String> {
    let terms = to.terms;
    let greeted = match &terms.identity {
        Some(identity) if terms.least != Protection::Plain => {
            match keyed(to, identity).await {
                // For migrations only: an attacker on the path can cause this.
                Err(Failed::NoTls(_)) if identity.auth() == Auth::Prefer => plain(to).await,
                other => other,
            }
        }
        Some(identity) => match plain(to).await {
            // The stronger of the two sides decides.
            Err(Failed::Refused(Refusal::Unprotected)) => keyed(to, identity).await,
            other => other,
        },
        None => plain(to).await,
    };
    greeted.map_err(|failed| match failed {
        Failed::Refused(why) => format!("refused: {why}"),
        Failed::NoTls(error) => format!(
            "the receiver proves no key ({error}): set sidecar.auth there, or sidecar.data to plain here"
        ),
        Failed::Other(error) => error,
    })
}

async fn connect(to: &Greeting<'_>) -> Result<tokio::net::TcpStream, Failed> {
    tokio::net::TcpStream::connect(to.addresses)
        .await
        .map_err(|error| Failed::Other(format!("cannot connect: {error}")))
}

async fn plain(to: &Greeting<'_>) -> Result<Greeted, Failed> {
    let mut stream = connect(to).await?;
    let mut answer = [0; Answer::BYTES];
    exchange(&mut stream, &to.hello.encode(), &mut answer).await?;
    Ok((ready(stream, to.terms)?, None))
}

async fn keyed(to: &Greeting<'_>, identity: &Identity) -> Result<Greeted, Failed> {
    let expected = Expected {
        roles: &[Role::Receiver],
        host: Some(bare(to.host).to_owned()),
        channel: Channel::Data,
        ..Expected::default()
    };
    let tls = TlsConnector::from(identity::client(identity, expected.clone()));
    // The name is not sent and not checked: the key identifies the peer.
    let name = ServerName::IpAddress(Ipv4Addr::LOCALHOST.into());
    let mut stream = tls
        .connect(name, connect(to).await?)
        .await
        .map_err(|error| match identity::refusal(&error) {
            Some(refusal) => Failed::Other(format!("the data port: {refusal}")),
            None => Failed::NoTls(error.to_string()),
        })?;
    let key = identity::proved(stream.get_ref().1.peer_certificates());
    let member = key.and_then(|key| expected.check(identity, &key).ok());
    let member = member.ok_or_else(|| Failed::Other("the peer has shown no key".to_owned()))?;
    // Another member of the roster must not get the KV, even if it can redirect the connection.
    if to.receiver.is_some_and(|id| !member.has_rank(id)) {
        return Err(Failed::Other(format!(
            "the data port belongs to {}, but the init port to {}",
            member.name,
            to.receiver.unwrap_or_default()
        )));
    }
    let mut hello = to.hello.encode().to_vec();
    hello.push(to.terms.least.code());
    let mut answer = [0; Answer::BYTES + 1];
    exchange(&mut stream, &hello, &mut answer).await?;
    let protection = Protection::from_code(answer[Answer::BYTES]);
    let protection = protection
        .filter(|protection| *protection >= to.terms.least)
        .ok_or_else(|| Failed::Other("the receiver wants less protection".to_owned()))?;
    let (stream, tls) = stream.into_inner();
    let seals = Seals::of_tls(protection, true, &tls);
    let seals = seals.map_err(|error| Failed::Other(error.to_string()))?;
    Ok((ready(stream, to.terms)?, seals))
}

/// Sends the hello and reads the answer, which must be a welcome.
async fn exchange(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    hello: &[u8],
    answer: &mut [u8],
) -> Result<(), Failed> {
    let sent = async {
        stream.write_all(hello).await?;
        stream.flush().await
    };
    sent.await
        .map_err(|error| Failed::Other(format!("cannot send the greeting: {error}")))?;
    stream.read_exact(answer).await.map_err(|error| {
        Failed::Other(match identity::alert(&error) {
            true => "the receiver's roster permits no sender with this key".to_owned(),
            false => format!(
                "closed the connection instead of a greeting ({error}): is it a sidecar's data port?"
            ),
        })
    })?;
    match answer.first_chunk().and_then(Answer::decode) {
        Some(Answer::Welcome) => Ok(()),
        Some(Answer::Refused { why, .. }) => Err(Failed::Refused(why)),
        Some(Answer::Landed { .. }) | None => Err(Failed::Other(
            "sent no valid greeting: is it a sidecar's data port?".to_owned(),
        )),
    }
}

fn ready(stream: tokio::net::TcpStream, terms: &Terms) -> Result<TcpStream, Failed> {
    let ready = || -> io::Result<TcpStream> {
        let socket = stream.into_std()?;
        prepare(&socket, terms.stall)?;
        Ok(socket)
    };
    ready().map_err(|error| Failed::Other(format!("socket settings: {error}")))
}
