//! Sockets whose peers prove a key of the roster.

use bytes::Bytes;
use common::identity::{Auth, Role};
use common::zmq::{
    DealerClient, Frame, FromPeer, FromServer, Inbox, Listener, MAX_ALLOC_BYTES, Protection, Push,
    RequestError, Requester, RouterServer, SendError,
};
use protocol::registration::PROXY_NAME;
use tokio::net::{TcpListener, TcpStream};

use crate::members::{Members, only};
use crate::ports::free_port;
use crate::support::{answer, count, local, message, run, server, within};
use crate::zmtp::{Hello, Peer};

const SENDERS: &[Role] = &[Role::Sender];
const RECEIVERS: &[Role] = &[Role::Receiver];

fn members() -> Members {
    Members::new(&[
        ("prefill", "roles: [sender]"),
        ("decode", "roles: [receiver], hosts: [127.0.0.1]"),
        ("front", "roles: [proxy]"),
        ("other", "roles: [sender, receiver], hosts: [10.9.9.9]"),
    ])
}

async fn bind(protection: &Protection) -> RouterServer {
    let bound = RouterServer::bind("127.0.0.1", 0, MAX_ALLOC_BYTES, protection);
    bound.await.unwrap()
}

async fn connect(port: u16, protection: &Protection) -> DealerClient {
    let client = DealerClient::connect("127.0.0.1", port, "label", protection);
    client.await.unwrap()
}

/// Waits until a counter of a port is above zero. The server must run meanwhile. A client that is refused connects
/// again, so the counter may grow further.
async fn counts(server: &mut RouterServer, name: &str) {
    let wait = async {
        while count(server, name) == 0 {
            let short = std::time::Duration::from_millis(20);
            if let Ok(event) = tokio::time::timeout(short, server.recv()).await {
                assert!(matches!(event.unwrap(), FromPeer::Lost(_)), "a message");
            }
        }
    };
    within(name, wait).await;
}

#[test]
fn known_peers_exchange_messages_and_know_each_other() {
    run(async {
        let members = members();
        let mut server = bind(&members.keyed("decode", Auth::Require, SENDERS)).await;
        let to_decode = members.keyed("prefill", Auth::Require, RECEIVERS);
        let mut client = connect(server.port(), &to_decode).await;
        client.send(&b"one"[..]).unwrap();
        let (route, payload) = message(&mut server).await;
        assert_eq!(&payload[..], b"one");
        assert_eq!(server.principal(route).as_deref(), Some("prefill"));
        server.send(route, &b"uno"[..]).unwrap();
        assert_eq!(&answer(&mut client).await[..], b"uno");
        // A message of the largest size passes in both directions.
        let large = Bytes::from(vec![7; MAX_ALLOC_BYTES - 4096]);
        client.send(large.clone()).unwrap();
        let (_, payload) = message(&mut server).await;
        assert_eq!(payload, large);
        server.send(route, large.clone()).unwrap();
        assert_eq!(answer(&mut client).await, large);
        // Two connections with the same label are two routes.
        let mut second = connect(server.port(), &to_decode).await;
        second.send(&b"two"[..]).unwrap();
        let (other, _) = message(&mut server).await;
        assert_ne!(other, route);
        assert_eq!(count(&server, "connections"), 2);

        let mut requester = Requester::connect("127.0.0.1", server.port(), &to_decode)
            .await
            .unwrap();
        for _ in 0..2 {
            let reply = tokio::join!(requester.request(&b"ask"[..]), async {
                let (route, _) = message(&mut server).await;
                server.send(route, &b"answer"[..]).unwrap();
            });
            assert_eq!(&reply.0.unwrap()[..], b"answer");
        }
        drop(second);
        assert_eq!(
            within("loss", server.recv()).await.unwrap(),
            FromPeer::Lost(other)
        );
        assert_eq!(server.send(other, &b"late"[..]), Err(SendError::Gone));
    });
}

/// The first connection gets no handshake, as from a server that has no core for some seconds. The second one gets it.
#[test]
fn a_request_outlives_a_handshake_that_took_too_long() {
    run(async {
        let members = members();
        let mut server = bind(&members.keyed("decode", Auth::Require, SENDERS)).await;
        let front = TcpListener::bind(local()).await.unwrap();
        let (port, behind) = (front.local_addr().unwrap().port(), server.port());
        tokio::spawn(async move {
            let _silent = front.accept().await.unwrap();
            let (mut client, _) = front.accept().await.unwrap();
            let mut server = TcpStream::connect(("127.0.0.1", behind)).await.unwrap();
            tokio::io::copy_bidirectional(&mut client, &mut server).await
        });
        let to_decode = members.keyed("prefill", Auth::Require, RECEIVERS);
        let mut requester = Requester::connect("127.0.0.1", port, &to_decode)
            .await
            .unwrap();
        let asked = async {
            tokio::join!(requester.request(&b"ask"[..]), async {
                let (route, _) = message(&mut server).await;
                server.send(route, &b"answer"[..]).unwrap();
            })
            .0
        };
        assert_eq!(&within("slow", asked).await.unwrap()[..], b"answer");
    });
}

#[test]
fn registrations_name_their_sender() {
    run(async {
        let members = members();
        let sidecars = &[Role::Sender, Role::Receiver];
        for auth in [Auth::Require, Auth::Prefer] {
            let at_proxy = members.keyed("front", auth, sidecars);
            let mut inbox = Inbox::pull(PROXY_NAME, local(), &at_proxy).await.unwrap();
            let port = inbox.address().port();
            let to_proxy = members.keyed("prefill", auth, &[Role::Proxy]);
            let mut push = Push::connect("127.0.0.1", port, &to_proxy).await.unwrap();
            push.send(&b"register"[..]).unwrap();
            match within("frame", inbox.recv()).await.unwrap() {
                Frame::Of(member, route, bytes) => {
                    assert_eq!((&*member.name, &bytes[..]), ("prefill", &b"register"[..]));
                    inbox.answer(route, &b"registered"[..]).unwrap();
                    assert_eq!(within("answer", push.heard()).await, "registered");
                }
                other => panic!("{other:?}"),
            }
            assert_eq!(push.listener().await, Listener::Proxy);
            // A sidecar without keys is served during a migration only.
            let mut plain = Push::connect("127.0.0.1", port, &Protection::Plain)
                .await
                .unwrap();
            plain.send(&b"plain"[..]).unwrap();
            if auth == Auth::Require {
                let short = std::time::Duration::from_secs(2);
                let nothing = tokio::time::timeout(short, inbox.recv()).await;
                assert!(nothing.is_err(), "{nothing:?}");
            } else {
                let frame = within("plain", inbox.recv()).await.unwrap();
                assert!(
                    matches!(&frame, Frame::Single(bytes) if bytes == "plain"),
                    "{frame:?}"
                );
            }
        }
        // A sidecar with keys reaches a proxy without keys during a migration.
        let mut old = Inbox::pull(PROXY_NAME, local(), &Protection::Plain)
            .await
            .unwrap();
        let to_proxy = members.keyed("prefill", Auth::Prefer, &[Role::Proxy]);
        let mut push = Push::connect("127.0.0.1", old.address().port(), &to_proxy)
            .await
            .unwrap();
        push.send(&b"old"[..]).unwrap();
        let frame = within("old", old.recv()).await.unwrap();
        assert!(matches!(frame, Frame::Single(bytes) if bytes == "old"));
        assert_eq!(push.listener().await, Listener::Proxy);
    });
}

/// A stranger's key, a key with another role, and a peer without a key are refused and counted by reason. A known peer
/// still gets its answers.
#[test]
fn strangers_are_refused_and_counted_by_reason() {
    run(async {
        let (members, strangers) = (members(), members());
        let mut server = bind(&members.keyed("decode", Auth::Require, SENDERS)).await;
        let port = server.port();

        // The stranger's own roster has the server, so that the refusal is the server's.
        let mut mixed = Members::new(&[]);
        mixed.adopt(&members, "decode");
        mixed.adopt(&strangers, "prefill");
        let mut stranger = connect(port, &mixed.keyed("prefill", Auth::Require, RECEIVERS)).await;
        stranger.send(&b"stranger"[..]).unwrap();
        counts(&mut server, "refused_unknown_key").await;
        drop(stranger);
        let mut proxy = connect(port, &members.keyed("front", Auth::Require, RECEIVERS)).await;
        proxy.send(&b"proxy"[..]).unwrap();
        counts(&mut server, "refused_role").await;
        drop(proxy);
        for bytes in [
            &Hello::of("DEALER").bytes()[..],
            &b"GET / HTTP/1.1\r\n\r\n"[..],
        ] {
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            let mut tcp = tokio::net::TcpStream::connect(("127.0.0.1", port))
                .await
                .unwrap();
            tcp.write_all(bytes).await.unwrap();
            let mut got = Vec::new();
            let read = async {
                tokio::select! {
                    biased;
                    _ = tcp.read_to_end(&mut got) => {}
                    event = server.recv() => panic!("{event:?}"),
                }
            };
            within("end", read).await;
            assert!(got.is_empty(), "the port tells a stranger nothing");
        }
        counts(&mut server, "refused_plain").await;
        counts(&mut server, "refused_tls").await;

        let mut known = connect(port, &members.keyed("prefill", Auth::Require, RECEIVERS)).await;
        known.send(&b"known"[..]).unwrap();
        let (route, payload) = message(&mut server).await;
        assert_eq!(&payload[..], b"known");
        server.send(route, &b"yes"[..]).unwrap();
        assert_eq!(&answer(&mut known).await[..], b"yes");
    });
}

/// A client sends nothing to a server that proves a wrong key, or no key.
#[test]
fn a_client_refuses_a_wrong_server() {
    run(async {
        let (members, strangers) = (members(), members());
        let to = |auth| members.keyed("prefill", auth, RECEIVERS);
        let mut stranger = bind(&strangers.keyed("decode", Auth::Require, SENDERS)).await;
        let mut no_receiver = bind(&members.keyed("front", Auth::Require, SENDERS)).await;
        let mut elsewhere = bind(&members.keyed("other", Auth::Require, SENDERS)).await;
        let mut right = bind(&members.keyed("decode", Auth::Require, SENDERS)).await;
        let other_key = only(to(Auth::Require), vec![members.key("other")]);
        for (name, server, protection, cause) in [
            (
                "unknown",
                &mut stranger,
                to(Auth::Prefer),
                "the roster has no key ed25519:",
            ),
            (
                "role",
                &mut no_receiver,
                to(Auth::Require),
                "front has none of the roles receiver",
            ),
            (
                "host",
                &mut elsewhere,
                to(Auth::Prefer),
                "other is not at 127.0.0.1",
            ),
            (
                "key",
                &mut right,
                other_key,
                "decode has proved another key than the named one",
            ),
        ] {
            let mut client = Requester::connect("127.0.0.1", server.port(), &protection)
                .await
                .unwrap();
            let asked = async {
                tokio::select! {
                    biased;
                    event = server.recv() => panic!("{name}: {event:?}"),
                    reply = client.request(&b"secret"[..]) => reply.unwrap_err(),
                }
            };
            match within(name, asked).await {
                RequestError::NoConnection { cause: said, .. } => {
                    assert!(said.contains(cause), "{name}: {said}");
                }
                error => panic!("{name}: {error}"),
            }
        }
        // A server without a key is reached only during a migration.
        let mut plain = server().await;
        let mut client = Requester::connect("127.0.0.1", plain.port(), &to(Auth::Require))
            .await
            .unwrap();
        let asked = async {
            tokio::select! {
                biased;
                event = plain.recv() => panic!("{event:?}"),
                reply = client.request(&b"secret"[..]) => reply.unwrap_err().to_string(),
            }
        };
        let error = within("plain", asked).await;
        assert!(error.contains("the peer proves no key"), "{error}");
    });
}

/// While a cluster moves to keys, each mix of old and new peers exchanges messages, and a peer that has a key is known.
#[test]
fn prefer_serves_peers_with_and_without_keys() {
    run(async {
        let members = members();
        let at = members.keyed("decode", Auth::Prefer, SENDERS);
        let to = members.keyed("prefill", Auth::Prefer, RECEIVERS);
        let off = Protection::Plain;
        for (server, client, principal) in [
            (&at, &to, Some("prefill")),
            (&at, &off, None),
            (&off, &to, None),
        ] {
            let mut server = bind(server).await;
            let mut client = connect(server.port(), client).await;
            client.send(&b"one"[..]).unwrap();
            let (route, payload) = message(&mut server).await;
            assert_eq!(&payload[..], b"one");
            assert_eq!(server.principal(route).as_deref(), principal);
            server.send(route, &b"two"[..]).unwrap();
            assert_eq!(&answer(&mut client).await[..], b"two");
        }
        // LMCache's peers send frames without a delimiter, and are REQ sockets, too.
        let mut server = bind(&at).await;
        let hello = Hello {
            identity: "lmcache",
            ..Hello::of("DEALER")
        };
        let mut raw = Peer::connect(("127.0.0.1", server.port()), hello)
            .await
            .unwrap();
        raw.send(&[b"bare"]).await.unwrap();
        let (route, _) = message(&mut server).await;
        assert_eq!(server.name(route).unwrap(), "lmcache");
        server.send(route, &b"back"[..]).unwrap();
        assert_eq!(within("raw", raw.recv()).await.unwrap(), [b"back"]);
    });
}

#[test]
fn a_revoked_key_ends_its_connections_and_makes_no_new_ones() {
    run(async {
        let mut members = members();
        let at = members.identity("decode", Auth::Require);
        let mut server = bind(&Protection::of(Some(&at), SENDERS)).await;
        let bad = members.keyed("prefill", Auth::Require, RECEIVERS);
        let good = members.keyed("other", Auth::Require, RECEIVERS);
        let mut revoked = connect(server.port(), &bad).await;
        revoked.send(&b"a"[..]).unwrap();
        let (route, _) = message(&mut server).await;
        let mut stays = connect(server.port(), &good).await;
        stays.send(&b"b"[..]).unwrap();
        let (staying, _) = message(&mut server).await;
        // The roster of the clients does not change: the server alone ends the connection.
        members.remove("prefill");
        at.reread();
        assert_eq!(
            within("loss", server.recv()).await.unwrap(),
            FromPeer::Lost(route)
        );
        counts(&mut server, "revoked").await;
        let down =
            async { while within("down", revoked.recv()).await.unwrap() != FromServer::Lost {} };
        down.await;
        counts(&mut server, "refused_unknown_key").await;
        server.send(staying, &b"c"[..]).unwrap();
        assert_eq!(&answer(&mut stays).await[..], b"c");
    });
}

/// A connection that is lost is made again, and messages that were queued meanwhile arrive.
#[test]
fn a_client_finds_a_restarted_server() {
    run(async {
        let members = members();
        let at = members.keyed("decode", Auth::Require, SENDERS);
        let port = free_port();
        let mut client = connect(port, &members.keyed("prefill", Auth::Require, RECEIVERS)).await;
        client.send(&b"early"[..]).unwrap();
        for expected in ["early", "late"] {
            let bound = RouterServer::bind("127.0.0.1", port, MAX_ALLOC_BYTES, &at).await;
            let mut server = bound.unwrap();
            assert_eq!(message(&mut server).await.1, expected);
            within("close", server.close()).await;
            while within("down", client.recv()).await.unwrap() != FromServer::Lost {}
            client.send(&b"late"[..]).unwrap();
        }
    });
}

#[test]
fn queued_messages_are_sent_after_the_end_of_a_socket() {
    const MESSAGES: u32 = 200;
    run(async {
        let members = members();
        let mut server = bind(&members.keyed("decode", Auth::Require, SENDERS)).await;
        let to = members.keyed("prefill", Auth::Require, RECEIVERS);
        let mut client = connect(server.port(), &to).await;
        for i in 0..MESSAGES {
            client.send(i.to_le_bytes().to_vec()).unwrap();
        }
        drop(client);
        let mut first = None;
        for i in 0..MESSAGES {
            let (route, payload) = message(&mut server).await;
            assert_eq!(&payload[..], i.to_le_bytes());
            assert_eq!(*first.get_or_insert(route), route);
        }
        let mut client = connect(server.port(), &to).await;
        client.send(&b"go"[..]).unwrap();
        let route = loop {
            if let FromPeer::Message(route, _) = within("go", server.recv()).await.unwrap() {
                break route;
            }
        };
        for i in 0..MESSAGES {
            server.send(route, i.to_le_bytes().to_vec()).unwrap();
        }
        let reads = async {
            for i in 0..MESSAGES {
                assert_eq!(&answer(&mut client).await[..], i.to_le_bytes());
            }
        };
        tokio::join!(reads, within("close", server.close()));
    });
}
