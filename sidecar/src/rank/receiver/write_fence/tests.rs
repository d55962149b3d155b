//! Checks when, and by which proof, a sender counts as dead.

use protocol::Epoch;
use serde_bytes::ByteBuf;

use super::*;

const REMOTE: Duration = Duration::from_secs(100);
const LEASE: LeaseId = LeaseId(5);
const FROM: &str = "10.0.0.2:4711";

fn sender(epoch: u64) -> SenderId {
    SenderId {
        id: "p".to_owned(),
        epoch: Epoch(epoch),
    }
}

/// Makes the hello of a sender on another host. `secret` is the secret of the sender's process, and `ended`
/// has the secrets of earlier processes.
fn hello(epoch: u64, secret: u8, ended: &[u8]) -> Hello {
    let secret_of = |n: &u8| ByteBuf::from([*n; 32]);
    Hello {
        id: "p".to_owned(),
        epoch: Epoch(epoch),
        layout: None,
        transports: Vec::new(),
        host: "another".to_owned(),
        pid: 1,
        seal: ByteBuf::from(proof_hash_of(&[secret; 32])),
        ended: ended.iter().map(secret_of).collect(),
        refused: None,
        ..Hello::example()
    }
}

/// Returns the next result, or `None` if no result comes within `time`.
async fn within(fences: &mut WriteFences, time: Duration) -> Option<News> {
    tokio::time::timeout(time, fences.next()).await.ok()
}

#[tokio::test(start_paused = true)]
async fn a_successor_on_another_host_vouches_for_the_one_before() {
    let mut fences = WriteFences::new(REMOTE);
    fences.introduce(&hello(1, 1, &[]), FROM);
    fences.seek(sender(1), LEASE);
    assert_eq!(within(&mut fences, 10 * REMOTE).await, None, "it may live");
    fences.introduce(&hello(2, 2, &[1]), FROM);
    assert!(fences.is_settling());
    assert_eq!(within(&mut fences, REMOTE - GRACE).await, None, "too early");
    let over = Some(News::Over(sender(1)));
    assert_eq!(within(&mut fences, 2 * GRACE).await, over);
    assert!(!fences.is_settling());
    // A repeated handshake gives no second result for a sender that is known to have ended.
    fences.introduce(&hello(2, 2, &[1]), FROM);
    assert_eq!(within(&mut fences, 10 * REMOTE).await, None);
    // A second lease of the first sender seeks its proof only after the sender's end is known.
    fences.seek(sender(1), LeaseId(6));
    assert_eq!(within(&mut fences, GRACE).await, over);
    // The successor still runs.
    fences.seek(sender(2), LEASE);
    assert_eq!(within(&mut fences, 10 * REMOTE).await, None);
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_ends_within_the_grace_waits_for_its_end() {
    let mut fences = WriteFences::new(REMOTE);
    fences.introduce(&hello(1, 1, &[]), FROM);
    fences.introduce(&hello(2, 2, &[1]), FROM);
    assert_eq!(within(&mut fences, REMOTE / 2).await, None);
    fences.seek(sender(1), LEASE);
    assert_eq!(within(&mut fences, REMOTE / 3).await, None);
    let over = Some(News::Over(sender(1)));
    assert_eq!(within(&mut fences, REMOTE / 3).await, over);
}

#[tokio::test(start_paused = true)]
async fn a_new_epoch_alone_proves_nothing() {
    let mut fences = WriteFences::new(REMOTE);
    fences.introduce(&hello(1, 1, &[]), FROM);
    fences.seek(sender(1), LEASE);
    // The first hello is from a second sidecar with the same name. In the second hello, `ended` has a secret
    // that no process had. In the third hello, `ended` has the first sender's proof hash instead of its
    // secret.
    fences.introduce(&hello(2, 2, &[]), FROM);
    fences.introduce(&hello(3, 3, &[9]), FROM);
    let mut odd = hello(4, 4, &[]);
    odd.ended = vec![ByteBuf::from(proof_hash_of(&[1; 32])), ByteBuf::new()];
    fences.introduce(&odd, FROM);
    assert_eq!(within(&mut fences, 10 * REMOTE).await, None);
}

#[tokio::test(start_paused = true)]
async fn who_shows_no_seal_is_never_vouched_for() {
    let mut fences = WriteFences::new(REMOTE);
    let mut old = hello(1, 1, &[]);
    old.seal = ByteBuf::new();
    fences.introduce(&old, FROM);
    // A later hello with the same name and epoch cannot give the sender a proof hash.
    fences.introduce(&hello(1, 1, &[]), FROM);
    fences.seek(sender(1), LEASE);
    fences.introduce(&hello(2, 2, &[1]), FROM);
    assert_eq!(within(&mut fences, 10 * REMOTE).await, None);
}

/// Checks that one proof ends all senders of a process. Each rank, and each slot layout, has its own epoch.
#[tokio::test(start_paused = true)]
async fn all_senders_of_a_process_end_with_it() {
    let mut fences = WriteFences::new(REMOTE);
    for epoch in [1, 2] {
        fences.introduce(&hello(epoch, 1, &[]), FROM);
        fences.seek(sender(epoch), LeaseId(epoch));
    }
    fences.introduce(&hello(3, 2, &[1]), FROM);
    let mut over = Vec::new();
    while let Some(News::Over(sender)) = within(&mut fences, 2 * REMOTE).await {
        over.push(sender);
    }
    over.sort();
    assert_eq!(over, [sender(1), sender(2)]);
}

#[tokio::test]
async fn a_process_on_this_host_is_watched() {
    let mut child = std::process::Command::new("sleep")
        .arg("100")
        .spawn()
        .unwrap();
    let mut fences = WriteFences::new(REMOTE);
    let mut local = hello(1, 1, &[]);
    (local.host, local.pid) = (host_id::identity(), child.id());
    fences.introduce(&local, FROM);
    fences.seek(sender(1), LEASE);
    assert_eq!(within(&mut fences, GRACE / 5).await, None);
    child.kill().unwrap();
    let end = 5 * GRACE;
    assert_eq!(within(&mut fences, end).await, Some(News::Settling));
    assert!(fences.is_settling());
    assert_eq!(within(&mut fences, GRACE / 2).await, None);
    assert_eq!(within(&mut fences, end).await, Some(News::Over(sender(1))));
    child.wait().unwrap();
}

/// Checks that one host cannot remove another host's sender from the table by inventing many names. Every peer
/// learns this host's identity, and any peer can invent names.
#[tokio::test(start_paused = true)]
async fn a_crowd_of_names_pushes_out_none_of_another_host() {
    let mut fences = WriteFences::new(REMOTE);
    // This sender has the first name in the alphabet and is the oldest.
    fences.introduce(&hello(1, 1, &[]), FROM);
    for n in 0..3 * MAX_SENDERS as u64 {
        let mut made_up = hello(n, 9, &[]);
        made_up.id = format!("q{n}");
        fences.introduce(&made_up, &format!("10.0.0.66:{}", 1024 + n % 60000));
    }
    assert_eq!(fences.senders.len(), MAX_SENDERS);
    // Proofs about invented senders use only a limited amount of memory, too.
    for n in 0..MAX_STEPS as u64 + 10 {
        let mut made_up = hello(n, 8, &[8]);
        made_up.id = format!("r{n}");
        fences.introduce(&made_up, "10.0.0.66:1");
    }
    assert_eq!(fences.steps.len(), MAX_STEPS);
    while within(&mut fences, 2 * REMOTE).await.is_some() {}
    assert!(!fences.is_settling());
    fences.seek(sender(1), LEASE);
    fences.introduce(&hello(2, 2, &[1]), FROM);
    let over = Some(News::Over(sender(1)));
    assert_eq!(within(&mut fences, 2 * REMOTE).await, over);
}
