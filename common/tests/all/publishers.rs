//! Tests of the sockets that read an engine's KV events, with publishers that keep the protocol and publishers that
//! break it. The address of a publisher comes from the network, so any kind of program may listen there.

use bytes::Bytes;
use common::zmq::{MAX_EVENT_BYTES, Published, Replay, Subscriber};
use tokio::net::TcpListener;

use crate::support::{local, resident_bytes, run, run_alone, within};
use crate::zmtp::{Hello, Peer};

/// Returns a listener on this host, and its port.
async fn listener() -> (TcpListener, u16) {
    let listener = TcpListener::bind(local()).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

/// Accepts the subscriber's next connection as a publisher of this minor version, and waits for the subscription to
/// the topic `kv`.
async fn publisher(listener: &TcpListener, minor: u8) -> Peer {
    let hello = Hello {
        minor,
        ..Hello::of("PUB")
    };
    let accepted = Peer::accept(listener, hello);
    let mut peer = within("connection", accepted).await.unwrap();
    // A publisher of version 3.0 gets the subscription as a message; version 3.1 gets a command.
    let subscription = match minor {
        0 => within("subscription", peer.recv()).await.unwrap().concat(),
        _ => within("subscription", peer.command()).await.unwrap(),
    };
    let expect: &[u8] = match minor {
        0 => b"\x01kv",
        _ => b"\x09SUBSCRIBEkv",
    };
    assert_eq!(subscription, expect);
    peer
}

/// Returns the next event of a subscriber.
async fn event(subscriber: &mut Subscriber) -> Published {
    within("event", subscriber.recv()).await.unwrap()
}

#[test]
fn a_subscriber_reads_numbered_messages() {
    run(async {
        let (listener, port) = listener().await;
        let mut subscriber = Subscriber::connect("127.0.0.1", port, "kv").await.unwrap();
        // After a lost connection the subscriber connects again and says so, because messages may be missing.
        for minor in [1, 0] {
            let mut peer = tokio::join!(publisher(&listener, minor), async {
                assert_eq!(event(&mut subscriber).await, Published::Connected);
            })
            .0;
            let number = 258u64.to_be_bytes();
            peer.send(&[b"kv", &number, b"first"]).await.unwrap();
            peer.send(&[b"kv", &number[1..], b"short"]).await.unwrap();
            peer.send(&[b"kv"]).await.unwrap();
            peer.send(&[b"kv", &u64::MAX.to_be_bytes(), b""])
                .await
                .unwrap();
            let expect = [
                Published::Numbered(258, Bytes::from_static(b"first")),
                Published::Odd,
                Published::Odd,
                Published::Numbered(u64::MAX, Bytes::new()),
            ];
            for expect in expect {
                assert_eq!(event(&mut subscriber).await, expect);
            }
        }
    });
}

/// If a publisher breaks the protocol, the subscriber ends the connection, does not use much memory, and connects to
/// the next publisher at the same address.
#[test]
fn a_subscriber_outlives_hostile_publishers() {
    run_alone(async {
        let (listener, port) = listener().await;
        let mut subscriber = Subscriber::connect("127.0.0.1", port, "kv").await.unwrap();
        let before = resident_bytes();
        let announced = |length: u64| [&[2u8][..], &length.to_be_bytes()].concat();
        let breaches = [
            announced(MAX_EVENT_BYTES as u64 + 1),
            announced(1 << 62),
            announced(u64::MAX),
            [1u8, 0].repeat(8_000_000),
            vec![0xf8, 3, 1, 2, 3],
        ];
        for bytes in breaches {
            let breach = async {
                let mut peer = publisher(&listener, 1).await;
                peer.send_bytes(&bytes).await.ok();
                within("end", peer.closed()).await;
            };
            let connected =
                async { assert_eq!(event(&mut subscriber).await, Published::Connected) };
            tokio::join!(breach, connected);
        }
        // These servers fail before the end of the handshake, so the subscriber never reports a connection.
        let refused = [
            b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(),
            vec![0; 4096],
            Hello::of("ROUTER").bytes(),
        ];
        for bytes in refused {
            let refuse = async {
                let (stream, _) = listener.accept().await.unwrap();
                let mut peer = Peer::raw(stream);
                peer.send_bytes(&bytes).await.ok();
                peer.ended().await;
            };
            tokio::select! {
                event = subscriber.recv() => panic!("{event:?}"),
                () = within("refusal", refuse) => {}
            }
        }
        let grown = resident_bytes().saturating_sub(before);
        assert!(grown < 100 << 20, "{grown} bytes more");
        let next = async {
            let mut peer = publisher(&listener, 1).await;
            peer.send(&[b"kv", &[0; 8], b"next"]).await.unwrap();
            peer
        };
        let (_peer, up) = tokio::join!(next, event(&mut subscriber));
        assert_eq!(up, Published::Connected);
        let next = Published::Numbered(0, Bytes::from_static(b"next"));
        assert_eq!(event(&mut subscriber).await, next);
    });
}

/// Asks a publisher for its messages again. Returns the socket, and the publisher after its question.
async fn asked(from: u64) -> (Replay, Peer) {
    let (listener, port) = listener().await;
    let mut replay = Replay::ask("127.0.0.1", port, from).await.unwrap();
    let answer = async {
        let mut peer = Peer::accept(&listener, Hello::of("ROUTER")).await.unwrap();
        let question = peer.recv().await.unwrap();
        assert_eq!(question, [b"".to_vec(), from.to_be_bytes().to_vec()]);
        peer
    };
    let peer = tokio::select! {
        message = replay.next() => panic!("{message:?} before the answer"),
        peer = within("question", answer) => peer,
    };
    (replay, peer)
}

#[test]
fn a_replay_ends_with_the_last_number() {
    run(async {
        let (mut replay, mut peer) = asked(7).await;
        for number in [7u64, 8] {
            peer.send(&[b"", &number.to_be_bytes(), b"one"])
                .await
                .unwrap();
            let message = within("message", replay.next()).await.unwrap();
            assert_eq!(message, Some((number, Bytes::from_static(b"one"))));
        }
        peer.send(&[b"", &u64::MAX.to_be_bytes(), b""])
            .await
            .unwrap();
        assert_eq!(within("end", replay.next()).await.unwrap(), None);
    });
}

#[test]
fn a_replay_refuses_other_frames() {
    run(async {
        let odd: [&[&[u8]]; 3] = [&[b""], &[b"", b"1234567", b"x"], &[b"123456789", b"x"]];
        for frames in odd {
            let (mut replay, mut peer) = asked(0).await;
            peer.send(frames).await.unwrap();
            let message = within("message", replay.next()).await;
            assert!(message.is_err(), "{frames:?}: {message:?}");
        }
    });
}

/// A replay that breaks the protocol gives no message and little memory is used. The socket ends the connection.
#[test]
fn a_replay_ends_hostile_connections() {
    run_alone(async {
        let before = resident_bytes();
        let announced = |length: u64| [&[2u8][..], &length.to_be_bytes()].concat();
        let breaches = [
            announced(MAX_EVENT_BYTES as u64 + 1),
            announced(u64::MAX),
            [1u8, 0].repeat(8_000_000),
        ];
        for bytes in breaches {
            let (mut replay, mut peer) = asked(0).await;
            let breach = async {
                peer.send_bytes(&bytes).await.ok();
                peer.ended().await;
            };
            tokio::select! {
                message = replay.next() => panic!("{message:?}"),
                () = within("end", breach) => {}
            }
        }
        let grown = resident_bytes().saturating_sub(before);
        assert!(grown < 100 << 20, "{grown} bytes more");
    });
}
