//! Exchanges with correct peers: frames of messages, losses, restarts, and messages that are still queued when a socket
//! is closed.

use std::time::{Duration, Instant};

use bytes::Bytes;
use common::zmq::{
    DealerClient, Frame, FromPeer, FromServer, HANDSHAKE_TIMEOUT, Inbox, Listener, MAX_ALLOC_BYTES,
    Protection, Push, RequestError, Requester, RouterServer, SEND_QUEUE, SendError,
};
use protocol::registration::PROXY_NAME;
use tokio::net::TcpListener;

use crate::ports::free_port;
use crate::support::{
    answer, count, dealer, local, message, run, server, server_at, single, within,
};
use crate::zmtp::{Hello, Peer};

#[test]
fn answers_take_the_form_of_the_question() {
    run(async {
        let mut server = server().await;
        let port = server.port();
        let mut ours = DealerClient::connect("127.0.0.1", port, "ours", &Protection::Plain)
            .await
            .unwrap();
        let mut bare = dealer(port, "bare").await;
        let mut req = Requester::connect("localhost", port, &Protection::Plain)
            .await
            .unwrap();

        ours.send(&b"one"[..]).unwrap();
        let (route, payload) = message(&mut server).await;
        assert_eq!(&payload[..], b"one");
        assert_eq!(server.name(route).unwrap(), "ours");
        server.send(route, &b"uno"[..]).unwrap();
        assert_eq!(&answer(&mut ours).await[..], b"uno");

        bare.send(&[b"two"]).await.unwrap();
        let (route, payload) = message(&mut server).await;
        assert_eq!(&payload[..], b"two");
        server.send(route, &b"due"[..]).unwrap();
        let reply = within("bare", bare.recv()).await.unwrap();
        assert_eq!(reply, [b"due"]);

        for _ in 0..2 {
            let reply = tokio::join!(req.request(&b"three"[..]), async {
                let (route, payload) = message(&mut server).await;
                assert_eq!(&payload[..], b"three");
                assert!(server.name(route).unwrap().starts_with("127.0.0.1:"));
                server.send(route, &b"tre"[..]).unwrap();
            });
            assert_eq!(&reply.0.unwrap()[..], b"tre");
        }
        assert_eq!(count(&server, "connections"), 3);
    });
}

#[test]
fn wrong_frames_are_dropped_and_counted() {
    run(async {
        let mut server = server().await;
        let mut peer = dealer(server.port(), "peer").await;
        let wrong: [&[&[u8]]; 3] = [&[b"a", b"b"], &[b"", b"", b"c"], &[b"x", b"", b"c"]];
        for frames in wrong {
            peer.send(frames).await.unwrap();
        }
        peer.send(&[b"good"]).await.unwrap();
        assert_eq!(&message(&mut server).await.1[..], b"good");
        assert_eq!(count(&server, "wrong_frames"), 3);
    });
}

#[test]
fn a_loss_follows_the_last_message_and_ends_the_route() {
    run(async {
        let mut server = server().await;
        let mut client = DealerClient::connect("127.0.0.1", server.port(), "s", &Protection::Plain)
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
        assert_eq!(count(&server, "connections"), 0);
    });
}

#[test]
fn a_client_that_connects_once_hears_at_once_that_the_peer_refuses() {
    run(async {
        let mut server = server_at(free_port()).await;
        let port = server.port();
        let mut client = DealerClient::connect_once("127.0.0.1", port, "c", &Protection::Plain)
            .await
            .unwrap();
        let up = within("up", client.recv()).await.unwrap();
        assert_eq!(up, FromServer::Connected { router: true });
        client.send(&b"a"[..]).unwrap();
        assert_eq!(&message(&mut server).await.1[..], b"a");
        server.close().await;
        let down = within("down", client.recv()).await.unwrap();
        assert_eq!(down, FromServer::Lost);
        let mut second = DealerClient::connect_once("127.0.0.1", port, "d", &Protection::Plain)
            .await
            .unwrap();
        let refused = within("refused", second.recv()).await.unwrap();
        assert_eq!(refused, FromServer::Lost);
    });
}

#[test]
fn a_client_finds_a_restarted_server() {
    run(async {
        let mut first = server_at(free_port()).await;
        let port = first.port();
        let mut client = DealerClient::connect("127.0.0.1", port, "c", &Protection::Plain)
            .await
            .unwrap();
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

        let mut second = server_at(port).await;
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
    run(async {
        let taken = server().await;
        let error = RouterServer::bind(
            "127.0.0.1",
            taken.port(),
            MAX_ALLOC_BYTES,
            &Protection::Plain,
        )
        .await
        .unwrap_err()
        .to_string();
        let expected = format!(
            "127.0.0.1:{} is taken by process {}",
            taken.port(),
            std::process::id()
        );
        assert!(error.starts_with(&expected), "{error}");
        let error = RouterServer::bind("192.0.2.1", 7300, MAX_ALLOC_BYTES, &Protection::Plain)
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
    run(async {
        let port = free_port();
        let began = Instant::now();
        let mut req = Requester::connect("127.0.0.1", port, &Protection::Plain)
            .await
            .unwrap();
        let error = req.request(&b"hello?"[..]).await.unwrap_err();
        assert!(
            matches!(error, RequestError::NoConnection { .. }),
            "{error}"
        );
        // It does not wait for the handshake of a peer that is silent.
        assert!(began.elapsed() < HANDSHAKE_TIMEOUT);
    });
}

#[test]
fn a_proxy_that_is_away_costs_messages_not_time() {
    run(async {
        let port = free_port();
        let mut push = Push::connect("127.0.0.1", port, &Protection::Plain)
            .await
            .unwrap();
        let began = Instant::now();
        let mut dropped = 0u32;
        for i in 0..2000u32 {
            match push.send(i.to_le_bytes().to_vec()) {
                Ok(()) => {}
                Err(SendError::Full) => dropped += 1,
                Err(error) => panic!("{error}"),
            }
        }
        // A wait for each message would take longer, even on a busy machine.
        assert!(began.elapsed() < Duration::from_secs(20));
        let queued = 2000 - dropped;
        assert!((1..=2 * SEND_QUEUE).contains(&queued), "{queued}");

        let mut proxy = Inbox::pull("", ([127, 0, 0, 1], port).into(), &Protection::Plain)
            .await
            .unwrap();
        for i in 0..queued {
            assert_eq!(&single(&mut proxy).await[..], i.to_le_bytes());
        }
    });
}

/// The library refuses messages for a moment while a connection begins. The client keeps what the library refuses and
/// sends it in the same order.
#[test]
fn messages_that_the_library_refuses_arrive_later_in_their_order() {
    run(async {
        let port = free_port();
        let mut client = DealerClient::connect("127.0.0.1", port, "c", &Protection::Plain)
            .await
            .unwrap();
        let mut taken = 0u32;
        while client.send(taken.to_le_bytes().to_vec()) == Ok(()) {
            taken += 1;
        }
        assert!(
            taken > SEND_QUEUE,
            "{taken} messages taken: none was kept by the client itself"
        );
        assert!(taken <= 2 * SEND_QUEUE, "{taken}");
        let serve = async {
            let mut server = server_at(port).await;
            for i in 0..taken {
                assert_eq!(&message(&mut server).await.1[..], i.to_le_bytes());
            }
        };
        tokio::select! {
            () = serve => {}
            () = async { while client.recv().await.is_ok() {} } => panic!("the client's socket has ended"),
        }
    });
}

/// A client accepts answers with and without a delimiter, and servers with a ROUTER or a REP
/// socket.
#[test]
fn a_dealer_learns_the_kind_of_its_server() {
    run(async {
        for (kind, router) in [("ROUTER", true), ("REP", false)] {
            let listener = TcpListener::bind(local()).await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let mut client = DealerClient::connect("127.0.0.1", port, "c", &Protection::Plain)
                .await
                .unwrap();
            client.send(&b"ask"[..]).unwrap();
            let server = Peer::accept(&listener, Hello::of(kind));
            let mut server = within("handshake", server).await.unwrap();
            let up = within("up", client.recv()).await.unwrap();
            assert_eq!(up, FromServer::Connected { router });
            let asked = within("request", server.recv()).await.unwrap();
            assert_eq!(asked, [&b""[..], b"ask"]);
            server.send(&[&b""[..], b"one"]).await.unwrap();
            server.send(&[b"two"]).await.unwrap();
            server.send(&[&b"a"[..], b"b"]).await.unwrap();
            server.send(&[b"three"]).await.unwrap();
            for expected in ["one", "two", "three"] {
                assert_eq!(answer(&mut client).await, expected);
            }
        }
    });
}

/// A REQ socket sends a delimiter and waits for an answer with a delimiter.
#[test]
fn a_requester_talks_like_a_req_socket() {
    run(async {
        let listener = TcpListener::bind(local()).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut req = Requester::connect("127.0.0.1", port, &Protection::Plain)
            .await
            .unwrap();
        let serve = async {
            let mut server = Peer::accept(&listener, Hello::of("ROUTER")).await.unwrap();
            assert_eq!(server.recv().await.unwrap(), [&b""[..], b"ask"]);
            server.send(&[&b""[..], b"answer"]).await.unwrap();
            server
        };
        let (reply, _server) = within("round trip", async {
            tokio::join!(req.request(&b"ask"[..]), serve)
        })
        .await;
        assert_eq!(reply.unwrap(), "answer");
    });
}

#[test]
fn an_inbox_takes_pushes_and_the_last_frame_of_dealers() {
    run(async {
        let mut pull = Inbox::pull(PROXY_NAME, local(), &Protection::Plain)
            .await
            .unwrap();
        let mut raw = Peer::connect(pull.address(), Hello::of("PUSH"))
            .await
            .unwrap();
        raw.send(&[b"one"]).await.unwrap();
        assert_eq!(single(&mut pull).await, "one");
        raw.send(&[&b"two"[..], b"frames"]).await.unwrap();
        let frame = within("frames", pull.recv()).await.unwrap();
        assert!(
            matches!(&frame, Frame::Last(bytes) if bytes == "frames"),
            "{frame:?}"
        );

        let mut router = Inbox::router(local()).await.unwrap();
        let mut raw = dealer(router.address().port(), "10.0.0.1:21001").await;
        raw.send(&[b"hello"]).await.unwrap();
        let frame = within("hello", router.recv()).await.unwrap();
        assert!(
            matches!(&frame, Frame::Last(bytes) if bytes == "hello"),
            "{frame:?}"
        );
    });
}

#[test]
fn a_push_tells_our_proxy_from_lmcaches() {
    run(async {
        for (name, kind) in [(PROXY_NAME, Listener::Proxy), ("", Listener::Lmcache)] {
            let mut inbox = Inbox::pull(name, local(), &Protection::Plain)
                .await
                .unwrap();
            let port = inbox.address().port();
            let mut push = Push::connect("127.0.0.1", port, &Protection::Plain)
                .await
                .unwrap();
            push.send(&b"x"[..]).unwrap();
            assert_eq!(single(&mut inbox).await, "x");
            assert_eq!(push.listener().await, kind);
        }
        let mut push = Push::connect("127.0.0.1", free_port(), &Protection::Plain)
            .await
            .unwrap();
        assert_eq!(push.listener().await, Listener::Nobody);
    });
}

/// A library must not drop queued messages when a socket is closed. Otherwise the last messages of a sender, of a
/// receiver, and of a sidecar that leaves its proxy would be lost.
#[test]
fn queued_messages_are_sent_after_the_end_of_a_socket() {
    const MESSAGES: u32 = 200;
    run(async {
        let mut server = server().await;
        let mut client = DealerClient::connect("127.0.0.1", server.port(), "s", &Protection::Plain)
            .await
            .unwrap();
        for i in 0..MESSAGES {
            client.send(i.to_le_bytes().to_vec()).unwrap();
        }
        drop(client);
        for i in 0..MESSAGES {
            assert_eq!(&message(&mut server).await.1[..], i.to_le_bytes());
        }

        let mut inbox = Inbox::pull("", local(), &Protection::Plain).await.unwrap();
        let mut push = Push::connect("127.0.0.1", inbox.address().port(), &Protection::Plain)
            .await
            .unwrap();
        for i in 0..MESSAGES {
            push.send(i.to_le_bytes().to_vec()).unwrap();
        }
        within("close", push.close()).await;
        for i in 0..MESSAGES {
            assert_eq!(&single(&mut inbox).await[..], i.to_le_bytes());
        }

        let mut raw = dealer(server.port(), "raw").await;
        raw.send(&[b"go"]).await.unwrap();
        let route = loop {
            if let FromPeer::Message(route, _) = within("go", server.recv()).await.unwrap() {
                break route;
            }
        };
        for i in 0..MESSAGES {
            server.send(route, i.to_le_bytes().to_vec()).unwrap();
        }
        within("close", server.close()).await;
        for i in 0..MESSAGES {
            let last = within("answers", raw.recv()).await.unwrap();
            assert_eq!(last, [i.to_le_bytes()]);
        }
        within("end", raw.closed()).await;
    });
}
