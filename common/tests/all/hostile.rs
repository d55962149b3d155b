//! Tests of peers that break the protocol, and of peers that try to take over the identity of
//! another peer.

#![allow(unreachable_pub, reason = "the program of the tests has no users")]

use std::time::{Duration, Instant};

use bytes::Bytes;
use common::zmq::{
    DealerClient, FromPeer, HANDSHAKE_TIMEOUT, Inbox, MAX_ALLOC_BYTES, Protection, Requester,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{
    answer, count, dealer, echo_until, local, message, resident_bytes, run, run_alone, server,
    single, within,
};
use crate::zmtp::{Hello, Io, Peer, greeting};

/// Returns the bytes that hostile peers send, each with a name. The port must end each of these
/// connections.
pub fn attacks() -> Vec<(&'static str, Vec<u8>)> {
    let after_hello = |bytes: &[u8]| [&Hello::of("DEALER").bytes()[..], bytes].concat();
    let announced = |length: u64| after_hello(&[&[2u8][..], &length.to_be_bytes()].concat());
    let mut oversize = announced(MAX_ALLOC_BYTES as u64 + 1);
    oversize.resize(oversize.len() + MAX_ALLOC_BYTES + 1, 5);
    vec![
        ("HTTP", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        ("zeros", vec![0; 4096]),
        ("ones", vec![0xff; 4096]),
        ("half a greeting", greeting(1)[..30].to_vec()),
        ("a greeting without READY", greeting(1)),
        ("1 GiB announced", announced(1 << 30)),
        ("1 TiB announced", announced(1 << 40)),
        ("2^62 bytes announced", announced(1 << 62)),
        ("2^64 - 1 bytes announced", announced(u64::MAX)),
        ("reserved flag bits", after_hello(&[0xf8u8, 3, 1, 2, 3])),
        (
            "a name longer than its command",
            after_hello(&[4, 3, 200, 1, 2]),
        ),
        (
            "parts without bytes, without end",
            after_hello(&[1u8, 0].repeat(4_000_000)),
        ),
        (
            "parts of 255 bytes, without end",
            after_hello(&[&[1u8, 255][..], &[9; 255]].concat().repeat(40_000)),
        ),
        (
            "parts of 60 KB, without end",
            after_hello(
                &[&[3u8, 0, 0, 0, 0, 0, 0, 0xea, 0x60][..], &[9; 60_000]]
                    .concat()
                    .repeat(200),
            ),
        ),
        ("one part over the limit", oversize),
    ]
}

/// Sends bytes and returns when the port has ended the connection.
async fn attack(port: u16, bytes: Vec<u8>) {
    let stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    attack_over(stream, bytes).await;
}

/// Sends bytes over a stream and returns when the port has ended the connection.
pub async fn attack_over(stream: impl Io + 'static, bytes: Vec<u8>) {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let write = tokio::spawn(async move {
        // The port may end the connection while the test still writes, so an error of the write is
        // no failure.
        writer.write_all(&bytes).await.ok();
        writer
    });
    let mut buffer = [0; 4096];
    while reader.read(&mut buffer).await.is_ok_and(|bytes| bytes > 0) {}
    drop(write.await);
}

#[test]
fn each_breach_ends_its_connection_and_no_other() {
    run_alone(async {
        let mut server = server().await;
        let port = server.port();
        let work = async move {
            let mut honest = DealerClient::connect("127.0.0.1", port, "honest", &Protection::Plain)
                .await
                .unwrap();
            let before = resident_bytes();
            for (name, bytes) in attacks() {
                within(name, attack(port, bytes)).await;
                honest.send(name.as_bytes()).unwrap();
                assert_eq!(answer(&mut honest).await, name);
                let grown = resident_bytes().saturating_sub(before);
                assert!(grown < 100 << 20, "{name}: {grown} bytes more");
            }
        };
        let bound = Duration::from_secs(180);
        tokio::time::timeout(bound, echo_until(&mut server, work))
            .await
            .unwrap();
        assert!(count(&server, "failed_handshakes") > 0);
    });
}

#[test]
fn an_inbox_survives_the_same_breaches() {
    run_alone(async {
        let mut inbox = Inbox::pull("", local(), &Protection::Plain).await.unwrap();
        let mut honest = Peer::connect(inbox.address(), Hello::of("PUSH"))
            .await
            .unwrap();
        let before = resident_bytes();
        let pushed = Hello::of("PUSH").bytes();
        let dealers = Hello::of("DEALER").bytes();
        for (name, bytes) in attacks() {
            let bytes = match bytes.strip_prefix(&dealers[..]) {
                Some(rest) => [&pushed[..], rest].concat(),
                None => bytes,
            };
            let port = inbox.address().port();
            within(name, attack(port, bytes)).await;
            honest.send(&[name.as_bytes()]).await.unwrap();
            assert_eq!(single(&mut inbox).await, name);
            let grown = resident_bytes().saturating_sub(before);
            assert!(grown < 100 << 20, "{name}: {grown} bytes more");
        }
    });
}

/// Starts all attacks at once, together with many silent connections, while one honest peer works.
#[test]
fn hostile_peers_leave_others_served_and_memory_bounded() {
    run_alone(async {
        let mut server = server().await;
        let port = server.port();
        let before = resident_bytes();
        let work = async move {
            let attacks = attacks().into_iter().map(|(_, bytes)| attack(port, bytes));
            let attacks: Vec<_> = attacks.map(tokio::spawn).collect();
            let mut silent = Vec::new();
            for _ in 0..300 {
                silent.push(TcpStream::connect(("127.0.0.1", port)).await.unwrap());
            }
            let mut client = DealerClient::connect("127.0.0.1", port, "honest", &Protection::Plain)
                .await
                .unwrap();
            for round in 0..200u32 {
                client.send(round.to_le_bytes().to_vec()).unwrap();
                assert_eq!(&answer(&mut client).await[..], round.to_le_bytes());
            }
            // A new peer connects while the half-open connections still exist.
            let mut late = Requester::connect("127.0.0.1", port, &Protection::Plain)
                .await
                .unwrap();
            let reply = within("late", late.request(&b"late"[..])).await.unwrap();
            assert_eq!(&reply[..], b"late");
            for attack in attacks {
                within("attack", attack).await.unwrap();
            }
        };
        let bound = Duration::from_secs(180);
        tokio::time::timeout(bound, echo_until(&mut server, work))
            .await
            .unwrap();
        let grown = resident_bytes().saturating_sub(before);
        assert!(grown < 100 << 20, "{grown} bytes more");
        assert!(count(&server, "failed_handshakes") > 0);
    });
}

/// Opens more half-open connections than the default limit of a library. A new peer must still be able to connect, and
/// the half-open connections must end.
#[test]
fn half_open_connections_keep_nobody_out_and_end() {
    run_alone(async {
        let mut server = server().await;
        let port = server.port();
        let mut open = Vec::new();
        for i in 0..1500 {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            if i % 2 == 0 {
                stream.write_all(&greeting(1)[..10]).await.unwrap();
            }
            open.push(stream);
        }
        let began = Instant::now();
        let newcomer = async {
            let mut late = Requester::connect("127.0.0.1", port, &Protection::Plain)
                .await
                .unwrap();
            let reply = late.request(&b"late"[..]).await.unwrap();
            assert_eq!(reply, "late");
        };
        within("newcomer", echo_until(&mut server, newcomer)).await;
        for mut stream in open {
            let mut rest = Vec::new();
            // The connection may end normally or by a reset.
            within("end", stream.read_to_end(&mut rest)).await.ok();
        }
        assert!(began.elapsed() < HANDSHAKE_TIMEOUT + Duration::from_secs(60));
    });
}

#[test]
fn a_storm_of_short_connections_costs_no_memory() {
    run_alone(async {
        let mut server = server().await;
        let port = server.port();
        let before = resident_bytes();
        let work = async {
            for i in 0..3000 {
                let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                if i % 2 == 0 {
                    stream.write_all(&Hello::of("DEALER").bytes()).await.ok();
                }
            }
            let mut late = Requester::connect("127.0.0.1", port, &Protection::Plain)
                .await
                .unwrap();
            let reply = within("late", late.request(&b"late"[..])).await.unwrap();
            assert_eq!(reply, "late");
        };
        let bound = Duration::from_secs(180);
        tokio::time::timeout(bound, echo_until(&mut server, work))
            .await
            .unwrap();
        let grown = resident_bytes().saturating_sub(before);
        assert!(grown < 50 << 20, "{grown} bytes more");
        // Connections that have ended must not count as peers any more.
        let left = async {
            while count(&server, "connections") > 1 {
                tokio::time::timeout(Duration::from_millis(20), server.recv())
                    .await
                    .ok();
            }
        };
        within("table", left).await;
    });
}

/// Connects twice under one identity. The second connection must not get the answers of the first connection, and must
/// not end the first connection.
#[test]
fn an_identity_stays_with_the_connection_that_has_it() {
    run(async {
        let mut server = server().await;
        let mut old = DealerClient::connect("127.0.0.1", server.port(), "name", &Protection::Plain)
            .await
            .unwrap();
        old.send(&b"old"[..]).unwrap();
        let (old_route, _) = message(&mut server).await;
        let mut new = DealerClient::connect("127.0.0.1", server.port(), "name", &Protection::Plain)
            .await
            .unwrap();
        new.send(&b"new"[..]).unwrap();
        let refused = async {
            while count(&server, "failed_handshakes") == 0 {
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
        let mut again =
            DealerClient::connect("127.0.0.1", server.port(), "name", &Protection::Plain)
                .await
                .unwrap();
        again.send(&b"again"[..]).unwrap();
        let (route, payload) = message(&mut server).await;
        assert_ne!(route, old_route);
        assert!(payload == "again" || payload == "new", "{payload:?}");
    });
}

/// A second peer connects with the identity of another peer. The second peer must not get the messages to that
/// identity, even if it sends messages.
#[test]
fn a_stolen_identity_gets_no_answers() {
    run(async {
        let mut server = server().await;
        let mut rightful = dealer(server.port(), "name").await;
        rightful.send(&[&b""[..], b"mine"]).await.unwrap();
        let (route, _) = message(&mut server).await;
        let thief = Hello {
            identity: "name",
            ..Hello::of("DEALER")
        };
        let thief = Peer::connect(("127.0.0.1", server.port()), thief);
        if let Ok(mut thief) = within("thief", thief).await {
            thief.send(&[&b""[..], b"me too"]).await.ok();
            within("end of the thief", thief.closed()).await;
        }
        for i in 0..10u8 {
            server.send(route, vec![i]).unwrap();
            let answer = within("answer", rightful.recv()).await.unwrap();
            assert_eq!(answer, [&b""[..], &[i]]);
        }
        rightful.send(&[&b""[..], b"still"]).await.unwrap();
        assert_eq!(message(&mut server).await, (route, Bytes::from("still")));
    });
}
