//! Hostile peers of a port whose peers prove a key: strangers before the handshake, and a member of the roster that
//! sends what no library sends.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use common::identity::{self, Auth, Expected, Role};
use common::zmq::{DealerClient, HANDSHAKE_TIMEOUT, MAX_ALLOC_BYTES, RouterServer};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

use crate::hostile::{attack_over, attacks};
use crate::members::Members;
use crate::support::{answer, count, echo_until, resident_bytes, run_alone, within};
use crate::zmtp::Io;

const SENDERS: &[Role] = &[Role::Sender];
const RECEIVERS: &[Role] = &[Role::Receiver];
/// Connections of the stranger.
const STRANGERS: u32 = 1500;
/// Handshakes that one address may have at the same time.
const PLACES: u64 = 128;

fn members() -> Members {
    Members::new(&[
        ("prefill", "roles: [sender]"),
        ("evil", "roles: [sender]"),
        ("decode", "roles: [receiver]"),
    ])
}

/// Connects with the key of the hostile member. The TLS handshake is right; what follows is the test's.
async fn tls(members: &Members, port: u16) -> impl Io + use<> {
    let expected = Expected {
        roles: RECEIVERS,
        ..Expected::default()
    };
    let config = identity::client(&members.identity("evil", Auth::Require), expected);
    let tcp = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let name = ServerName::try_from("nobody").unwrap();
    TlsConnector::from(config).connect(name, tcp).await.unwrap()
}

/// Connects as a stranger, begins a handshake or not, and never goes on.
async fn says_nothing(to: SocketAddr, number: u32) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(([127, 0, 0, 2], 0).into()).unwrap();
    let mut tcp = socket.connect(to).await.unwrap();
    if number.is_multiple_of(2) {
        // The beginning of a TLS handshake.
        tcp.write_all(&[0x16, 3, 1, 2, 0, 1]).await.ok();
    }
    tcp
}

async fn bind(members: &Members) -> RouterServer {
    let protection = members.keyed("decode", Auth::Require, SENDERS);
    let bound = RouterServer::bind("127.0.0.1", 0, MAX_ALLOC_BYTES, &protection);
    bound.await.unwrap()
}

/// Asks the echo server one question as a member that behaves.
async fn asks(members: &Members, port: u16) {
    let protection = members.keyed("prefill", Auth::Require, RECEIVERS);
    let client = DealerClient::connect("127.0.0.1", port, "good", &protection);
    let mut client = client.await.unwrap();
    client.send(&b"alive?"[..]).unwrap();
    assert_eq!(&answer(&mut client).await[..], b"alive?");
}

/// A member of the roster that breaks ZeroMQ's protocol inside TLS ends its own connection, and no other.
#[test]
fn each_breach_of_a_member_ends_its_connection_and_no_other() {
    run_alone(async {
        let members = members();
        let mut server = bind(&members).await;
        let port = server.port();
        let work = async {
            let to = members.keyed("prefill", Auth::Require, RECEIVERS);
            let client = DealerClient::connect("127.0.0.1", port, "honest", &to);
            let mut honest = client.await.unwrap();
            honest.send(&b"first"[..]).unwrap();
            assert_eq!(answer(&mut honest).await, "first");
            let before = resident_bytes();
            for (name, bytes) in attacks() {
                let stream = tls(&members, port).await;
                within(name, attack_over(stream, bytes)).await;
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

/// Connections of a stranger that never end their handshake neither lock others out nor stay: a stranger's address has
/// a quarter of the handshakes, and each ends after its time.
#[test]
fn silent_strangers_delay_nobody() {
    run_alone(async {
        let members = members();
        let mut server = bind(&members).await;
        let port = server.port();
        let to: SocketAddr = ([127, 0, 0, 1], port).into();
        let traffic = server.traffic();
        echo_until(&mut server, async {
            let began = Instant::now();
            let mut silent = VecDeque::new();
            for i in 0..STRANGERS {
                silent.push_back(within("connect", says_nothing(to, i)).await);
            }
            // New strangers come as long as the member asks. So a member that had to wait for the end of the
            // strangers' handshakes would wait for ever, however slow the machine is.
            let flood = async {
                for i in 0.. {
                    silent.pop_front();
                    silent.push_back(says_nothing(to, i).await);
                }
            };
            tokio::select! {
                biased;
                () = asks(&members, port) => {}
                () = flood => {}
            }
            let refused = |name| {
                traffic
                    .events()
                    .find(|(event, _)| *event == name)
                    .unwrap()
                    .1
            };
            // Each place serves one stranger in the time of a handshake. On a slow machine the strangers come slowly,
            // so more of them find a place.
            let rounds = began.elapsed().as_secs() / HANDSHAKE_TIMEOUT.as_secs() + 2;
            let least = u64::from(STRANGERS).saturating_sub(PLACES * rounds);
            let refusals = refused("refused_flood");
            assert!(refusals >= least, "{refusals} in {rounds} rounds");
            within("timeouts", async {
                while refused("refused_timeout") < 100 {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            })
            .await;
        })
        .await;
        assert!(count(&server, "connections") <= 1);
    });
}
