//! One connection: requests one after the other until the client leaves.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes};
use futures::future::join_all;
use prometheus_client::metrics::gauge::Gauge;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::sync::{AcquireError, Semaphore, SemaphorePermit};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::cache::Cache;
use crate::metrics::{Metrics, Operation, Outcome};

use super::bounds::Bounds;
use super::header::{Command, HeadError, REQUEST_BYTES, Request, Response};
use super::shares::Share;

/// The state that all connections share.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    pub(super) cache: Cache,
    pub(super) bounds: Bounds,
    /// Room for values that are being received or sent, in units of [`UNIT_BYTES`].
    pub(super) in_flight: Arc<Semaphore>,
    /// Limits the number of look-ups at the same time, because each may read a value from disk into memory.
    pub(super) lookups: Arc<Semaphore>,
    /// Limits the number of look-ups in the remote store, for the same reason.
    pub(super) remote_lookups: Arc<Semaphore>,
    pub(super) metrics: Metrics,
}

/// A connection. The buffer holds heads only: a value is read past it.
type Stream = BufReader<TcpStream>;

/// The reason why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    /// The client has closed the connection between two requests, or the store stops.
    #[error("closed")]
    Closed,
    /// The client left within a request, or the network failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The client sent or read too slowly.
    #[error("{0} took longer than {1:?}")]
    Slow(&'static str, Duration),
    /// The head cannot be read.
    #[error(transparent)]
    Head(#[from] HeadError),
}

/// Serves the requests of one client. A request that has begun is served even if `stop` is cancelled.
pub(super) async fn serve(
    stream: TcpStream,
    shared: &Shared,
    share: &Share,
    stop: &CancellationToken,
) -> End {
    let mut stream = BufReader::with_capacity(BATCH * REQUEST_BYTES, stream);
    loop {
        let head = match head(&mut stream, stop).await {
            Ok(head) => head,
            Err(end) => return end,
        };
        let served = match Request::read(&head) {
            Ok(request) => shared.answer(share, &mut stream, request).await,
            Err(error) => Err(error.into()),
        };
        if let Err(end) = served {
            return end;
        }
    }
}

/// Reads the head of the next request. A client may be silent between two requests, but not within a head.
async fn head(stream: &mut Stream, stop: &CancellationToken) -> Result<[u8; REQUEST_BYTES], End> {
    let mut head = [0; REQUEST_BYTES];
    let read = tokio::select! {
        biased;
        () = stop.cancelled() => return Err(End::Closed),
        read = stream.read(&mut head) => read?,
    };
    if read == 0 {
        return Err(End::Closed);
    }
    within("a head", HEAD_TIMEOUT, stream.read_exact(&mut head[read..])).await?;
    Ok(head)
}

impl Shared {
    async fn answer(
        &self,
        share: &Share,
        stream: &mut Stream,
        request: Request,
    ) -> Result<(), End> {
        match request.command {
            Command::Put => self.put(share, stream, request).await,
            Command::Get => self.get(share, stream, request).await,
            Command::Exist => self.exist(share, stream, request).await,
            Command::List => {
                self.metrics.count(Operation::List, Outcome::Refused);
                self.respond(stream, Response::without_value(false), Bytes::new())
                    .await
            }
            Command::Health => {
                self.metrics.count(Operation::Health, Outcome::Hit);
                self.respond(stream, Response::without_value(true), Bytes::new())
                    .await
            }
        }
    }

    /// Receives a value. The protocol has no response to a PUT, so a value that is too large is read and dropped: the
    /// next request begins behind it.
    async fn put(&self, share: &Share, stream: &mut Stream, request: Request) -> Result<(), End> {
        let bound = self.bound(request.length);
        if request.length > self.bounds.max_value || request.key.is_empty() {
            self.metrics.count(Operation::Put, Outcome::Refused);
            return skip(stream, request.length, bound).await;
        }
        let room = self.room(share, request.length).await?;
        let mut body = vec![0; request.length];
        within("a value", bound, stream.read_exact(&mut body)).await?;
        self.cache.put(request.key, request.about, body.into());
        self.metrics.count(Operation::Put, Outcome::Stored);
        self.metrics.put_bytes.inc_by(request.length as u64);
        drop(room);
        Ok(())
    }

    /// Answers an EXIST, and those behind it that have already arrived: clients ask for all chunks of a prompt at once. The
    /// look-ups run at the same time, because each may be a request to the remote store, and they end together.
    async fn exist(&self, share: &Share, stream: &mut Stream, first: Request) -> Result<(), End> {
        let mut requests = vec![first];
        while requests.len() < BATCH
            && let Some(head) = stream.buffer().first_chunk()
            && let Ok(request) = Request::read(head)
            && request.command == Command::Exist
        {
            stream.consume(REQUEST_BYTES);
            requests.push(request);
        }
        let until = self.until();
        let lookups = requests.iter().map(async |request| {
            let found = self.find(share, Operation::Exist, &request.key, until);
            Response::without_value(found.await.is_some()).write()
        });
        let answers = join_all(lookups).await.concat();
        let bound = self.bound(0);
        within("reading an answer", bound, stream.write_all(&answers)).await
    }

    async fn get(&self, share: &Share, stream: &mut Stream, request: Request) -> Result<(), End> {
        let found = self.find(share, Operation::Get, &request.key, self.until());
        let Some((found, lookup)) = found.await else {
            return self
                .respond(stream, Response::without_value(false), Bytes::new())
                .await;
        };
        let entry = found.entry();
        // The look-up ends only when there is room for its value. Otherwise each connection could hold a value outside of
        // both limits while it waits.
        let room = self.room(share, entry.body.len()).await?;
        drop(lookup);
        let response = Response {
            ok: true,
            length: entry.body.len(),
            about: entry.about,
        };
        self.respond(stream, response, entry.body.clone()).await?;
        self.metrics.get_bytes.inc_by(entry.body.len() as u64);
        drop(room);
        Ok(())
    }

    async fn respond(
        &self,
        stream: &mut Stream,
        response: Response,
        body: Bytes,
    ) -> Result<(), End> {
        let bound = self.bound(body.len());
        let head = response.write();
        // One system call writes the head and the body.
        let mut both = Buf::chain(&head[..], body);
        within("reading an answer", bound, stream.write_all_buf(&mut both)).await
    }

    /// Waits for room for a value in flight.
    async fn room<'a>(&'a self, share: &'a Share, bytes: usize) -> Result<Room<'a>, End> {
        let units = u32::try_from(bytes.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX);
        // The host's own room comes first, so that a host beyond its share does not wait in front of other hosts.
        let acquired = timeout(ROOM_TIMEOUT, async {
            let of_host = share.room.acquire_many(units).await?;
            Ok::<_, AcquireError>([of_host, self.in_flight.acquire_many(units).await?])
        });
        match acquired.await {
            Ok(Ok(permits)) => Ok(Room::new(permits, &self.metrics.in_flight, bytes)),
            _ => Err(End::Slow("room for a value in flight", ROOM_TIMEOUT)),
        }
    }

    /// Returns the time that a client has for a value of this length.
    fn bound(&self, bytes: usize) -> Duration {
        VALUE_TIMEOUT + Duration::from_secs(bytes as u64 / self.bounds.least_rate.max(1))
    }
}

/// Room for a value in flight. The room is free again when this is dropped.
struct Room<'a> {
    _permits: [SemaphorePermit<'a>; 2],
    gauge: &'a Gauge,
    bytes: i64,
}

impl<'a> Room<'a> {
    fn new(permits: [SemaphorePermit<'a>; 2], gauge: &'a Gauge, bytes: usize) -> Self {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        gauge.inc_by(bytes);
        Self {
            _permits: permits,
            gauge,
            bytes,
        }
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.gauge.dec_by(self.bytes);
    }
}

async fn skip(stream: &mut Stream, length: usize, bound: Duration) -> Result<(), End> {
    let length = length as u64;
    let mut rest = AsyncReadExt::take(stream, length);
    let copied = timeout(bound, tokio::io::copy(&mut rest, &mut tokio::io::sink())).await;
    match copied.map_err(|_| End::Slow("a value", bound))?? {
        copied if copied == length => Ok(()),
        _ => Err(End::Io(io::ErrorKind::UnexpectedEof.into())),
    }
}

async fn within<T>(
    what: &'static str,
    bound: Duration,
    work: impl Future<Output = io::Result<T>>,
) -> Result<(), End> {
    match timeout(bound, work).await {
        Ok(done) => Ok(done.map(|_| ())?),
        Err(_) => Err(End::Slow(what, bound)),
    }
}

/// EXIST requests that are answered together.
const BATCH: usize = 64;
/// The unit of the room for values in flight.
pub(super) const UNIT_BYTES: usize = 4096;
/// Longest time for the rest of a head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for a value, besides the time that its length allows.
const VALUE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for room. The room is full only if other clients are slow, and they are cut by then.
const ROOM_TIMEOUT: Duration = Duration::from_secs(60);
