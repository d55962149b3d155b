//! Tests of clients whose server breaks the protocol. The address of a server comes from the network, so any kind of
//! program may listen there.

use std::time::Duration;

use common::zmq::{
    DealerClient, FromServer, HANDSHAKE_TIMEOUT, MAX_ALLOC_BYTES, MAX_INIT_BYTES, Protection,
    RequestError, Requester,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::support::{answer, local, resident_bytes, run, run_alone, within};
use crate::zmtp::{Hello, Peer};

/// Starts a server that sends these bytes on every connection and then only reads. Returns the server's port.
async fn serve(bytes: Vec<u8>) -> u16 {
    let listener = TcpListener::bind(local()).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let bytes = bytes.clone();
            tokio::spawn(async move {
                stream.write_all(&bytes).await.ok();
                let mut buffer = [0; 4096];
                while stream.read(&mut buffer).await.is_ok_and(|n| n > 0) {}
            });
        }
    });
    port
}

#[test]
fn a_request_to_a_hostile_server_fails() {
    run(async {
        let after_hello = |bytes: &[u8]| [&Hello::of("ROUTER").bytes()[..], bytes].concat();
        let too_long = (MAX_INIT_BYTES as u64 + 1).to_be_bytes();
        let servers = [
            ("HTTP", b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()),
            ("zeros", vec![0; 4096]),
            ("another socket type", Hello::of("PUB").bytes()),
            (
                "an answer over the limit",
                after_hello(&[&[2u8][..], &too_long].concat()),
            ),
            (
                "2^62 bytes announced",
                after_hello(&[&[2u8][..], &(1u64 << 62).to_be_bytes()].concat()),
            ),
        ];
        for (name, bytes) in servers {
            let port = serve(bytes).await;
            let mut req = Requester::connect("127.0.0.1", port, &Protection::Plain)
                .await
                .unwrap();
            let reply = within(name, req.request(&b"ask"[..])).await;
            assert!(reply.is_err(), "{name}: {reply:?}");
        }
    });
}

/// The caller sets the deadline, so a server that gets no core for some seconds still answers.
#[test]
fn a_request_waits_for_a_server_that_stands_still() {
    run(async {
        let listener = TcpListener::bind(local()).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut req = Requester::connect("127.0.0.1", port, &Protection::Plain)
            .await
            .unwrap();
        let serve = async {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::time::sleep(HANDSHAKE_TIMEOUT + Duration::from_secs(1)).await;
            let mut server = Peer::greet(stream, Hello::of("ROUTER")).await.unwrap();
            server.recv().await.unwrap();
            server.send(&[b"", b"answer"]).await.unwrap();
            server
        };
        let ask = async { tokio::join!(req.request(&b"ask"[..]), serve).0 };
        assert_eq!(&within("slow", ask).await.unwrap()[..], b"answer");
    });
}

#[test]
fn a_server_that_ends_the_connection_gives_no_reply() {
    run(async {
        let listener = TcpListener::bind(local()).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut req = Requester::connect("127.0.0.1", port, &Protection::Plain)
            .await
            .unwrap();
        let serve = async {
            let mut server = Peer::accept(&listener, Hello::of("ROUTER")).await.unwrap();
            server.recv().await.unwrap();
        };
        let ask = async { tokio::join!(req.request(&b"ask"[..]), serve).0 };
        let error = within("end", ask).await.unwrap_err();
        assert!(matches!(error, RequestError::NoReply { .. }), "{error}");
    });
}

/// If a server breaks the protocol, the dealer ends the connection, does not use much memory, and connects to the next
/// server at the same address.
#[test]
fn a_dealer_outlives_a_hostile_server() {
    run_alone(async {
        let listener = TcpListener::bind(local()).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut client = DealerClient::connect("127.0.0.1", port, "c", &Protection::Plain)
            .await
            .unwrap();
        let before = resident_bytes();
        let announced = |length: u64| [&[2u8][..], &length.to_be_bytes()].concat();
        let breaches = [
            announced(MAX_ALLOC_BYTES as u64 + 1),
            announced(u64::MAX),
            [1u8, 0].repeat(4_000_000),
            vec![0xf8, 3, 1, 2, 3],
        ];
        for bytes in breaches {
            let server = Peer::accept(&listener, Hello::of("ROUTER"));
            let mut server = within("connection", server).await.unwrap();
            let up = within("up", client.recv()).await.unwrap();
            assert_eq!(up, FromServer::Connected { router: true });
            let breach = async {
                server.send_bytes(&bytes).await.ok();
                server.closed().await;
            };
            let (lost, ()) = within("loss", async { tokio::join!(client.recv(), breach) }).await;
            assert_eq!(lost.unwrap(), FromServer::Lost);
        }
        let grown = resident_bytes().saturating_sub(before);
        assert!(grown < 100 << 20, "{grown} bytes more");
        let server = Peer::accept(&listener, Hello::of("ROUTER"));
        let mut server = within("next server", server).await.unwrap();
        server.send(&[&b""[..], b"hello"]).await.unwrap();
        assert_eq!(answer(&mut client).await, "hello");
    });
}
