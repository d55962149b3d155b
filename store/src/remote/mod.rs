//! A tier below memory and disk: a distributed store that other programs keep, such as Valkey or an object store.
//!
//! Each value that is put goes there, too, after a while. A value that memory and disk lack is read from there. A remote
//! store that is slow, lost or full costs nothing but its values: each read has a bound, reads and writes pause after
//! failures in a row, and values that wait to be put have a bound of bytes.

mod address;
mod backend;
mod credentials;
mod envelope;
mod metrics;
mod pause;
mod redis;
mod s3;
mod writer;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use prometheus_client::registry::Registry;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tracing::{info, warn};

use crate::entry::{About, Entry, Key};

use self::backend::{Backend, BackendError};
use self::metrics::{Metrics, Operation, Outcome};
use self::pause::Pause;
use self::redis::Redis;
use self::s3::S3;
use self::writer::Writer;

pub use self::address::{Address, AddressError, Node};
pub use self::credentials::Credentials;

/// The settings of a remote store.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The place.
    pub address: Address,
    /// Credentials; without them, S3 takes Amazon's environment variables.
    pub credentials: Credentials,
    /// URL of an S3 server other than Amazon's.
    pub endpoint: Option<String>,
    /// Region of an S3 bucket; absent means `AWS_REGION` or `us-east-1`.
    pub region: Option<String>,
    /// The beginning of all names.
    pub prefix: String,
    /// Longest time for a read. A write may take ten times as long, because no client waits for it.
    pub timeout: Duration,
    /// Reads at the same time.
    pub requests: usize,
    /// Bytes of values that may wait to be put.
    pub queue: usize,
    /// Bytes of the largest value.
    pub max_value: usize,
}

/// A remote store. A clone is a second handle to the same one.
#[derive(Clone, Debug)]
pub struct Remote {
    shared: Arc<Shared>,
    writer: Arc<Writer>,
}

/// A read that brought no value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoValue {
    /// There is no such value.
    #[error("absent")]
    Absent,
    /// The value was damaged, or its life had ended.
    #[error("not usable")]
    NotUsable,
    /// The remote store is slow, lost, or busy.
    #[error("the remote store has no answer")]
    NoAnswer,
}

#[derive(Debug)]
struct Shared {
    settings: Settings,
    backend: Box<dyn Backend>,
    requests: Semaphore,
    reads: Mutex<Pause>,
    writes: Mutex<Pause>,
    metrics: Metrics,
}

impl Remote {
    /// Makes a remote store. No connection is opened yet, so a remote store that is away does not stop the start.
    ///
    /// # Errors
    /// The flag, its mistake and the cure.
    pub fn open(settings: Settings) -> Result<Self, String> {
        let backend: Box<dyn Backend> = match &settings.address {
            Address::S3 { bucket } => Box::new(S3::new(bucket, &settings)?),
            address => Box::new(Redis::new(address, &settings)?),
        };
        info!(remote = %settings.address, "values are also kept in a remote store");
        let metrics = Metrics::default();
        for operation in [Operation::Get, Operation::Put] {
            metrics.set_away(operation, false);
        }
        let queue = settings.queue;
        let shared = Arc::new(Shared {
            requests: Semaphore::new(settings.requests),
            backend,
            reads: Mutex::default(),
            writes: Mutex::default(),
            metrics,
            settings,
        });
        Ok(Self {
            writer: Arc::new(Writer::start(shared.clone(), queue)),
            shared,
        })
    }

    /// Lets a value be put, without waiting.
    pub fn put(&self, key: Key, entry: Entry) {
        self.writer.put(key, entry);
    }

    /// Reads a value, and checks it.
    ///
    /// # Errors
    /// See [`NoValue`].
    pub async fn get(&self, key: &Key) -> Result<Entry, NoValue> {
        self.shared.get(key).await
    }

    /// Returns false while reads would fail at once, so that the caller need not wait for its turn.
    pub fn may_answer(&self) -> bool {
        !lock(&self.shared.reads).refuses(Instant::now())
    }

    /// Longest time of a read.
    pub fn timeout(&self) -> Duration {
        self.shared.settings.timeout
    }

    /// Puts a small value and reads it, as a test of address, credentials and rights.
    ///
    /// # Errors
    /// The cause, without credentials.
    pub async fn check(&self) -> Result<(), String> {
        let key = b"pd-store check".to_vec();
        let body = Bytes::from_static(b"check");
        let entry = Entry::new(About::default(), body, Some(CHECK_LIFE));
        let shared = &self.shared;
        let written = timeout(
            writer::bound(shared.settings.timeout),
            shared.write(&key, &entry),
        );
        match written.await {
            Err(_) => return Err("no answer to a write in time".to_owned()),
            Ok(Err(error)) => return Err(format!("a write failed: {}", shared.told(&error))),
            Ok(Ok(())) => {}
        }
        match timeout(writer::bound(shared.settings.timeout), shared.read(&key)).await {
            Err(_) => Err("no answer to a read in time".to_owned()),
            Ok(Err(error)) => Err(format!("a read failed: {}", shared.told(&error))),
            Ok(Ok(None)) => Err("a value that was written could not be read".to_owned()),
            Ok(Ok(Some(value))) => match envelope::open(&value, &key) {
                Ok(found) if found.body == entry.body => Ok(()),
                _ => Err("a value that was written came back changed".to_owned()),
            },
        }
    }

    /// Adds the metrics to a registry.
    pub fn register(&self, registry: &mut Registry) {
        self.shared.metrics.register(registry);
    }

    /// Puts the values that still wait, for at most `grace`.
    pub async fn close(&self, grace: Duration) {
        self.writer.close(grace).await;
    }
}

impl Shared {
    async fn get(&self, key: &Key) -> Result<Entry, NoValue> {
        let count = |outcome| self.metrics.count(Operation::Get, outcome);
        let bound = self.settings.timeout;
        let Ok(Ok(_turn)) = timeout(bound, self.requests.acquire()).await else {
            count(Outcome::Full);
            return Err(NoValue::NoAnswer);
        };
        if !lock(&self.reads).may_ask(Instant::now(), bound) {
            count(Outcome::Skipped);
            return Err(NoValue::NoAnswer);
        }
        let value = match timeout(bound, self.read(key)).await {
            Err(_) => {
                count(Outcome::TimedOut);
                self.failed(Operation::Get, "no answer in time");
                return Err(NoValue::NoAnswer);
            }
            Ok(Err(error)) => {
                count(Outcome::Failed);
                self.failed(Operation::Get, &self.told(&error));
                return Err(NoValue::NoAnswer);
            }
            Ok(Ok(value)) => value,
        };
        self.succeeded(Operation::Get);
        let Some(value) = value else {
            count(Outcome::Miss);
            return Err(NoValue::Absent);
        };
        match envelope::open(&value, key) {
            Ok(entry) if entry.has_ended() => {
                count(Outcome::Ended);
                Err(NoValue::NotUsable)
            }
            Ok(entry) => {
                count(Outcome::Hit);
                self.metrics.get_bytes.inc_by(entry.body.len() as u64);
                Ok(entry)
            }
            Err(damage) => {
                warn!(%damage, "a value in the remote store is not used");
                count(Outcome::Broken);
                Err(NoValue::NotUsable)
            }
        }
    }

    /// Puts a value once.
    async fn put(&self, key: &Key, entry: &Entry) -> Result<(), Outcome> {
        let bound = writer::bound(self.settings.timeout);
        match timeout(bound, self.write(key, entry)).await {
            Ok(Ok(())) => {
                self.succeeded(Operation::Put);
                self.metrics.count(Operation::Put, Outcome::Stored);
                self.metrics.put_bytes.inc_by(entry.body.len() as u64);
                Ok(())
            }
            Ok(Err(error)) => {
                self.failed(Operation::Put, &self.told(&error));
                Err(Outcome::Failed)
            }
            Err(_) => {
                self.failed(Operation::Put, "no answer in time");
                Err(Outcome::TimedOut)
            }
        }
    }

    fn may_write(&self) -> bool {
        let bound = writer::bound(self.settings.timeout);
        lock(&self.writes).may_ask(Instant::now(), bound)
    }

    async fn read(&self, key: &Key) -> Result<Option<Bytes>, BackendError> {
        let name = envelope::name(&self.settings.prefix, key);
        let most = self.settings.max_value + envelope::MOST_HEAD_BYTES;
        self.backend.get(&name, most).await
    }

    async fn write(&self, key: &Key, entry: &Entry) -> Result<(), BackendError> {
        let name = envelope::name(&self.settings.prefix, key);
        let parts = [envelope::head(key, entry), entry.body.clone()];
        self.backend.put(&name, parts, entry.life()).await
    }

    fn succeeded(&self, operation: Operation) {
        if lock(self.pause(operation)).succeeded() {
            self.metrics.set_away(operation, false);
            info!(remote = %self.settings.address, ?operation, "the remote store answers again");
        }
    }

    fn failed(&self, operation: Operation, error: &str) {
        if lock(self.pause(operation)).failed(Instant::now()) {
            self.metrics.set_away(operation, true);
            let remote = &self.settings.address;
            warn!(%remote, ?operation, "the remote store fails; the store goes on without it: {error}");
        }
    }

    fn pause(&self, operation: Operation) -> &Mutex<Pause> {
        match operation {
            Operation::Get => &self.reads,
            Operation::Put => &self.writes,
        }
    }

    /// Returns an error's text for the log: short, in one line, and without credentials.
    fn told(&self, error: &BackendError) -> String {
        let hidden = self.settings.credentials.hide(&error.to_string());
        let line = hidden.split_whitespace().collect::<Vec<_>>().join(" ");
        line.chars().take(MOST_ERROR_CHARS).collect()
    }
}

fn lock(pause: &Mutex<Pause>) -> MutexGuard<'_, Pause> {
    pause.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An object store's error may be a page of XML.
const MOST_ERROR_CHARS: usize = 400;
/// Life of the value of a check.
const CHECK_LIFE: Duration = Duration::from_secs(60);
