//! Functions that several tests use.

#![allow(unreachable_pub, reason = "the program of the tests has no users")]

use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use common::zmq::{
    DealerClient, Frame, FromPeer, FromServer, Inbox, MAX_ALLOC_BYTES, Protection, RouterServer,
    SendError,
};
use protocol::receiver::Route;

use crate::zmtp::{Hello, Peer};

/// Returns the address 127.0.0.1 with port 0, for which the kernel chooses a free port.
pub fn local() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

/// Runs a test on a runtime with one thread, like the runtime of the sidecar, and raises the limit on open files as
/// both programs do.
pub fn run(test: impl Future<Output = ()>) {
    common::fd_limit::raise().unwrap();
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(test);
}

/// Runs a test as [`run`] does, but never at the same time as another such test: these tests measure memory or need
/// much memory.
pub fn run_alone(test: impl Future<Output = ()>) {
    static ALONE: Mutex<()> = Mutex::new(());
    let _guard = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    run(test);
}

/// Waits for a future. Fails after 90 s.
pub async fn within<T>(name: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(90), future)
        .await
        .unwrap_or_else(|_| panic!("{name}: nothing within 90 s"))
}

/// Binds an alloc port.
pub async fn server() -> RouterServer {
    server_at(0).await
}

/// Binds an alloc port with this number; 0 lets the kernel choose one.
pub async fn server_at(port: u16) -> RouterServer {
    RouterServer::bind("127.0.0.1", port, MAX_ALLOC_BYTES, &Protection::Plain)
        .await
        .unwrap()
}

/// Connects a raw DEALER with this identity to a port of this host.
pub async fn dealer(port: u16, identity: &str) -> Peer {
    let hello = Hello {
        identity,
        ..Hello::of("DEALER")
    };
    let peer = Peer::connect(("127.0.0.1", port), hello);
    within("handshake", peer).await.unwrap()
}

/// Returns the next message of a server.
pub async fn message(server: &mut RouterServer) -> (Route, Bytes) {
    match within("server", server.recv()).await.unwrap() {
        FromPeer::Message(route, payload) => (route, payload),
        FromPeer::Lost(route) => panic!("{route:?} lost"),
    }
}

/// Returns the next message of a client.
pub async fn answer(client: &mut DealerClient) -> Bytes {
    loop {
        match within("client", client.recv()).await.unwrap() {
            FromServer::Message(payload) => return payload,
            FromServer::Connected { .. } => {}
            FromServer::Lost => panic!("connection lost"),
        }
    }
}

/// Returns the next message of an inbox. The message must have one frame.
pub async fn single(inbox: &mut Inbox) -> Bytes {
    match within("inbox", inbox.recv()).await.unwrap() {
        Frame::Single(bytes) => bytes,
        other => panic!("{other:?}"),
    }
}

/// Returns the value of a counter of a port.
pub fn count(server: &RouterServer, name: &str) -> u64 {
    let traffic = server.traffic();
    let found = traffic.events().find(|(event, _)| *event == name);
    found.expect("a name of an event").1
}

/// Echoes every message until `done`.
pub async fn echo_until(server: &mut RouterServer, done: impl Future<Output = ()>) {
    tokio::pin!(done);
    loop {
        tokio::select! {
            biased;
            () = &mut done => return,
            event = server.recv() => {
                if let FromPeer::Message(route, payload) = event.unwrap() {
                    // A hostile peer may have closed its connection before the answer.
                    if let Err(error) = server.send(route, payload) {
                        assert_ne!(error, SendError::Full);
                    }
                }
            }
        }
    }
}

/// Returns the resident memory of this process in bytes.
pub fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}
