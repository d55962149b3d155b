//! Tests protected connections with an attacker on the path, who changes, repeats and exchanges bytes.

use std::net::TcpListener;
use std::sync::Mutex;

use super::super::seal::TAG_BYTES;
use super::keyed::{Members, PIECE, PROTECTED};
use super::*;
use crate::memory::PIECE_BYTES;

/// A relay between a sender and a receiver: the attacker on the path.
struct Relay {
    address: SocketAddr,
    plans: [Arc<Mutex<Plan>>; 2],
}

/// The relay's plan for one direction.
#[derive(Default)]
struct Plan {
    /// All bytes that were forwarded since the relay was armed.
    seen: Vec<u8>,
    /// Bytes that wait for an attack.
    held: Vec<u8>,
    attack: Option<(usize, Change)>,
    armed: bool,
}

type Change = Box<dyn FnOnce(Vec<u8>) -> Vec<u8> + Send>;

const TO_RECEIVER: usize = 0;
const TO_SENDER: usize = 1;

impl Relay {
    fn to(receiver: &Tcp) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let to = receiver.address().unwrap();
        let plans: [Arc<Mutex<Plan>>; 2] = Default::default();
        let of = plans.clone();
        std::thread::spawn(move || {
            for sender in listener.incoming().flatten() {
                let receiver = TcpStream::connect(to).unwrap();
                for (from, to, plan) in [(&sender, &receiver, &of[0]), (&receiver, &sender, &of[1])]
                {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let plan = Arc::clone(plan);
                    std::thread::spawn(move || pass_on(from, to, &plan));
                }
            }
        });
        Self { address, plans }
    }

    fn remote(&self, receiver: &Tcp) -> Remote {
        let address = Some(self.address.to_string());
        Remote {
            address,
            ..remote(receiver)
        }
    }

    /// Holds the next `bytes` of one direction, and forwards what `change` makes of them.
    fn arm(
        &self,
        direction: usize,
        bytes: usize,
        change: impl FnOnce(Vec<u8>) -> Vec<u8> + Send + 'static,
    ) {
        let mut plan = self.plans[direction].lock().unwrap();
        plan.armed = true;
        plan.attack = Some((bytes, Box::new(change)));
    }

    /// Begins to note the bytes to the receiver.
    fn listen(&self) {
        self.plans[TO_RECEIVER].lock().unwrap().armed = true;
    }

    fn seen(&self) -> Vec<u8> {
        self.plans[TO_RECEIVER].lock().unwrap().seen.clone()
    }
}

fn pass_on(mut from: TcpStream, mut to: TcpStream, plan: &Mutex<Plan>) {
    let mut block = vec![0; 64 << 10];
    while let Ok(n @ 1..) = from.read(&mut block) {
        let mut bytes = block[..n].to_vec();
        let mut plan = plan.lock().unwrap();
        if plan.armed {
            plan.seen.extend_from_slice(&bytes);
        }
        if let Some((len, change)) = plan.attack.take() {
            plan.held.append(&mut bytes);
            if plan.held.len() < len {
                plan.attack = Some((len, change));
            } else {
                let after = plan.held.split_off(len);
                bytes = change(std::mem::take(&mut plan.held));
                bytes.extend(after);
            }
        }
        drop(plan);
        if to.write_all(&bytes).is_err() {
            break;
        }
    }
    drop(to.shutdown(std::net::Shutdown::Both));
    drop(from.shutdown(std::net::Shutdown::Both));
}

/// Bytes of a write of one part.
fn frame(bytes: u64) -> usize {
    let tags = 1 + bytes.div_ceil(PIECE);
    usize::try_from(48 + bytes).unwrap() + usize::try_from(tags).unwrap() * TAG_BYTES
}

/// Each change of a write on its way is noticed: no answer says that the write has landed, the connection ends, and the
/// slots of other writes keep their bytes. A new connection works at once.
#[tokio::test]
async fn a_changed_write_is_refused() {
    let members = Members::new();
    let whole = frame(MIB);
    let piece_len = PIECE_BYTES + TAG_BYTES;
    let head = 48 + TAG_BYTES;
    let flip = |at: usize| -> Change {
        Box::new(move |mut bytes| {
            bytes[at] ^= 1;
            bytes
        })
    };
    let swap = |a: usize, b: usize| -> Change {
        Box::new(move |mut bytes: Vec<u8>| {
            let (x, y) = (head + a * piece_len, head + b * piece_len);
            let first = bytes[x..x + piece_len].to_vec();
            bytes.copy_within(y..y + piece_len, x);
            bytes[y..y + piece_len].copy_from_slice(&first);
            bytes
        })
    };
    for protection in PROTECTED {
        let attacks: Vec<(&str, Change)> = vec![
            ("the batch's number", flip(8)),
            ("the lease", flip(16)),
            ("the slot", flip(24)),
            ("the offset", flip(34)),
            ("the head's tag", flip(48)),
            ("the first byte", flip(head)),
            ("a byte in the middle", flip(whole / 2)),
            ("the last tag", flip(whole - 1)),
            ("two neighbours swapped", swap(0, 1)),
            ("the ends swapped", swap(0, 3)),
            (
                "a piece repeated in place of the next",
                Box::new(move |mut bytes: Vec<u8>| {
                    bytes.copy_within(head..head + piece_len, head + piece_len);
                    bytes
                }),
            ),
            (
                "the write twice",
                Box::new(|bytes: Vec<u8>| [&bytes[..], &bytes[..]].concat()),
            ),
        ];
        for (what, attack) in attacks {
            let (sender, receiver) = members.pair(protection);
            let relay = Relay::to(&receiver);
            let link = sender.link(relay.remote(&receiver)).await.unwrap();
            assert_eq!(
                link.write(LEASE, vec![piece(3, 3, MIB)]).await,
                Outcome::Done
            );
            let others: Vec<u64> = (1..4).map(|slot| sum(&receiver, slot, MIB)).collect();
            relay.arm(TO_RECEIVER, whole, attack);
            let outcome = link.write(LEASE, vec![piece(0, 0, MIB)]).await;
            until(what, || refused(&receiver, Refusal::Forged) == 1);
            // The repetition comes after a write that is right.
            let landed = if what == "the write twice" { 2 } else { 1 };
            assert_eq!(receiver.counts().batches, landed, "{protection:?} {what}");
            assert_eq!(
                outcome == Outcome::Done,
                landed == 2,
                "{protection:?} {what}: {outcome:?}"
            );
            until("the link is broken", || link.is_broken());
            let now: Vec<u64> = (1..4).map(|slot| sum(&receiver, slot, MIB)).collect();
            assert_eq!(now, others, "{protection:?} {what}");
            let link = sender.link(relay.remote(&receiver)).await.unwrap();
            assert_eq!(
                link.write(LEASE, vec![piece(0, 0, MIB)]).await,
                Outcome::Done
            );
            assert_eq!(sum(&receiver, 0, MIB), sum(&sender, 0, MIB));
        }
    }
}

/// Bytes of one connection mean nothing on another one, not even those of the same sender for the same lease and slot.
#[tokio::test]
async fn a_recorded_write_is_refused_on_another_connection() {
    let members = Members::new();
    for protection in PROTECTED {
        let (sender, receiver) = members.pair(protection);
        let relay = Relay::to(&receiver);
        let link = sender.link(relay.remote(&receiver)).await.unwrap();
        relay.listen();
        assert_eq!(
            link.write(LEASE, vec![piece(0, 0, MIB)]).await,
            Outcome::Done
        );
        let recorded = relay.seen();
        assert_eq!(recorded.len(), frame(MIB));
        drop(link);
        let link = sender.link(relay.remote(&receiver)).await.unwrap();
        relay.arm(TO_RECEIVER, frame(MIB), |_| recorded);
        let outcome = link.write(LEASE, vec![piece(1, 0, MIB)]).await;
        assert!(matches!(outcome, Outcome::Failed { .. }), "{outcome:?}");
        assert_eq!(refused(&receiver, Refusal::Forged), 1);
        assert_eq!(receiver.counts().batches, 1);
    }
}

/// A forged or repeated answer must not make a sender believe that its write has landed.
#[tokio::test]
async fn a_changed_answer_counts_as_a_failure() {
    let members = Members::new();
    let answer = Answer::BYTES + TAG_BYTES;
    for protection in PROTECTED {
        for at in [0, 4, 8, answer - 1] {
            let (sender, receiver) = members.pair(protection);
            let relay = Relay::to(&receiver);
            let link = sender.link(relay.remote(&receiver)).await.unwrap();
            relay.arm(TO_SENDER, answer, move |mut bytes| {
                bytes[at] ^= 1;
                bytes
            });
            let outcome = link.write(LEASE, vec![piece(0, 0, MIB)]).await;
            assert!(
                matches!(
                    outcome,
                    Outcome::Failed {
                        terminal: false,
                        ..
                    }
                ),
                "{outcome:?}"
            );
        }
        // The attacker drops the second write and repeats the first answer with the second number.
        let (sender, receiver) = members.pair(protection);
        let relay = Relay::to(&receiver);
        let link = sender.link(relay.remote(&receiver)).await.unwrap();
        relay.arm(TO_SENDER, answer, |bytes| {
            let mut again = bytes.clone();
            again[8] += 1;
            [bytes, again].concat()
        });
        assert_eq!(
            link.write(LEASE, vec![piece(0, 0, MIB)]).await,
            Outcome::Done
        );
        let outcome = link.write(LEASE, vec![piece(1, 1, MIB)]).await;
        assert!(matches!(outcome, Outcome::Failed { .. }), "{outcome:?}");
    }
}

/// Whoever listens on the path reads nothing of sealed data, and would read all of authenticated data.
#[tokio::test]
async fn sealed_bytes_cannot_be_read_on_the_path() {
    let members = Members::new();
    for protection in PROTECTED {
        let (sender, receiver) = members.pair(protection);
        let secret = b"the KV of a prompt that nobody may read";
        sender.receiving.buffer.copy_in(1000, secret).unwrap();
        let relay = Relay::to(&receiver);
        let link = sender.link(relay.remote(&receiver)).await.unwrap();
        relay.listen();
        assert_eq!(
            link.write(LEASE, vec![piece(0, 0, MIB)]).await,
            Outcome::Done
        );
        let mut there = vec![0; secret.len()];
        receiver
            .receiving
            .buffer
            .copy_out(1000, &mut there)
            .unwrap();
        assert_eq!(there, secret);
        let seen = relay.seen();
        let reads = seen.windows(secret.len()).any(|window| window == secret);
        assert_eq!(reads, protection == Protection::Authenticated);
    }
}
