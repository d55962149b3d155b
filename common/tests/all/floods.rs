//! Tests of peers that send too much, read nothing, or open too many connections.

use std::time::{Duration, Instant};

use bytes::Bytes;
use common::zmq::{DealerClient, FromPeer, Inbox, MAX_PEERS, Protection, SendError};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::support::{
    answer, count, dealer, local, message, run, run_alone, server, single, within,
};
use crate::zmtp::{self, Hello, Peer};

#[test]
fn a_peer_that_does_not_read_is_bounded_and_others_are_served() {
    run(async {
        let mut server = server().await;
        let port = server.port();
        let mut deaf = dealer(port, "deaf").await;
        deaf.send(&[b"hi"]).await.unwrap();
        let (route, _) = message(&mut server).await;
        // The test reads no messages, and the kernel's buffers hold only some of the messages.
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
        assert_eq!(count(&server, "unread"), u64::from(full));
        let mut good = DealerClient::connect("127.0.0.1", port, "good", &Protection::Plain)
            .await
            .unwrap();
        good.send(&b"ping"[..]).unwrap();
        let (route, _) = message(&mut server).await;
        server.send(route, &b"pong"[..]).unwrap();
        assert_eq!(&answer(&mut good).await[..], b"pong");
    });
}

#[test]
fn connections_over_the_cap_push_out_the_silent_ones() {
    run_alone(async {
        let mut server = server().await;
        let port = server.port();
        let mut honest = DealerClient::connect("127.0.0.1", port, "honest", &Protection::Plain)
            .await
            .unwrap();
        honest.send(&b"x"[..]).unwrap();
        message(&mut server).await;
        let flood = tokio::spawn(async move {
            let mut open = flood(port, "DEALER", MAX_PEERS + 100).await;
            // On a slow machine some handshakes run out of time, so further peers take their places.
            loop {
                tokio::time::sleep(Duration::from_millis(50)).await;
                open.extend(self::flood(port, "DEALER", 1).await);
            }
        });
        let began = Instant::now();
        while count(&server, "evicted") < 101 || count(&server, "connections") > MAX_PEERS as u64 {
            assert!(began.elapsed() < Duration::from_secs(90), "{server:?}");
            let next = tokio::time::timeout(Duration::from_millis(20), server.recv()).await;
            assert!(next.is_err(), "{next:?}");
        }
        // The peer that had sent a message is still connected, on the same route.
        honest.send(&b"still here"[..]).unwrap();
        let (route, _) = message(&mut server).await;
        server.send(route, &b"yes"[..]).unwrap();
        assert_eq!(&answer(&mut honest).await[..], b"yes");
        flood.abort();
    });
}

/// Opens connections that complete the ZeroMQ handshake and then send nothing. The version of these peers has no
/// heartbeats, so the server does not end the connections for their silence.
async fn flood(port: u16, kind: &'static str, connections: usize) -> Vec<TcpStream> {
    let hello = Hello {
        minor: 0,
        ..Hello::of(kind)
    };
    let mut open = Vec::new();
    for _ in 0..connections {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        // The server may have closed the connection already.
        stream.write_all(&hello.bytes()).await.ok();
        open.push(stream);
    }
    open
}

#[test]
fn an_inbox_sheds_its_newest_connections() {
    run_alone(async {
        let mut inbox = Inbox::pull("", local(), &Protection::Plain).await.unwrap();
        // The test does not read for this peer, so a peer with heartbeats would end for its silence while the others connect.
        let silent = Hello {
            minor: 0,
            ..Hello::of("PUSH")
        };
        let mut first = Peer::connect(inbox.address(), silent).await.unwrap();
        assert_eq!(inbox.shed().await, 0);
        let port = inbox.address().port();
        let mut late = within("flood", flood(port, "PUSH", MAX_PEERS + 9)).await;
        let mut shed = 0;
        let all = async {
            while shed < 10 {
                shed += inbox.shed().await;
                tokio::time::sleep(Duration::from_millis(50)).await;
                // On a slow machine some handshakes run out of time, so further peers take their places.
                late.extend(flood(port, "PUSH", 1).await);
            }
        };
        within("ten are shed", all).await;
        first.send(&[b"still here"]).await.unwrap();
        assert_eq!(single(&mut inbox).await, "still here");
        drop(late);
    });
}

/// If a peer sends faster than the program reads, its messages wait in its connection and not in the program's memory.
#[test]
fn a_flood_waits_in_the_connection_of_its_sender() {
    run_alone(async {
        let mut server = server().await;
        let mut flooder = dealer(server.port(), "flood").await;
        let chunk = zmtp::message(&[&[7; 60_000]]);
        let mut sent = 0;
        while tokio::time::timeout(Duration::from_millis(300), flooder.send_bytes(&chunk))
            .await
            .is_ok_and(|written| written.is_ok())
        {
            sent += chunk.len();
            assert!(
                sent < 64 << 20,
                "{sent} bytes taken from one peer, none of them read"
            );
        }
        // Another peer is served while the flood is there.
        let mut honest =
            DealerClient::connect("127.0.0.1", server.port(), "honest", &Protection::Plain)
                .await
                .unwrap();
        honest.send(&b"ping"[..]).unwrap();
        let served = async {
            loop {
                if let FromPeer::Message(route, payload) = server.recv().await.unwrap()
                    && payload == "ping"
                {
                    return route;
                }
            }
        };
        let route = within("others", served).await;
        server.send(route, &b"pong"[..]).unwrap();
        assert_eq!(answer(&mut honest).await, "pong");
    });
}

/// The loss of one peer must be reported even while another peer floods the port with messages.
#[test]
fn a_flood_does_not_hide_a_loss() {
    run(async {
        let mut server = server().await;
        let port = server.port();
        let mut leaver = dealer(port, "leaver").await;
        leaver.send(&[b"x"]).await.unwrap();
        let (left, _) = message(&mut server).await;
        let mut flooder = dealer(port, "flood").await;
        let flood = tokio::spawn(async move { while flooder.send(&[b"more"]).await.is_ok() {} });
        message(&mut server).await;
        drop(leaver);
        let lost = async {
            while server.recv().await.unwrap() != FromPeer::Lost(left) {
                tokio::task::yield_now().await;
            }
        };
        within("loss", lost).await;
        flood.abort();
    });
}

/// Sending an answer to a vanished peer fails at once, and the caller never waits.
#[test]
fn answers_to_a_vanished_peer_do_not_wait() {
    run(async {
        let mut server = server().await;
        let mut peer = dealer(server.port(), "gone").await;
        peer.send(&[b"x"]).await.unwrap();
        let (route, _) = message(&mut server).await;
        drop(peer);
        let lost = within("loss", server.recv()).await.unwrap();
        assert_eq!(lost, FromPeer::Lost(route));
        let began = Instant::now();
        for _ in 0..1000 {
            assert_eq!(server.send(route, &b"late"[..]), Err(SendError::Gone));
        }
        assert!(began.elapsed() < Duration::from_secs(20));
    });
}
