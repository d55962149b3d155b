//! Reads the hello of a new connection, without a thread and with a deadline.
//!
//! A plain connection begins with its hello. A protected connection begins with a TLS handshake, and its hello comes inside
//! TLS, followed by the code of the protection that the sender wants.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Instant;

use common::identity::{self, Auth, Channel, Expected, Identity, PublicKey, Role};
use tokio_rustls::rustls::{ServerConfig, ServerConnection};

use super::frame::{Answer, Hello, Refusal};
use super::seal::Seals;
use super::slot_gate::Writer;
use crate::transport::protection::Protection;

/// The rules for connections of a receiver.
#[derive(Debug)]
pub(super) struct Admission {
    keys: Option<Keys>,
    /// The weakest protection for the data of peers with a key.
    least: Protection,
}

#[derive(Debug)]
struct Keys {
    identity: Identity,
    tls: Arc<ServerConfig>,
}

/// A connection that has not sent its whole hello yet.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) socket: TcpStream,
    pub(super) peer: SocketAddr,
    hello: [u8; Hello::BYTES + 1],
    got: usize,
    tls: Option<Box<ServerConnection>>,
    pub(super) until: Instant,
}

/// A connection whose hello was accepted.
#[derive(Debug)]
pub(super) struct Welcomed {
    pub(super) writer: Writer,
    /// The key that the peer has proved, for later checks against the roster.
    pub(super) key: Option<PublicKey>,
    /// The two directions; `None` if the data is plain.
    pub(super) seals: Option<Seals>,
}

impl Admission {
    /// Makes the rules. Without an identity, every peer is served.
    pub(super) fn new(identity: Option<&Identity>, least: Protection) -> Self {
        let keys = identity.map(|identity| Keys {
            tls: identity::server(identity, expected()),
            identity: identity.clone(),
        });
        Self { keys, least }
    }

    /// Returns the owner of a key if the roster permits it here.
    pub(super) fn permits(&self, key: &PublicKey) -> Option<Arc<str>> {
        let identity = &self.keys.as_ref()?.identity;
        let member = expected().check(identity, key).ok()?;
        Some(member.name)
    }

    /// Returns the rules for a peer that has proved no key.
    fn unknown(&self) -> Result<Writer, Refusal> {
        let is_plain = self.keys.is_none() || self.least == Protection::Plain;
        match &self.keys {
            Some(keys) if !is_plain && keys.identity.auth() == Auth::Require => {
                Err(Refusal::Unprotected)
            }
            _ => Ok(Writer::Unknown {
                for_members: is_plain,
            }),
        }
    }
}

fn expected() -> Expected {
    Expected {
        roles: &[Role::Sender],
        channel: Channel::Data,
        ..Expected::default()
    }
}

impl Waiting {
    pub(super) fn new(socket: TcpStream, peer: SocketAddr, until: Instant) -> Self {
        Self {
            socket,
            peer,
            hello: [0; Hello::BYTES + 1],
            got: 0,
            tls: None,
            until,
        }
    }

    /// Reads the bytes that have come. Returns the hello once it is complete. An error without a reason means
    /// that the socket failed, or that the peer left before it sent anything.
    pub(super) fn read(&mut self, rules: &Admission) -> Result<Option<Hello>, Option<Refusal>> {
        if self.tls.is_none()
            && self.got == 0
            && let Some(keys) = &rules.keys
            && self.begins_tls()
        {
            let tls = ServerConnection::new(Arc::clone(&keys.tls));
            // Only a configuration without any suite is refused.
            self.tls = Some(Box::new(tls.map_err(|_| None::<Refusal>)?));
        }
        let need = match self.tls.is_some() {
            true => Hello::BYTES + 1,
            false => Hello::BYTES,
        };
        let read = match &mut self.tls {
            Some(tls) => {
                step(tls, &self.socket)?;
                tls.reader().read(&mut self.hello[self.got..need])
            }
            None => self.socket.read(&mut self.hello[self.got..need]),
        };
        match read {
            Ok(0) if self.got == 0 => return Err(None),
            Ok(0) => return Err(Some(Refusal::Malformed)),
            Ok(n) => self.got += n,
            Err(error) if comes_later(&error) => {}
            Err(_) => return Err(None),
        }
        if !Hello::begins_well(&self.hello[..self.got.min(Hello::BYTES)]) {
            return Err(Some(Refusal::Malformed));
        }
        if self.got < need {
            return Ok(None);
        }
        let hello = self.hello.first_chunk().and_then(Hello::decode);
        hello.map(Some).ok_or(Some(Refusal::Malformed))
    }

    /// Checks the rights of the peer, and tells it that its hello is accepted.
    pub(super) fn welcome(&mut self, rules: &Admission) -> Result<Welcomed, Option<Refusal>> {
        let Some(tls) = &mut self.tls else {
            let writer = rules.unknown()?;
            // The send buffer of a fresh connection has room for an answer, so this does not block.
            let told = self.socket.write_all(&Answer::Welcome.encode());
            return told.map_err(|_| None).map(|()| Welcomed {
                writer,
                key: None,
                seals: None,
            });
        };
        let wanted = Protection::from_code(self.hello[Hello::BYTES]);
        let protection = wanted.ok_or(Refusal::Malformed)?.max(rules.least);
        let key = identity::proved(tls.peer_certificates()).ok_or(Refusal::Key)?;
        // The roster may have changed since the handshake began.
        let name = rules.permits(&key).ok_or(Refusal::Key)?;
        let seals = Seals::of_tls(protection, false, tls).map_err(|_| None::<Refusal>)?;
        let mut answer = Answer::Welcome.encode().to_vec();
        answer.push(protection.code());
        let told = tls.writer().write_all(&answer);
        told.map_err(|_| None::<Refusal>)?;
        flush(tls, &self.socket).map_err(|_| None::<Refusal>)?;
        Ok(Welcomed {
            writer: Writer::Member(name),
            key: Some(key),
            seals,
        })
    }

    /// Tells the peer why it is refused, if it can understand the answer.
    pub(super) fn tell(&mut self, why: Refusal) {
        if self.got < Hello::BYTES || why == Refusal::Malformed {
            return; // a peer of another protocol
        }
        let answer = Answer::Refused { batch: 0, why }.encode();
        match &mut self.tls {
            Some(tls) => {
                let mut answer = answer.to_vec();
                answer.push(Protection::Plain.code());
                if tls.writer().write_all(&answer).is_ok() {
                    flush(tls, &self.socket).ok();
                }
            }
            None => drop((&self.socket).write(&answer)),
        }
    }

    /// Returns true if the first byte is that of a TLS handshake. The byte stays in the socket.
    fn begins_tls(&self) -> bool {
        let mut first = [0];
        matches!(self.socket.peek(&mut first), Ok(1)) && first[0] == TLS_HANDSHAKE
    }
}

/// Moves the TLS handshake on by the bytes that have come.
fn step(tls: &mut ServerConnection, socket: &TcpStream) -> Result<(), Option<Refusal>> {
    // The sender waits for each answer, so nothing of the frames after the greeting is read here.
    match tls.read_tls(&mut &*socket) {
        Ok(0) => return Err(None),
        Ok(_) => {}
        Err(error) if comes_later(&error) => {}
        Err(_) => return Err(None),
    }
    let processed = tls.process_new_packets();
    // After an error this sends the alert that tells the peer about it.
    let flushed = flush(tls, socket);
    if let Err(error) = processed {
        let error = io::Error::other(error);
        return Err(Some(match identity::refusal(&error) {
            Some(_) => Refusal::Key,
            None => Refusal::Malformed,
        }));
    }
    flushed.map_err(|_| None)
}

/// Returns true if a read may find bytes later.
fn comes_later(error: &io::Error) -> bool {
    use io::ErrorKind::{Interrupted, WouldBlock};
    matches!(error.kind(), WouldBlock | Interrupted)
}

/// Sends what TLS has to send: at most a few KiB, for which the buffer of a fresh connection has room.
fn flush(tls: &mut ServerConnection, socket: &TcpStream) -> io::Result<()> {
    while tls.wants_write() {
        tls.write_tls(&mut &*socket)?;
    }
    Ok(())
}

/// First byte of a TLS handshake. A hello begins with another one.
const TLS_HANDSHAKE: u8 = 0x16;
