//! The values: in memory, on disk below it, and in a remote store below both.
//!
//! The cache crate decides what stays (recency and frequency), writes each value to disk when it is put, checks the
//! checksum of each value that it reads from disk, and finds the values again after a restart. A value that was torn by
//! the end of the process is dropped. Time to live is not known to the crate, so each value has its deadline.

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use foyer::{
    BlockEngineConfig, Compression, DeviceBuilder, FsDeviceBuilder, HybridCache,
    HybridCacheBuilder, HybridCacheEntry, HybridCachePolicy, LfuConfig, PsyncIoEngineConfig,
    RecoverMode, Source,
};
use tracing::{info, warn};

use crate::entry::{About, Entry, Key};
use crate::remote::{NoValue, Remote};

/// The values of the store. A clone is a second handle to the same values.
#[derive(Clone, Debug)]
pub struct Cache {
    inner: HybridCache<Key, Entry>,
    ttl: Option<Duration>,
    remote: Option<Remote>,
}

/// The sizes of a cache.
#[derive(Clone, Debug)]
pub struct Sizes {
    /// Bytes of the values in memory.
    pub memory: usize,
    /// The part on disk; absent if values lie in memory only.
    pub disk: Option<Disk>,
    /// Bytes of the largest value.
    pub max_value: usize,
    /// Life of a value; absent if values live until they are evicted.
    pub ttl: Option<Duration>,
}

/// The part of a cache that lies on disk.
#[derive(Clone, Debug)]
pub struct Disk {
    /// The folder. The store makes it.
    pub folder: PathBuf,
    /// Bytes of all files in the folder.
    pub bytes: usize,
}

/// A value that was found.
#[derive(Debug)]
pub struct Found {
    entry: HybridCacheEntry<Key, Entry>,
    /// The tier in which the value was found.
    pub tier: Tier,
}

/// A place in which a value can be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// Memory of this process.
    Memory,
    /// The disk of this store.
    Disk,
    /// The remote store.
    Remote,
}

/// Result of a read that is not a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// There is no such value.
    Absent,
    /// The life of the value has ended.
    Ended,
    /// The value could not be read from disk, or its checksum is wrong.
    Broken,
}

/// Error of a cache that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The disk part is too small for its values.
    #[error(
        "--disk-size {bytes} is too small: with --max-value {max_value} it must be at least {least}"
    )]
    TooSmall {
        /// The size as given.
        bytes: usize,
        /// Bytes of the largest value.
        max_value: usize,
        /// The smallest size that works.
        least: usize,
    },
    /// The file system has too little room.
    #[error(
        "--disk {folder}: the file system has {free} bytes free for --disk-size {bytes}; choose a smaller size"
    )]
    NoRoom {
        /// The folder.
        folder: PathBuf,
        /// Bytes that this user may still write, and the bytes that lie in the folder already.
        free: u64,
        /// The size as given.
        bytes: usize,
    },
    /// The folder cannot be made or read.
    #[error("--disk {folder}: {cause}")]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// The error of the file system.
        cause: std::io::Error,
    },
    /// The cache crate's own error.
    #[error("the cache cannot be opened: {0}")]
    Cache(#[from] foyer::Error),
}

impl Sizes {
    /// Checks that the disk part can be as large as it is given, and makes its folder.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn check(&self) -> Result<(), OpenError> {
        self.disk
            .as_ref()
            .map_or(Ok(()), |disk| check(disk, self.max_value))
    }
}

impl Cache {
    /// Opens the cache, and finds the values again that lie on disk. With a `remote`, values are also put there, and
    /// [`Cache::fetch`] reads them.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub async fn open(sizes: &Sizes, remote: Option<Remote>) -> Result<Self, OpenError> {
        let builder = HybridCacheBuilder::new()
            .with_name("pd-store")
            // A value is on disk soon after it is put, and not only when memory is full. Otherwise the end of the
            // process would lose most values.
            .with_policy(HybridCachePolicy::WriteOnInsertion)
            .memory(sizes.memory)
            // Each shard has a part of the memory. A part must be able to hold several of the largest values.
            .with_shards((sizes.memory / (4 * sizes.max_value)).clamp(1, MAX_SHARDS))
            .with_eviction_config(LfuConfig::default())
            .with_weighter(|key: &Key, entry: &Entry| entry.weight(key))
            .storage();
        let builder = match &sizes.disk {
            None => builder,
            Some(disk) => {
                let block = block_bytes(sizes.max_value);
                sizes.check()?;
                let device = FsDeviceBuilder::new(&disk.folder)
                    .with_capacity(disk.bytes / block * block)
                    .build()?;
                let waiting = (4 * block).max(WRITE_QUEUE_BYTES);
                builder
                    .with_io_engine_config(PsyncIoEngineConfig::new())
                    .with_engine_config(
                        BlockEngineConfig::new(device)
                            .with_block_size(block)
                            .with_buffer_pool_size(2 * block)
                            .with_submit_queue_size_threshold(waiting),
                    )
                    // KV does not compress well enough to pay for its time.
                    .with_compression(Compression::None)
                    .with_recover_mode(RecoverMode::Quiet)
            }
        };
        let inner = builder.build().await?;
        info!(
            memory = sizes.memory,
            disk = sizes.disk.as_ref().map(|disk| disk.bytes),
            "cache opened"
        );
        Ok(Self {
            inner,
            ttl: sizes.ttl,
            remote,
        })
    }

    /// Keeps a value. An older value of the same key is replaced.
    pub fn put(&self, key: Key, about: About, body: Bytes) {
        let entry = Entry::new(about, body, self.ttl);
        if let Some(remote) = &self.remote {
            remote.put(key.clone(), entry.clone());
        }
        self.inner.insert(key, entry);
    }

    /// Returns the remote store.
    pub fn remote(&self) -> Option<&Remote> {
        self.remote.as_ref()
    }

    /// Finds a value in memory or on disk. A value on disk is read into memory, so that a look-up which finds a value also
    /// proves that the value can be read.
    ///
    /// # Errors
    /// See [`Missing`].
    pub async fn get(&self, key: &Key) -> Result<Found, Missing> {
        let entry = match self.inner.get(key).await {
            Ok(Some(entry)) => entry,
            Ok(None) => return Err(Missing::Absent),
            Err(error) => {
                warn!(%error, "a value could not be read from disk");
                // Otherwise a read from the remote store would end at the disk.
                if self.remote.is_some() {
                    self.inner.remove(key);
                }
                return Err(Missing::Broken);
            }
        };
        if entry.value().has_ended() {
            self.inner.remove(key);
            return Err(Missing::Ended);
        }
        let tier = match entry.source() {
            Source::Disk => Tier::Disk,
            Source::Memory | Source::Outer => Tier::Memory,
        };
        Ok(Found { entry, tier })
    }

    /// Reads a value that [`Cache::get`] did not find from the remote store, and keeps it in memory and on disk. Several
    /// calls for one key make one request.
    ///
    /// # Errors
    /// See [`Missing`].
    ///
    /// # Cancel safety
    /// If the future is dropped, the request goes on, and its value is kept.
    pub async fn fetch(&self, key: &Key) -> Result<Found, Missing> {
        let Some(remote) = &self.remote else {
            return Err(Missing::Absent);
        };
        let (remote, own) = (remote.clone(), key.clone());
        let fetch = move || async move { remote.get(&own).await };
        match self.inner.get_or_fetch(key, fetch).await {
            Ok(entry) if entry.value().has_ended() => {
                self.inner.remove(key);
                Err(Missing::Ended)
            }
            Ok(entry) => {
                let tier = Tier::Remote;
                Ok(Found { entry, tier })
            }
            Err(error) => match error.downcast_ref::<NoValue>() {
                Some(NoValue::NotUsable) => Err(Missing::Broken),
                Some(NoValue::Absent | NoValue::NoAnswer) => Err(Missing::Absent),
                None => {
                    warn!(%error, "a value could not be read from disk");
                    Err(Missing::Broken)
                }
            },
        }
    }

    /// Returns the bytes of the values in memory.
    pub fn memory_bytes(&self) -> usize {
        self.inner.memory().usage()
    }

    /// Returns the bytes that were written to disk and read from it since the start.
    pub fn disk_bytes(&self) -> (u64, u64) {
        let statistics = self.inner.statistics();
        (
            statistics.disk_write_bytes() as u64,
            statistics.disk_read_bytes() as u64,
        )
    }

    /// Writes what still waits for the remote store, for at most `grace`, and what waits for the disk. Closes the cache.
    pub async fn close(&self, grace: Duration) {
        if let Some(remote) = &self.remote {
            remote.close(grace).await;
        }
        if let Err(error) = self.inner.close().await {
            warn!(%error, "cannot write the last values to disk");
        }
    }
}

impl Found {
    /// The value. The cache may forget the value meanwhile; its bytes stay until this handle ends.
    pub fn entry(&self) -> &Entry {
        self.entry.value()
    }
}

/// Returns the bytes of a region on disk. The cache crate drops values that are larger than a region.
fn block_bytes(max_value: usize) -> usize {
    (max_value + REGION_HEAD_BYTES)
        .next_multiple_of(PAGE_BYTES)
        .max(MIN_REGION_BYTES)
}

/// Checks that the disk part can be as large as it is given.
fn check(disk: &Disk, max_value: usize) -> Result<(), OpenError> {
    let least = MIN_REGIONS * block_bytes(max_value);
    if disk.bytes < least {
        return Err(OpenError::TooSmall {
            bytes: disk.bytes,
            max_value,
            least,
        });
    }
    let folder = || disk.folder.clone();
    let failed = |cause| OpenError::Folder {
        folder: folder(),
        cause,
    };
    std::fs::create_dir_all(&disk.folder).map_err(failed)?;
    let mut own = 0;
    for file in std::fs::read_dir(&disk.folder).map_err(failed)? {
        own += file.and_then(|file| file.metadata()).map_err(failed)?.len();
    }
    let system = rustix::fs::statvfs(&disk.folder).map_err(|cause| failed(cause.into()))?;
    let free = system.f_bavail.saturating_mul(system.f_frsize) + own;
    if free < disk.bytes as u64 {
        return Err(OpenError::NoRoom {
            folder: folder(),
            free,
            bytes: disk.bytes,
        });
    }
    Ok(())
}

const MAX_SHARDS: usize = 16;
const PAGE_BYTES: usize = 4096;
/// Room in a region besides one largest value: the crate's index and heads, the key and our own head.
const REGION_HEAD_BYTES: usize = 64 << 10;
const MIN_REGION_BYTES: usize = 16 << 20;
/// With fewer regions, the crate would evict a third of all values at once.
const MIN_REGIONS: usize = 4;
/// Bytes that may wait for the disk. What does not fit stays in memory alone.
const WRITE_QUEUE_BYTES: usize = 256 << 20;
