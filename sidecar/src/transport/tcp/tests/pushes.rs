//! Tests writes from one transport to another: writes that arrive, that the receiver refuses, or that
//! break.

use super::*;

#[tokio::test]
async fn bytes_arrive_where_they_should() {
    for streams in [1, 3] {
        let config = Config {
            streams,
            ..Config::default()
        };
        let sender = tcp("send", 8, 3 * MIB, config.clone());
        let receiver = tcp("land", 8, 3 * MIB, config);
        sender.receiving.buffer.fill_random(0, 24 * MIB, 1).unwrap();
        let link = sender.link(remote(&receiver)).await.unwrap();
        let bytes = 3 * MIB - 5;
        open_all(&receiver, LEASE);
        let pieces: Vec<Piece> = (0..8).map(|i| piece(i, 7 - i, bytes)).collect();
        assert_eq!(link.write(LEASE, pieces).await, Outcome::Done);
        for slot in 0..8 {
            assert_eq!(sum(&sender, slot, bytes), sum(&receiver, 7 - slot, bytes));
        }
        assert_eq!(receiver.counts().bytes, 8 * bytes);
        assert!(
            link.reported()
                .starts_with(&format!("{streams} tcp from 127.0.0.1 to "))
        );
    }
}

#[tokio::test]
async fn parts_of_a_chunk_make_the_whole() {
    let (sender, receiver) = pair(2, MIB);
    sender.receiving.buffer.fill_random(0, 2 * MIB, 3).unwrap();
    open_all(&receiver, LEASE);
    let link = sender.link(remote(&receiver)).await.unwrap();
    let part = |offset, bytes| Piece {
        offset,
        ..piece(1, 0, bytes)
    };
    let cut = MIB / 3;
    assert_eq!(link.write(LEASE, vec![part(0, cut)]).await, Outcome::Done);
    assert_ne!(sum(&sender, 1, MIB), sum(&receiver, 0, MIB));
    assert_eq!(
        link.write(LEASE, vec![part(cut, MIB - cut)]).await,
        Outcome::Done
    );
    assert_eq!(sum(&sender, 1, MIB), sum(&receiver, 0, MIB));
    let beyond = link.write(LEASE, vec![part(cut, MIB)]).await;
    assert!(matches!(beyond, Outcome::Failed { terminal: true, .. }));
}

#[tokio::test]
async fn more_pieces_than_a_frame_holds() {
    let (sender, receiver) = pair(2500, 64);
    sender
        .receiving
        .buffer
        .fill_random(0, 2500 * 64, 2)
        .unwrap();
    open_all(&receiver, LEASE);
    let link = sender.link(remote(&receiver)).await.unwrap();
    let pieces = (0..2500).map(|i| piece(i, i, 64)).collect();
    assert_eq!(link.write(LEASE, pieces).await, Outcome::Done);
    assert_eq!(sum(&sender, 0, 2500 * 64), sum(&receiver, 0, 2500 * 64));
    assert_eq!(receiver.counts().batches, 3);
    assert_eq!(link.write(LEASE, Vec::new()).await, Outcome::Done);
}

#[tokio::test]
async fn a_stranger_with_a_wrong_lease_is_shown_the_door() {
    let (sender, receiver) = pair(2, MIB);
    receiver.open(LEASE, None, SlotIndex(0));
    let link = sender.link(remote(&receiver)).await.unwrap();
    let before = sum(&receiver, 0, MIB);
    let outcome = link.write(LeaseId(1), vec![piece(0, 0, MIB)]).await;
    assert_eq!(
        outcome,
        failed(true, "the slot is not open under this lease")
    );
    until("the link is closed", || {
        let outcome = futures::executor::block_on(link.write(LEASE, vec![piece(0, 0, 1)]));
        outcome != Outcome::Done
    });
    assert_eq!(sum(&receiver, 0, MIB), before);
    assert_eq!(refused(&receiver, Refusal::Closed), 1);
    // Other peers are still served.
    let link = sender.link(remote(&receiver)).await.unwrap();
    assert_eq!(
        link.write(LEASE, vec![piece(0, 0, MIB)]).await,
        Outcome::Done
    );
}

#[tokio::test]
async fn a_known_sender_keeps_its_connection_when_one_lease_ends() {
    let (sender, receiver) = pair(4, MIB);
    sender.receiving.buffer.fill_random(0, 4 * MIB, 3).unwrap();
    open_all(&receiver, LEASE);
    let link = sender.link(remote(&receiver)).await.unwrap();
    assert_eq!(
        link.write(LEASE, vec![piece(0, 0, MIB)]).await,
        Outcome::Done
    );
    receiver.close(SlotIndex(1));
    let before = sum(&receiver, 1, MIB);
    let all = [1, 2, 1, 3].map(|slot| link.write(LEASE, vec![piece(slot, slot, MIB)]));
    let outcomes = futures::future::join_all(all).await;
    let closed = failed(true, "the slot is not open under this lease");
    assert_eq!(
        outcomes,
        [closed.clone(), Outcome::Done, closed, Outcome::Done]
    );
    assert_eq!(sum(&receiver, 1, MIB), before);
    assert_eq!(sum(&receiver, 3, MIB), sum(&sender, 3, MIB));
}

#[tokio::test]
async fn pieces_outside_of_the_buffers_never_leave() {
    let (sender, receiver) = pair(2, MIB);
    open_all(&receiver, LEASE);
    let link = sender.link(remote(&receiver)).await.unwrap();
    for wrong in [
        piece(2, 0, 1),
        piece(0, 2, 1),
        piece(0, 0, MIB + 1),
        piece(0, 0, 0),
        piece(u32::MAX, 0, 1),
    ] {
        let outcome = link.write(LEASE, vec![piece(0, 0, 1), wrong]).await;
        assert!(
            matches!(outcome, Outcome::Failed { terminal: true, .. }),
            "{wrong:?}"
        );
    }
    assert_eq!(receiver.counts().batches, 0);
}

#[tokio::test]
async fn a_write_waits_until_its_bytes_are_there() {
    // The check begins and ends a write within this time, on a busy machine, too.
    let stall = Duration::from_secs(3);
    let config = Config {
        stall,
        ..Config::default()
    };
    let sender = tcp("send", 2, MIB, config.clone());
    let receiver = tcp("land", 2, MIB, config);
    open_all(&receiver, LEASE);
    let link = sender.link(remote(&receiver)).await.unwrap();
    crate::transport::readiness::tests::check(&*link, LEASE, piece(0, 1, MIB), stall).await;
}

#[tokio::test]
async fn dropping_the_future_or_the_link_does_not_stop_a_write() {
    let (sender, receiver) = pair(4, 4 * MIB);
    sender.receiving.buffer.fill_random(0, 16 * MIB, 4).unwrap();
    open_all(&receiver, LEASE);
    let link = sender.link(remote(&receiver)).await.unwrap();
    drop(link.write(LEASE, vec![piece(0, 0, 4 * MIB)]));
    let last = link.write(LEASE, vec![piece(1, 1, 4 * MIB)]);
    drop(link);
    assert_eq!(last.await, Outcome::Done);
    until("the dropped write has landed", || {
        receiver.counts().bytes == 8 * MIB
    });
    assert_eq!(sum(&sender, 0, 4 * MIB), sum(&receiver, 0, 4 * MIB));
}

#[tokio::test]
async fn a_receiver_that_goes_leaves_begun_writes_open_and_others_terminal() {
    let (sender, receiver) = pair(64, MIB);
    open_all(&receiver, LEASE);
    let link = sender.link(remote(&receiver)).await.unwrap();
    let writes: Vec<_> = (0..64)
        .map(|slot| link.write(LEASE, vec![piece(slot, slot, MIB)]))
        .collect();
    until("the first has landed", || receiver.counts().batches > 0);
    drop(receiver);
    let outcomes = futures::future::join_all(writes).await;
    // The outcomes are in the order of posting: first the writes that are done, then the writes that began
    // and got no answer, then the writes that never began.
    let rank = |outcome: &Outcome| match outcome {
        Outcome::Done => 0,
        Outcome::Failed { terminal, .. } => 1 + u8::from(*terminal),
    };
    let ranks: Vec<u8> = outcomes.iter().map(rank).collect();
    assert!(ranks.is_sorted(), "{ranks:?}");
    assert_eq!(ranks[0], 0);
    let after = link.write(LEASE, vec![piece(0, 0, 1)]).await;
    assert!(
        matches!(after, Outcome::Failed { terminal: true, .. }),
        "{after:?}"
    );
}

#[tokio::test]
async fn links_that_cannot_be_made_say_what_to_check() {
    let (sender, receiver) = pair(2, MIB);
    let cause = async |remote: Remote| sender.link(remote).await.unwrap_err().to_string();
    let other = |change: fn(&mut Remote)| {
        let mut remote = remote(&receiver);
        change(&mut remote);
        remote
    };
    for (remote, expect) in [
        (
            other(|r| r.address = None),
            "does not offer the built-in transport",
        ),
        (
            other(|r| r.slot_bytes = 5),
            "slots of 1048576 bytes here, 2 of 5 bytes there",
        ),
        (other(|r| r.slots = 1), "has changed since the handshake"),
        (
            other(|r| r.address = Some("no port".to_owned())),
            "no port: cannot be resolved",
        ),
        (
            other(|r| r.address = Some("127.0.0.1:1".to_owned())),
            "cannot connect",
        ),
    ] {
        let text = cause(remote).await;
        assert!(text.contains(expect), "{text}");
        assert!(text.starts_with("no tcp link to receiver: "), "{text}");
    }
    // The link fails before the receiver has slots, and before the sender has slots.
    let bare = Buffer::memfd("bare", 2 * MIB).unwrap();
    let listen = Some("127.0.0.1:0".parse().unwrap());
    let bare = Tcp::bind(
        Config {
            listen,
            ..Config::default()
        },
        bare,
    )
    .unwrap();
    let mut early = remote(&receiver);
    early.address = Some(bare.advert().address);
    let text = cause(early).await;
    assert!(text.contains("has no slots yet"), "{text}");
    let text = bare.link(remote(&receiver)).await.unwrap_err().to_string();
    assert!(text.contains("slots of 0 bytes here"), "{text}");
}

#[tokio::test]
async fn links_to_what_is_no_sidecar_end_in_time() {
    let config = Config {
        connect: Duration::from_secs(2),
        ..Config::default()
    };
    let sender = tcp("send", 2, MIB, config);
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut there = remote(&sender);
    there.address = Some(other.local_addr().unwrap().to_string());
    // A silent port: the kernel connects, but no process answers.
    let text = sender.link(there.clone()).await.unwrap_err().to_string();
    assert!(text.contains("did not answer within 2s"), "{text}");
    let talk = std::thread::spawn(move || {
        for answer in [&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], b""] {
            // The connection of the silent attempt comes first and may have ended by now.
            let mut socket = other.accept().unwrap().0;
            while socket.read(&mut [0; Hello::BYTES]).is_ok_and(|n| n == 0) {
                socket = other.accept().unwrap().0;
            }
            socket.write_all(answer).unwrap_or_default();
        }
        // The silent connection's hello may have been read instead, so one more connection is accepted.
        drop(other.accept());
    });
    let mut texts = Vec::new();
    for _ in 0..3 {
        let there = there.clone();
        texts.push(sender.link(there).await.unwrap_err().to_string());
    }
    let all = texts.join("\n");
    assert!(
        all.contains("closed the connection instead of a greeting"),
        "{all}"
    );
    drop(TcpStream::connect(there.address.unwrap()));
    talk.join().unwrap();
}

#[test]
fn adverts_name_a_host_that_peers_can_reach() {
    let buffer = Buffer::memfd("advert", MIB).unwrap();
    let advert = |listen: Option<&str>, advertise: Option<&str>| {
        let config = Config {
            listen: listen.map(|address| address.parse().unwrap()),
            advertise: advertise.map(str::to_owned),
            ..Config::default()
        };
        let tcp = Tcp::bind(config, Arc::clone(&buffer)).unwrap();
        let port = tcp.address().map_or(0, |address| address.port());
        let advert = tcp.advert();
        assert_eq!(advert.kind, "tcp");
        advert.address.replace(&port.to_string(), "PORT")
    };
    assert_eq!(advert(None, None), "");
    assert_eq!(advert(Some("127.0.0.1:0"), None), "127.0.0.1:PORT");
    assert_eq!(advert(Some("0.0.0.0:0"), None), ":PORT");
    assert_eq!(advert(Some("0.0.0.0:0"), Some("node-7")), "node-7:PORT");
    assert_eq!(advert(Some("0.0.0.0:0"), Some("fd00::7")), "[fd00::7]:PORT");
}

fn pair(slots: u32, slot_bytes: u64) -> (Tcp, Tcp) {
    (
        tcp(
            "send",
            slots,
            slot_bytes,
            Config {
                streams: 1,
                ..Config::default()
            },
        ),
        tcp("land", slots, slot_bytes, Config::default()),
    )
}

pub(super) fn failed(terminal: bool, error: &str) -> Outcome {
    Outcome::Failed {
        terminal,
        error: error.to_owned(),
    }
}
