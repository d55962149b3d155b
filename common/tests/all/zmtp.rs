//! A ZeroMQ peer as plain bytes on TCP: ZMTP 3.0 or 3.1 with the mechanism NULL.
//!
//! The peer uses no ZeroMQ library. So the peer can send bytes that no library sends, and its tests are valid for
//! every library that a port may use.

#![allow(unreachable_pub, reason = "the programs of the tests have no users")]

use std::io::{Error, ErrorKind, Result};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, ToSocketAddrs};

/// A stream of bytes: TCP, or TLS on TCP.
pub trait Io: AsyncRead + AsyncWrite + Unpin + Send + std::fmt::Debug {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send + std::fmt::Debug> Io for T {}

/// A connection after the ZeroMQ handshake.
#[derive(Debug)]
pub struct Peer {
    stream: Box<dyn Io>,
    received: BytesMut,
    /// The properties in the other side's READY, as bytes.
    pub theirs: Vec<u8>,
    /// False for a peer that does not answer heartbeats.
    pub answers_heartbeats: bool,
}

/// Properties that a peer sends in the ZeroMQ handshake.
#[derive(Clone, Copy, Debug)]
pub struct Hello<'a> {
    /// Minor version of ZMTP 3. Version 3.0 has no heartbeats.
    pub minor: u8,
    /// Socket type, such as `DEALER`.
    pub kind: &'a str,
    /// The identity; empty for none.
    pub identity: &'a str,
}

impl<'a> Hello<'a> {
    /// Returns the properties of a peer of version 3.1 without an identity.
    pub fn of(kind: &'a str) -> Self {
        Self {
            minor: 1,
            kind,
            identity: "",
        }
    }

    /// Returns the bytes that the peer sends first: greeting and READY.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = greeting(self.minor);
        let mut ready = b"\x05READY".to_vec();
        property(&mut ready, "Socket-Type", self.kind);
        if !self.identity.is_empty() {
            property(&mut ready, "Identity", self.identity);
        }
        bytes.extend(framed(COMMAND, &ready));
        bytes
    }
}

impl Peer {
    /// Connects to a port and completes the ZeroMQ handshake.
    pub async fn connect(address: impl ToSocketAddrs, hello: Hello<'_>) -> Result<Self> {
        Self::greet(TcpStream::connect(address).await?, hello).await
    }

    /// Accepts the next connection of a listener and completes the ZeroMQ handshake.
    pub async fn accept(listener: &TcpListener, hello: Hello<'_>) -> Result<Self> {
        Self::greet(listener.accept().await?.0, hello).await
    }

    /// Makes a peer of a connection without a handshake.
    pub fn raw(stream: impl Io + 'static) -> Self {
        Self {
            stream: Box::new(stream),
            received: BytesMut::new(),
            theirs: Vec::new(),
            answers_heartbeats: true,
        }
    }

    /// Completes the ZeroMQ handshake on a connected stream.
    pub async fn greet(stream: impl Io + 'static, hello: Hello<'_>) -> Result<Self> {
        let mut peer = Self::raw(stream);
        peer.send_bytes(&hello.bytes()).await?;
        while peer.received.len() < GREETING_BYTES {
            peer.read().await?;
        }
        peer.received.advance(GREETING_BYTES);
        let (flags, body) = peer.frame().await?;
        if flags & COMMAND == 0 || !body.starts_with(b"\x05READY") {
            let text = String::from_utf8_lossy(&body).into_owned();
            return Err(Error::new(ErrorKind::ConnectionRefused, text));
        }
        peer.theirs = body;
        Ok(peer)
    }

    /// Sends one message.
    pub async fn send(&mut self, frames: &[&[u8]]) -> Result<()> {
        self.send_bytes(&message(frames)).await
    }

    /// Sends bytes without any framing.
    pub async fn send_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).await?;
        self.stream.flush().await
    }

    /// Returns the frames of the next message. Answers the heartbeats that come before this message.
    pub async fn recv(&mut self) -> Result<Vec<Vec<u8>>> {
        let mut frames = Vec::new();
        loop {
            let (flags, body) = self.frame().await?;
            if flags & COMMAND != 0 {
                if let Some(rest) = body.strip_prefix(b"\x04PING")
                    && self.answers_heartbeats
                {
                    // A PONG returns the context of the PING. In the PING, the context comes after
                    // a TTL of two bytes.
                    let pong = [b"\x04PONG", rest.get(2..).unwrap_or_default()].concat();
                    self.send_bytes(&framed(COMMAND, &pong)).await?;
                }
                continue;
            }
            frames.push(body);
            if flags & MORE == 0 {
                return Ok(frames);
            }
        }
    }

    /// Returns the next command that is no heartbeat.
    pub async fn command(&mut self) -> Result<Vec<u8>> {
        loop {
            let (flags, body) = self.frame().await?;
            if flags & COMMAND != 0 && !body.starts_with(b"\x04PING") {
                return Ok(body);
            }
        }
    }

    /// Waits until the other side has ended the connection. Drops the messages that come before the end.
    pub async fn closed(mut self) {
        while self.recv().await.is_ok() {}
    }

    /// Waits until the other side has ended the connection. Drops the bytes that come before the end.
    pub async fn ended(&mut self) {
        while self.read().await.is_ok() {
            self.received.clear();
        }
    }

    async fn frame(&mut self) -> Result<(u8, Vec<u8>)> {
        loop {
            if let Some(frame) = take_frame(&mut self.received) {
                return Ok(frame);
            }
            self.read().await?;
        }
    }

    async fn read(&mut self) -> Result<()> {
        match self.stream.read_buf(&mut self.received).await? {
            0 => Err(ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }
}

/// Returns the greeting of version 3 and this minor version.
pub fn greeting(minor: u8) -> Vec<u8> {
    let mut bytes = vec![0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0x7f, 3, minor];
    bytes.extend_from_slice(b"NULL");
    bytes.resize(GREETING_BYTES, 0);
    bytes
}

/// Returns the bytes of a message with these frames.
pub fn message(frames: &[&[u8]]) -> Vec<u8> {
    let last = frames.len().saturating_sub(1);
    let flags = |i: usize| if i < last { MORE } else { 0 };
    let framed = frames.iter().enumerate().map(|(i, f)| framed(flags(i), f));
    framed.flatten().collect()
}

fn framed(flags: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = match u8::try_from(body.len()) {
        Ok(short) => vec![flags, short],
        Err(_) => {
            let mut head = vec![flags | LONG];
            head.extend((body.len() as u64).to_be_bytes());
            head
        }
    };
    bytes.extend_from_slice(body);
    bytes
}

fn property(bytes: &mut Vec<u8>, name: &str, value: &str) {
    bytes.push(u8::try_from(name.len()).expect("a short name"));
    bytes.extend_from_slice(name.as_bytes());
    bytes.extend(
        u32::try_from(value.len())
            .expect("a short value")
            .to_be_bytes(),
    );
    bytes.extend_from_slice(value.as_bytes());
}

/// Takes a frame from the beginning of `bytes`; `None` if it is not complete.
fn take_frame(bytes: &mut BytesMut) -> Option<(u8, Vec<u8>)> {
    let flags = *bytes.first()?;
    let (head, length) = if flags & LONG == 0 {
        (2, usize::from(*bytes.get(1)?))
    } else {
        let length = bytes.get(1..9)?.try_into().ok()?;
        (9, usize::try_from(u64::from_be_bytes(length)).ok()?)
    };
    let body = bytes.get(head..head + length)?.to_vec();
    bytes.advance(head + length);
    Some((flags, body))
}

const GREETING_BYTES: usize = 64;
const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;
