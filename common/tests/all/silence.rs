//! Tests of peers that stop sending without ending their connection: a stopped process, or a host
//! that vanished.

use std::time::{Duration, Instant};

use common::zmq::{DealerClient, FromPeer, FromServer, HEARTBEAT_TIMEOUT, Protection, Push};
use tokio::net::TcpListener;

use crate::support::{dealer, local, message, run, server};
use crate::zmtp::{Hello, Peer};

/// Waits for a future. Fails after many heartbeat timeouts.
async fn soon_lost<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(10 * HEARTBEAT_TIMEOUT, future)
        .await
        .expect("the silent peer counts as lost")
}

/// A peer of ZMTP 3.0 has no heartbeats, so its silence does not show that it is lost. The peer stays connected. If
/// the peer's host vanished, TCP's own probes notice this. Only the limit on connections bounds the number of such
/// peers.
#[test]
fn a_peer_that_answers_no_heartbeat_is_lost_and_others_stay() {
    run(async {
        let mut server = server().await;
        let began = Instant::now();
        let mut silent = dealer(server.port(), "silent").await;
        silent.answers_heartbeats = false;
        silent.send(&[b"x"]).await.unwrap();
        let (silent_route, _) = message(&mut server).await;
        let mut alive = dealer(server.port(), "alive").await;
        alive.send(&[b"x"]).await.unwrap();
        let (alive_route, _) = message(&mut server).await;
        let old = Hello {
            minor: 0,
            ..Hello::of("DEALER")
        };
        let mut old = Peer::connect(("127.0.0.1", server.port()), old)
            .await
            .unwrap();
        old.send(&[b"x"]).await.unwrap();
        let (old_route, _) = message(&mut server).await;

        // While `alive` reads, it answers the server's heartbeats.
        let answers = tokio::spawn(async move { (alive.recv().await, alive) });
        let silence = tokio::spawn(async move { silent.closed().await });
        let lost = soon_lost(server.recv()).await.unwrap();
        assert_eq!(lost, FromPeer::Lost(silent_route));
        assert!(began.elapsed() > Duration::from_secs(2));
        soon_lost(silence).await.unwrap();
        // The two other peers are still connected after another heartbeat timeout.
        let next = tokio::time::timeout(HEARTBEAT_TIMEOUT, server.recv()).await;
        assert!(next.is_err(), "{next:?}");
        server.send(alive_route, &b"for alive"[..]).unwrap();
        server.send(old_route, &b"for old"[..]).unwrap();
        let (answer, _alive) = soon_lost(answers).await.unwrap();
        assert_eq!(answer.unwrap(), [b"for alive"]);
        assert_eq!(soon_lost(old.recv()).await.unwrap(), [b"for old"]);
    });
}

#[test]
fn clients_find_a_server_that_fell_silent() {
    run(async {
        let listener = TcpListener::bind(local()).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut client = DealerClient::connect("127.0.0.1", port, "c", &Protection::Plain)
            .await
            .unwrap();
        let mut server = Peer::accept(&listener, Hello::of("ROUTER")).await.unwrap();
        server.answers_heartbeats = false;
        let up = soon_lost(client.recv()).await.unwrap();
        assert_eq!(up, FromServer::Connected { router: true });
        let lost = tokio::join!(soon_lost(client.recv()), soon_lost(server.closed())).0;
        assert_eq!(lost.unwrap(), FromServer::Lost);
        // The client connects again.
        let again = soon_lost(Peer::accept(&listener, Hello::of("ROUTER"))).await;
        assert!(again.is_ok(), "{again:?}");

        let proxy = TcpListener::bind(local()).await.unwrap();
        let port = proxy.local_addr().unwrap().port();
        let mut push = Push::connect("127.0.0.1", port, &Protection::Plain)
            .await
            .unwrap();
        let mut stopped = Peer::accept(&proxy, Hello::of("PULL")).await.unwrap();
        stopped.answers_heartbeats = false;
        soon_lost(stopped.closed()).await;
        push.send(&b"kept"[..]).unwrap();
        let mut next = soon_lost(Peer::accept(&proxy, Hello::of("PULL")))
            .await
            .unwrap();
        assert_eq!(soon_lost(next.recv()).await.unwrap(), [b"kept"]);
    });
}
