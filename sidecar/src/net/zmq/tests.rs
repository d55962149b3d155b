//! Tests with both ends in this process. The tests with Python peers are in the repository's `tests` folder.

use std::io::Write as _;
use std::net::TcpStream;
use std::time::Instant;

use omq_tokio::SocketType;
use protocol::receiver::Route;

use super::*;

/// Returns a runtime like the sidecar's, with one thread.
fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(10), future)
        .await
        .unwrap_or_else(|_| panic!("{what}: nothing within 10 s"))
}

async fn server() -> RouterServer {
    RouterServer::bind("127.0.0.1", 0, MAX_ALLOC_BYTES)
        .await
        .unwrap()
}

async fn message(server: &mut RouterServer) -> (Route, Bytes) {
    match within("server", server.recv()).await.unwrap() {
        FromPeer::Message(route, payload) => (route, payload),
        FromPeer::Lost(route) => panic!("{route:?} lost"),
    }
}

async fn answer(client: &mut DealerClient) -> Bytes {
    loop {
        match within("client", client.recv()).await.unwrap() {
            FromServer::Message(payload) => return payload,
            FromServer::Connected { .. } => {}
            FromServer::Lost => panic!("connection lost"),
        }
    }
}

/// A proxy's registration port.
#[derive(Debug)]
pub(crate) struct Pull {
    socket: Socket,
    port: u16,
}

impl Pull {
    /// Binds `host:port`; port 0 takes any.
    pub(crate) async fn bind(host: &str, port: u16) -> Result<Self, BindError> {
        Self::named("", host, port).await
    }

    /// Binds `host:port` for a proxy with this ZeroMQ identity.
    pub(crate) async fn named(
        name: &'static str,
        host: &str,
        port: u16,
    ) -> Result<Self, BindError> {
        let options = options(MAX_REGISTRATION_BYTES).identity(name);
        let socket = Socket::new(SocketType::Pull, options);
        let port = bind(&socket, host, port).await?;
        Ok(Self { socket, port })
    }

    /// Returns the port that was bound.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Waits for the next message. Messages of several frames are dropped.
    ///
    /// # Errors
    /// Only when the socket's own task is gone.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub(crate) async fn recv(&mut self) -> Result<Bytes, Closed> {
        loop {
            let message = self.socket.recv().await.map_err(|_| Closed)?;
            if message.len() == 1
                && let Some(payload) = message.part_bytes(0)
            {
                return Ok(payload);
            }
        }
    }
}

/// Returns a raw DEALER, for frames that the sidecar's own client does not send.
async fn dealer(port: u16, identity: &str) -> Socket {
    let options = options(MAX_ALLOC_BYTES).identity(identity.as_bytes().to_vec());
    let socket = Socket::new(SocketType::Dealer, options);
    socket.connect(endpoint("127.0.0.1", port)).await.unwrap();
    socket
}

/// Echoes every message until `done`.
async fn echo_until(server: &mut RouterServer, done: impl Future<Output = ()>) {
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

#[test]
fn answers_take_the_form_of_the_question() {
    runtime().block_on(async {
        let mut server = server().await;
        let port = server.port();
        let mut ours = DealerClient::connect("127.0.0.1", port, "ours")
            .await
            .unwrap();
        let bare = dealer(port, "bare").await;
        let mut req = Requester::connect("localhost", port).await.unwrap();

        ours.send(&b"one"[..]).unwrap();
        let (route, payload) = message(&mut server).await;
        assert_eq!(&payload[..], b"one");
        assert_eq!(server.name(route).unwrap(), "ours");
        server.send(route, &b"uno"[..]).unwrap();
        assert_eq!(&answer(&mut ours).await[..], b"uno");

        bare.send(Message::single("two")).await.unwrap();
        let (route, payload) = message(&mut server).await;
        assert_eq!(&payload[..], b"two");
        server.send(route, &b"due"[..]).unwrap();
        let reply = within("bare", bare.recv()).await.unwrap();
        assert_eq!((reply.len(), reply.part_slice(0)), (1, Some(&b"due"[..])));

        for _ in 0..2 {
            let reply = tokio::join!(req.request(&b"three"[..]), async {
                let (route, payload) = message(&mut server).await;
                assert_eq!(&payload[..], b"three");
                assert!(server.name(route).unwrap().starts_with("127.0.0.1:"));
                server.send(route, &b"tre"[..]).unwrap();
            });
            assert_eq!(&reply.0.unwrap()[..], b"tre");
        }
        assert_eq!(server.traffic().of("connections"), 3);
    });
}

#[test]
fn wrong_frames_are_dropped_and_counted() {
    runtime().block_on(async {
        let mut server = server().await;
        let peer = dealer(server.port(), "peer").await;
        for frames in [&["a", "b"][..], &["", "", "c"], &["x", "", "c"]] {
            let frames = frames.iter().map(|f| Bytes::from(*f));
            peer.send(Message::multipart(frames)).await.unwrap();
        }
        peer.send(Message::single("good")).await.unwrap();
        assert_eq!(&message(&mut server).await.1[..], b"good");
        assert_eq!(server.traffic().of("wrong_frames"), 3);
    });
}

#[test]
fn a_loss_follows_the_last_message_and_ends_the_route() {
    runtime().block_on(async {
        let mut server = server().await;
        let client = DealerClient::connect("127.0.0.1", server.port(), "s")
            .await
            .unwrap();
        for i in 0..20u8 {
            client.send(vec![i]).unwrap();
        }
        let (first, _) = message(&mut server).await;
        drop(client);
        for i in 1..20u8 {
            assert_eq!(message(&mut server).await, (first, Bytes::from(vec![i])));
        }
        assert_eq!(
            within("loss", server.recv()).await.unwrap(),
            FromPeer::Lost(first)
        );
        assert_eq!(server.send(first, &b"late"[..]), Err(SendError::Gone));
        assert_eq!(server.traffic().of("connections"), 0);
    });
}

/// Connects twice under one identity: the second connection must neither get the first one's answers nor end
/// it.
#[test]
fn an_identity_stays_with_the_connection_that_has_it() {
    runtime().block_on(async {
        let mut server = server().await;
        let mut old = DealerClient::connect("127.0.0.1", server.port(), "name")
            .await
            .unwrap();
        old.send(&b"old"[..]).unwrap();
        let (old_route, _) = message(&mut server).await;
        let new = DealerClient::connect("127.0.0.1", server.port(), "name")
            .await
            .unwrap();
        new.send(&b"new"[..]).unwrap();
        let refused = async {
            while server.traffic().of("failed_handshakes") == 0 {
                let event = server.recv();
                if let Ok(event) = tokio::time::timeout(Duration::from_millis(20), event).await {
                    panic!("the newcomer was let in: {event:?}");
                }
            }
        };
        within("refusal", refused).await;
        server.send(old_route, &b"for old"[..]).unwrap();
        assert_eq!(&answer(&mut old).await[..], b"for old");
        old.send(&b"still"[..]).unwrap();
        assert_eq!(
            message(&mut server).await,
            (old_route, Bytes::from("still"))
        );
        // After the first connection has ended, its identity can be used again.
        drop(old);
        let lost = within("loss", server.recv()).await.unwrap();
        assert_eq!(lost, FromPeer::Lost(old_route));
        drop(new);
        let again = DealerClient::connect("127.0.0.1", server.port(), "name")
            .await
            .unwrap();
        again.send(&b"again"[..]).unwrap();
        let (route, payload) = message(&mut server).await;
        assert_ne!(route, old_route);
        assert!(payload == "again" || payload == "new", "{payload:?}");
    });
}

#[test]
fn a_client_finds_a_restarted_server() {
    runtime().block_on(async {
        let mut first = server().await;
        let port = first.port();
        let mut client = DealerClient::connect("127.0.0.1", port, "c").await.unwrap();
        assert_eq!(
            within("up", client.recv()).await.unwrap(),
            FromServer::Connected { router: true }
        );
        client.send(&b"a"[..]).unwrap();
        let (route, _) = message(&mut first).await;
        first.send(route, &b"b"[..]).unwrap();
        first.close().await;
        assert_eq!(&answer(&mut client).await[..], b"b");
        assert_eq!(
            within("down", client.recv()).await.unwrap(),
            FromServer::Lost
        );

        let mut second = RouterServer::bind("127.0.0.1", port, MAX_ALLOC_BYTES)
            .await
            .unwrap();
        client.send(&b"c"[..]).unwrap();
        assert_eq!(
            within("again", client.recv()).await.unwrap(),
            FromServer::Connected { router: true }
        );
        assert_eq!(&message(&mut second).await.1[..], b"c");
    });
}

#[test]
fn a_taken_port_is_named_with_its_holder() {
    runtime().block_on(async {
        let taken = server().await;
        let error = RouterServer::bind("127.0.0.1", taken.port(), MAX_ALLOC_BYTES)
            .await
            .unwrap_err()
            .to_string();
        let expected = format!(
            "127.0.0.1:{} is taken by process {}",
            taken.port(),
            std::process::id()
        );
        assert!(error.starts_with(&expected), "{error}");
        let error = RouterServer::bind("192.0.2.1", 7300, MAX_ALLOC_BYTES)
            .await
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("cannot listen on 192.0.2.1:7300: "),
            "{error}"
        );
    });
}

#[test]
fn a_request_to_nobody_fails_soon() {
    runtime().block_on(async {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let began = Instant::now();
        let mut req = Requester::connect("127.0.0.1", port).await.unwrap();
        let error = req.request(&b"hello?"[..]).await.unwrap_err();
        assert!(
            matches!(error, RequestError::NoConnection { .. }),
            "{error}"
        );
        assert!(began.elapsed() < Duration::from_secs(3));
    });
}

#[test]
fn a_proxy_that_is_away_costs_messages_not_time() {
    runtime().block_on(async {
        let reserved = Pull::bind("127.0.0.1", 0).await.unwrap();
        let port = reserved.port();
        reserved.socket.close().await.unwrap();
        let mut push = Push::connect("127.0.0.1", port).await.unwrap();
        let began = Instant::now();
        for i in 0..2000u32 {
            let taken = push.send(i.to_le_bytes().to_vec());
            assert!(matches!(taken, Ok(()) | Err(SendError::Full)));
        }
        assert!(began.elapsed() < Duration::from_secs(1));
        let queued = 2000 - push.dropped();
        assert!(
            (1..=u64::from(2 * SEND_QUEUE)).contains(&queued),
            "{queued}"
        );

        let mut proxy = Pull::bind("127.0.0.1", port).await.unwrap();
        for i in 0..u32::try_from(queued).unwrap() {
            assert_eq!(
                &within("pull", proxy.recv()).await.unwrap()[..],
                i.to_le_bytes()
            );
        }
    });
}

#[test]
fn a_peer_that_does_not_read_is_bounded_and_others_are_served() {
    runtime().block_on(async {
        let mut server = server().await;
        let port = server.port();
        let deaf = dealer(port, "deaf").await;
        deaf.send(Message::single("hi")).await.unwrap();
        let (route, _) = message(&mut server).await;
        // The raw socket's queue takes some messages, and the test reads none.
        let big = Bytes::from(vec![7u8; 100_000]);
        let (mut taken, mut full) = (0u32, 0u32);
        for _ in 0..3000 {
            match server.send(route, big.clone()) {
                Ok(()) => taken += 1,
                Err(SendError::Full) => full += 1,
                Err(SendError::Gone) => panic!("gone"),
            }
            tokio::task::yield_now().await;
        }
        assert!(
            full > 0,
            "{taken} messages of 100 KB taken for a peer that does not read"
        );
        assert_eq!(server.traffic().of("unread"), u64::from(full));
        let mut good = DealerClient::connect("127.0.0.1", port, "good")
            .await
            .unwrap();
        good.send(&b"ping"[..]).unwrap();
        let (route, _) = message(&mut server).await;
        server.send(route, &b"pong"[..]).unwrap();
        assert_eq!(&answer(&mut good).await[..], b"pong");
    });
}

/// Returns the greeting and READY of a ZMTP 3.0 DEALER with the NULL mechanism.
fn zmtp_hello() -> Vec<u8> {
    let mut bytes = vec![0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0x7f, 3, 0];
    bytes.extend_from_slice(b"NULL");
    bytes.resize(64, 0);
    let ready = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER";
    bytes.extend_from_slice(&[4, u8::try_from(ready.len()).unwrap()]);
    bytes.extend_from_slice(ready);
    bytes
}

fn hostile(port: u16) -> Vec<TcpStream> {
    let mut held = Vec::new();
    let mut dial = |bytes: &[u8]| {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        // The server may close the connection while the test writes: this is what the test provokes.
        stream.write_all(bytes).ok();
        held.push(stream);
    };
    dial(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    dial(&[0u8; 4096]);
    dial(&[0xff; 4096]);
    dial(&zmtp_hello()[..30]);
    let frame = |head: &[u8]| [&zmtp_hello()[..], head].concat();
    // Long frames announced as 1 GiB, 1 TiB, 2^62 and 2^64 - 1.
    for length in [1u64 << 30, 1 << 40, 1 << 62, u64::MAX] {
        dial(&frame(&[&[2][..], &length.to_be_bytes()].concat()));
    }
    // Reserved flag bits; a command with an absurd name length.
    dial(&frame(&[0xf8, 3, 1, 2, 3]));
    dial(&frame(&[4, 3, 200, 1, 2]));
    // More and more parts, with and without bytes in them.
    dial(&frame(&[1u8, 0].repeat(200_000)));
    dial(&frame(&[&[1u8, 255][..], &[9; 255]].concat().repeat(8000)));
    // One part over the limit, with all its bytes sent.
    let mut oversize = vec![2u8];
    oversize.extend_from_slice(&(MAX_ALLOC_BYTES as u64 + 1).to_be_bytes());
    oversize.resize(oversize.len() + MAX_ALLOC_BYTES + 1, 5);
    dial(&frame(&oversize));
    for _ in 0..300 {
        dial(b"");
    }
    held
}

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
fn hostile_peers_leave_others_served_and_memory_bounded() {
    runtime().block_on(async {
        let mut server = server().await;
        let port = server.port();
        let before = resident_bytes();
        let work = async move {
            let attack = tokio::task::spawn_blocking(move || hostile(port));
            let mut client = DealerClient::connect("127.0.0.1", port, "honest")
                .await
                .unwrap();
            for round in 0..200u32 {
                client.send(round.to_le_bytes().to_vec()).unwrap();
                assert_eq!(&answer(&mut client).await[..], round.to_le_bytes());
            }
            let held = within("attack", attack).await.unwrap();
            // A new peer connects while the half-open connections still exist.
            let mut late = Requester::connect("127.0.0.1", port).await.unwrap();
            let reply = within("late", late.request(&b"late"[..])).await.unwrap();
            assert_eq!(&reply[..], b"late");
            drop(held);
        };
        within("everything", echo_until(&mut server, work)).await;
        let grown = resident_bytes().saturating_sub(before);
        assert!(grown < 100 << 20, "{grown} bytes more");
        assert!(server.traffic().of("failed_handshakes") > 0);
    });
}

#[test]
fn connections_over_the_cap_push_out_the_silent_ones() {
    runtime().block_on(async {
        let mut server = server().await;
        let port = server.port();
        let mut honest = DealerClient::connect("127.0.0.1", port, "honest")
            .await
            .unwrap();
        honest.send(&b"x"[..]).unwrap();
        message(&mut server).await;
        let flood = tokio::task::spawn_blocking(move || {
            (0..MAX_PEERS + 100)
                .map(|_| {
                    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
                    stream.write_all(&zmtp_hello()).ok();
                    stream
                })
                .collect::<Vec<_>>()
        });
        let began = Instant::now();
        while server.traffic().of("evicted") < 101
            || server.traffic().of("connections") > MAX_PEERS as u64
        {
            assert!(began.elapsed() < Duration::from_secs(10), "{server:?}");
            let next = tokio::time::timeout(Duration::from_millis(20), server.recv()).await;
            assert!(next.is_err(), "{next:?}");
        }
        // The peer that had sent a message is still connected, on the same route.
        honest.send(&b"still here"[..]).unwrap();
        let (route, _) = message(&mut server).await;
        server.send(route, &b"yes"[..]).unwrap();
        assert_eq!(&answer(&mut honest).await[..], b"yes");
        drop(flood.await.unwrap());
    });
}
