//! Tests that a broken, slow or hostile peer harms only itself.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;

/// Starts a receiver with short time limits, and a sender that must not be disturbed.
fn victims(config: Config) -> (Tcp, Tcp) {
    let sender = tcp(
        "send",
        4,
        MIB,
        Config {
            streams: 1,
            ..Config::default()
        },
    );
    let receiver = tcp("land", 4, MIB, config);
    open_all(&receiver, LEASE);
    (sender, receiver)
}

/// Returns time limits that are short, but longer than a busy machine stops a thread.
fn hasty() -> Config {
    Config {
        handshake: Duration::from_millis(1000),
        stall: Duration::from_millis(1500),
        ..Config::default()
    }
}

#[tokio::test]
async fn garbage_ends_its_own_connection() {
    let (sender, receiver) = victims(Config::default());
    let link = sender.link(remote(&receiver)).await.unwrap();
    let mut old = hello(&receiver);
    old.version = 9;
    let mut elsewhere = hello(&receiver);
    elsewhere.slot_bytes += 1;
    for (bytes, answer, why) in [
        (
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
            None,
            Refusal::Malformed,
        ),
        (vec![0; 1000], None, Refusal::Malformed),
        (
            old.encode().to_vec(),
            Some(Refusal::Version),
            Refusal::Version,
        ),
        (
            elsewhere.encode().to_vec(),
            Some(Refusal::Geometry),
            Refusal::Geometry,
        ),
    ] {
        let before = refused(&receiver, why);
        let mut raw = Raw::connect(&receiver);
        raw.say(&bytes);
        let expect = answer.map(|why| Answer::Refused { batch: 0, why });
        assert_eq!(raw.hear(), expect);
        assert_eq!(raw.hear(), None);
        assert_eq!(refused(&receiver, why), before + 1);
        assert_eq!(
            link.write(LEASE, vec![piece(0, 0, MIB)]).await,
            Outcome::Done
        );
    }
}

#[tokio::test]
async fn frames_that_make_no_sense_end_their_connection() {
    let (sender, receiver) = victims(hasty());
    let link = sender.link(remote(&receiver)).await.unwrap();
    let before = sum(&receiver, 3, MIB);
    let frame = |parts: &[Part]| {
        let head = Write {
            parts: u32::try_from(parts.len()).unwrap(),
            batch: 5,
            lease: LEASE,
        };
        let mut bytes = head.encode(parts);
        bytes.resize(bytes.len().max(100), 0xff);
        bytes
    };
    let many = vec![part(3, 0, 1); 1025];
    for (bytes, answered, why) in [
        (vec![0xff; 100], false, Refusal::Malformed),
        (frame(&[]), false, Refusal::Malformed),
        (frame(&many), false, Refusal::Malformed),
        (
            frame(&[part(3, 0, 1), part(3, 0, 0)]),
            false,
            Refusal::Malformed,
        ),
        (frame(&[part(3, 1, MIB)]), true, Refusal::Bounds),
        (frame(&[part(3, u64::MAX, 2)]), true, Refusal::Bounds),
        (
            frame(&[part(3, 0, 1), part(4, 0, 1)]),
            true,
            Refusal::Bounds,
        ),
        (
            frame(&[part(3, 0, u64::MAX), part(3, 0, u64::MAX)]),
            false,
            Refusal::Bounds,
        ),
        // The peer sends the head of a frame and then nothing.
        (
            frame(&[part(3, 0, 1)])[..20].to_vec(),
            false,
            Refusal::Stalled,
        ),
    ] {
        let count = refused(&receiver, why);
        let mut raw = Raw::welcome(&receiver);
        raw.say(&bytes);
        if answered {
            assert_eq!(raw.hear(), Some(Answer::Refused { batch: 5, why }));
        }
        assert_eq!(raw.hear(), None, "{why}");
        assert_eq!(refused(&receiver, why), count + 1);
        // The connection of the honest sender is not affected.
        assert_eq!(
            link.write(LEASE, vec![piece(0, 0, MIB)]).await,
            Outcome::Done
        );
    }
    assert_eq!(sum(&receiver, 3, MIB), before);
}

#[tokio::test]
async fn a_slow_hello_and_a_slow_write_run_out_of_time() {
    let (sender, receiver) = victims(hasty());
    let mut dripping = Raw::connect(&receiver);
    dripping.say(&hello(&receiver).encode()[..9]);
    let mut half = Raw::welcome(&receiver);
    half.write(1, LEASE, &[part(1, 0, MIB)]);
    half.say(&[7; 1000]);
    let link = sender.link(remote(&receiver)).await.unwrap();
    assert_eq!(
        link.write(LEASE, vec![piece(0, 0, MIB)]).await,
        Outcome::Done
    );
    assert_eq!(dripping.hear(), None);
    assert_eq!(half.hear(), None);
    assert_eq!(refused(&receiver, Refusal::Stalled), 2);
    assert!(receiver.events().contains(&("refused_stalled", 2)));
    // The peer's slot can be closed and opened to others as usual.
    receiver.close(SlotIndex(1));
    receiver.open(LeaseId(2), None, SlotIndex(1));
    let outcome = link.write(LeaseId(2), vec![piece(1, 1, MIB)]).await;
    assert_eq!(outcome, Outcome::Done);
}

#[tokio::test]
async fn a_trickle_that_never_stalls_still_has_a_deadline() {
    const BYTES: u64 = 6000;
    let config = Config {
        stall: Duration::from_millis(400),
        ..Config::default()
    };
    let (_sender, receiver) = victims(config);
    let mut raw = Raw::welcome(&receiver);
    raw.write(1, LEASE, &[part(1, 0, BYTES)]);
    raw.0
        .set_read_timeout(Some(Duration::from_millis(10)))
        .unwrap();
    let start = Instant::now();
    // The peer sends a byte every 10 ms, well within the stall time, until the receiver closes the
    // connection. All bytes would take a minute.
    let end = (0..BYTES).find_map(|_| {
        drop(raw.0.write(&[1]));
        match raw.0.read(&mut [0; 1]) {
            Ok(n) => Some(n),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(_) => Some(0),
        }
    });
    assert_eq!(
        end,
        Some(0),
        "a write of {BYTES} bytes took {:?}",
        start.elapsed()
    );
    assert_eq!(refused(&receiver, Refusal::Stalled), 1);
}

#[tokio::test]
async fn a_flood_of_silent_connections_leaves_room() {
    let (sender, receiver) = victims(Config::default());
    let to = receiver.address().unwrap();
    let mut flood = Vec::new();
    for _ in 0..200 {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.9:0".parse().unwrap()).unwrap();
        flood.push(socket.connect(to).await.unwrap());
    }
    let link = sender.link(remote(&receiver)).await.unwrap();
    assert_eq!(
        link.write(LEASE, vec![piece(0, 0, MIB)]).await,
        Outcome::Done
    );
    until("the flood is taken", || receiver.counts().accepted == 201);
    // 64 connections may wait, and for a moment one of these was the link's own connection.
    let evicted = receiver.counts().evicted;
    assert!(
        (200 - 64..=200 - 62).contains(&evicted),
        "{evicted} evicted"
    );
}

#[tokio::test]
async fn strangers_make_room_and_known_senders_do_not() {
    let config = Config {
        max_connections: 8,
        ..Config::default()
    };
    let (sender, receiver) = victims(config);
    let link = sender.link(remote(&receiver)).await.unwrap();
    let outcome = link.write(LEASE, vec![piece(0, 0, MIB)]).await;
    assert_eq!(outcome, Outcome::Done);
    let mut strangers: Vec<Raw> = (0..12).map(|_| Raw::welcome(&receiver)).collect();
    assert_eq!(receiver.counts().evicted, 1 + 12 - 8);
    let mut known = strangers.split_off(5);
    for evicted in &mut strangers {
        assert_eq!(evicted.hear(), None);
    }
    let outcome = link.write(LEASE, vec![piece(1, 1, MIB)]).await;
    assert_eq!(outcome, Outcome::Done);
    // Each of the other connections now shows an open lease. So none of these connections is closed, and no
    // new connection is admitted.
    for raw in &mut known {
        raw.write(1, LEASE, &[part(2, 0, 1)]);
        raw.say(&[9]);
        assert_eq!(raw.hear(), Some(Answer::Landed { batch: 1 }));
    }
    let error = sender
        .link(remote(&receiver))
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("refused: too many connections"), "{error}");
    // There is room again after one of these connections has ended, or after their lease has ended.
    drop(known.pop());
    let mut again = None;
    while again.is_none() {
        again = sender.link(remote(&receiver)).await.ok();
    }
    assert_eq!(
        link.write(LEASE, vec![piece(0, 0, MIB)]).await,
        Outcome::Done
    );
    let evicted = receiver.counts().evicted;
    let slots = receiver.receiving.gates.current().slots();
    (0..slots).for_each(|slot| receiver.close(SlotIndex(slot)));
    sender.link(remote(&receiver)).await.unwrap();
    assert_eq!(receiver.counts().evicted, evicted + 1);
    until("the oldest link is known to be broken", || link.is_broken());
}

#[tokio::test]
async fn a_silent_connection_ends_unless_its_lease_is_open() {
    let config = Config {
        idle: Duration::from_secs(1),
        ..Config::default()
    };
    let (_sender, receiver) = victims(config);
    let (mut stranger, mut writer) = (Raw::welcome(&receiver), Raw::welcome(&receiver));
    writer.write(1, LEASE, &[part(2, 0, 1)]);
    writer.say(&[9]);
    assert_eq!(writer.hear(), Some(Answer::Landed { batch: 1 }));
    assert_eq!(stranger.hear(), None);
    writer.write(2, LEASE, &[part(2, 0, 1)]);
    writer.say(&[9]);
    assert_eq!(writer.hear(), Some(Answer::Landed { batch: 2 }));
    let slots = receiver.receiving.gates.current().slots();
    (0..slots).for_each(|slot| receiver.close(SlotIndex(slot)));
    assert_eq!(writer.hear(), None);
}

#[test]
fn a_peer_that_does_not_read_its_answers_is_dropped() {
    let (_sender, receiver) = victims(hasty());
    let mut raw = Raw::welcome(&receiver);
    rustix::net::sockopt::set_socket_recv_buffer_size(&raw.0, 4096).unwrap();
    let head = Write {
        parts: 1,
        batch: 1,
        lease: LEASE,
    };
    let mut frame = head.encode(&[part(0, 0, 1)]);
    frame.push(5);
    let burst = frame.repeat(1000);
    // The answers fill the sockets' buffers, so the receiver stops reading and closes the connection after
    // its time limit.
    let start = Instant::now();
    while raw.0.write_all(&burst).is_ok() {
        assert!(start.elapsed() < Duration::from_secs(60), "served for ever");
    }
    // Full buffers block both directions, so the receiver may first notice a stalled frame or a stalled
    // answer.
    until("the connection is counted", || {
        receiver.counts().broken + refused(&receiver, Refusal::Stalled) == 1
    });
}

#[test]
fn the_threads_end_with_the_transport() {
    let (_sender, receiver) = victims(Config::default());
    let mut idle = Raw::welcome(&receiver);
    let mut busy = Raw::welcome(&receiver);
    busy.write(1, LEASE, &[part(0, 0, MIB)]);
    let mut silent = Raw::connect(&receiver);
    let threads = Arc::downgrade(&receiver.receiving);
    drop(receiver);
    // Every thread has a reference to the shared state, so no thread is left if the state was freed.
    assert!(threads.upgrade().is_none());
    for raw in [&mut idle, &mut busy, &mut silent] {
        assert_eq!(raw.hear(), None);
    }
}

/// Sends valid frames with some bytes changed, with and without the right lease. Only open slots may be
/// written, every thread must end, and a good sender must be served at the end.
#[tokio::test]
async fn streams_of_changed_frames() {
    let (sender, receiver) = victims(hasty());
    receiver.close(SlotIndex(3));
    let before = sum(&receiver, 3, MIB);
    let mut random = StdRng::seed_from_u64(9);
    for round in 0..300_u64 {
        let mut stream = hello(&receiver).encode().to_vec();
        for batch in 1..=random.random_range(1..4) {
            let count = random.random_range(1..5);
            let parts: Vec<Part> = (0..count)
                .map(|_| {
                    let bytes = random.random_range(1..2000);
                    part(
                        random.random_range(0..5),
                        random.random_range(0..MIB),
                        bytes,
                    )
                })
                .collect();
            let head = Write {
                parts: count,
                batch,
                lease: LEASE,
            };
            stream.extend(head.encode(&parts));
            let bytes: u64 = parts.iter().map(|part| part.bytes).sum();
            stream.extend((0..bytes).map(|_| random.random::<u8>()));
        }
        // The first rounds send the stream unchanged.
        for _ in 0..round.min(6) / 2 {
            let at = random.random_range(0..stream.len().min(200));
            stream[at] ^= 1 << random.random_range(0..8);
        }
        stream.truncate(random.random_range(1..=stream.len()));
        let mut raw = Raw::connect(&receiver);
        // The receiver may have refused the connection already.
        raw.0.write_all(&stream).ok();
    }
    assert_eq!(sum(&receiver, 3, MIB), before);
    let link = sender.link(remote(&receiver)).await.unwrap();
    sender.receiving.buffer.fill_random(0, MIB, 5).unwrap();
    assert_eq!(
        link.write(LEASE, vec![piece(0, 1, MIB)]).await,
        Outcome::Done
    );
    assert_eq!(sum(&receiver, 1, MIB), sum(&sender, 0, MIB));
}
