//! The values that wait to be put into the remote store, and the tasks that put them.
//!
//! Nobody waits for these puts. So they are tried again, as long as there is room for newer values.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tracing::warn;

use crate::entry::{Entry, Key};

use super::Shared;
use super::metrics::{Operation, Outcome};

/// The queue with its tasks.
#[derive(Debug)]
pub(super) struct Writer {
    /// `None` after the end.
    running: Mutex<Option<Running>>,
    /// Room for values that wait, in units of [`UNIT_BYTES`].
    room: Arc<Semaphore>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Running {
    values: mpsc::UnboundedSender<Waiting>,
    tasks: JoinSet<()>,
}

#[derive(Debug)]
struct Waiting {
    key: Key,
    entry: Entry,
    room: Room,
}

/// Room of a value that waits. It comes back when the value has been put, or dropped.
#[derive(Debug)]
struct Room {
    _permit: OwnedSemaphorePermit,
    bytes: i64,
    shared: Arc<Shared>,
}

impl Writer {
    pub(super) fn start(shared: Arc<Shared>, queue_bytes: usize) -> Self {
        let (values, receiver) = mpsc::unbounded_channel();
        let receiver = Arc::new(tokio::sync::Mutex::new(receiver));
        let mut tasks = JoinSet::new();
        for _ in 0..TASKS {
            tasks.spawn(run(receiver.clone(), shared.clone()));
        }
        let units = (queue_bytes / UNIT_BYTES).min(Semaphore::MAX_PERMITS);
        Self {
            running: Mutex::new(Some(Running { values, tasks })),
            room: Arc::new(Semaphore::new(units)),
            shared,
        }
    }

    /// Lets a value be put. If too many bytes wait, the value is dropped and counted.
    pub(super) fn put(&self, key: Key, entry: Entry) {
        let bytes = entry.weight(&key);
        let units = u32::try_from(bytes.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX);
        let Ok(permit) = self.room.clone().try_acquire_many_owned(units) else {
            self.shared.metrics.count(Operation::Put, Outcome::Full);
            return;
        };
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        self.shared.metrics.waiting.inc_by(bytes);
        let room = Room {
            _permit: permit,
            bytes,
            shared: self.shared.clone(),
        };
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = &*running {
            // The tasks live as long as the sender.
            running.values.send(Waiting { key, entry, room }).ok();
        }
    }

    /// Puts what still waits, for at most `grace`.
    pub(super) async fn close(&self, grace: Duration) {
        let running = {
            let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            running.take()
        };
        let Some(Running { values, mut tasks }) = running else {
            return;
        };
        drop(values);
        let done = async { while tasks.join_next().await.is_some() {} };
        if timeout(grace, done).await.is_err() {
            let bytes = self.shared.metrics.waiting.get();
            warn!(
                bytes,
                ?grace,
                "the remote store did not take all values before the end"
            );
        }
    }
}

/// Puts values until the sender is gone and the queue is empty.
async fn run(
    values: Arc<tokio::sync::Mutex<mpsc::UnboundedReceiver<Waiting>>>,
    shared: Arc<Shared>,
) {
    loop {
        let next = values.lock().await.recv().await;
        let Some(Waiting { key, entry, room }) = next else {
            return;
        };
        put(&shared, &key, &entry).await;
        drop(room);
    }
}

/// Puts one value, with several attempts.
async fn put(shared: &Shared, key: &Key, entry: &Entry) {
    let mut pause = FIRST_PAUSE;
    for attempt in 1..=ATTEMPTS {
        while !shared.may_write() {
            // Values wait through a failure, and newer ones are dropped if the queue is full of them. A value whose life
            // ends meanwhile is not worth a put.
            if entry.has_ended() {
                return shared.metrics.count(Operation::Put, Outcome::Ended);
            }
            sleep(POLL).await;
        }
        match shared.put(key, entry).await {
            Ok(()) => return,
            Err(outcome) if attempt == ATTEMPTS => shared.metrics.count(Operation::Put, outcome),
            Err(_) => sleep(pause).await,
        }
        pause *= 2;
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.shared.metrics.waiting.dec_by(self.bytes);
    }
}

/// Returns the bound of a put: nobody waits for it, so it may take longer than a get.
pub(super) fn bound(timeout: Duration) -> Duration {
    timeout * 10
}

/// Puts at the same time.
const TASKS: usize = 4;
const UNIT_BYTES: usize = 4096;
/// Attempts for one value.
const ATTEMPTS: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Time between two looks whether the remote store may be asked again.
const POLL: Duration = Duration::from_millis(100);
