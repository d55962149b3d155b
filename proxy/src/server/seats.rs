//! The places for client connections. If all places are taken, the connection that has been idle for longest
//! is closed to make room for a new connection.
//!
//! A client pool keeps connections open between its requests. Without eviction, many idle connections would
//! keep out every other client, and even the orchestrator's health probe.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use http_body::{Frame, SizeHint};
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// All client connections, and their limit.
#[derive(Debug)]
pub(crate) struct Seats {
    most: usize,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    taken: BTreeMap<u64, Taken>,
    closed: u64,
    warned: Option<Instant>,
}

#[derive(Debug)]
struct Taken {
    /// The number of requests in flight, 0 or 1. A request is in flight until its answer has ended.
    busy: usize,
    /// The start of the idle time; valid only while `busy` is 0.
    since: Instant,
    leave: CancellationToken,
}

/// The place of one connection. Dropping the seat frees the place.
#[derive(Debug)]
pub(crate) struct Seat {
    seats: Arc<Seats>,
    number: u64,
    /// Cancelled when a new connection takes this place.
    pub leave: CancellationToken,
    /// True if all other places were busy. The connection then belongs to the reserve, which serves health,
    /// metrics and admin endpoints, but no `/v1/` requests.
    pub is_reserve: bool,
    /// True if an idle connection was asked to close, to make room for this connection.
    pub displaces: bool,
}

/// A request in flight. Dropping the value makes the connection idle again.
#[derive(Debug)]
pub(crate) struct Busy {
    seats: Arc<Seats>,
    number: u64,
}

impl Seats {
    /// Returns places for `most` connections.
    pub(crate) fn new(most: usize) -> Self {
        Self {
            most,
            table: Mutex::default(),
        }
    }

    /// Takes a place. If all places are taken, the connection that has been idle for longest is asked to
    /// leave.
    pub(crate) fn sit(self: &Arc<Self>, now: Instant) -> Seat {
        let mut table = self.table();
        let staying = |taken: &&Taken| !taken.leave.is_cancelled();
        let is_full = table.taken.values().filter(staying).count() >= self.most;
        let displaces = is_full && table.displace(now, self.most);
        let (number, leave) = (table.next, CancellationToken::new());
        table.next += 1;
        let taken = Taken {
            busy: 0,
            since: now,
            leave: leave.clone(),
        };
        table.taken.insert(number, taken);
        Seat {
            seats: Arc::clone(self),
            number,
            leave,
            is_reserve: is_full && !displaces,
            displaces,
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // A panic cannot leave the table half changed, so a poisoned lock is harmless.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Asks the connection that has been idle for longest to leave. Returns false if no connection is idle.
    fn displace(&mut self, now: Instant, most: usize) -> bool {
        let idle = self.taken.values().filter(|taken| taken.busy == 0);
        let staying = idle.filter(|taken| !taken.leave.is_cancelled());
        let Some(longest) = staying.min_by_key(|taken| taken.since) else {
            return false;
        };
        longest.leave.cancel();
        self.closed += 1;
        if self.warned.is_none_or(|at| at + WARN_EVERY <= now) {
            self.warned = Some(now);
            let (limit, total) = (most, self.closed);
            warn!(
                limit,
                total,
                "the limit --max-connections is reached: the proxy closes the client connections that have been idle for longest"
            );
        }
        true
    }
}

impl Seat {
    /// Marks the connection as busy until the returned value is dropped.
    pub(crate) fn begin(&self) -> Busy {
        if let Some(taken) = self.seats.table().taken.get_mut(&self.number) {
            taken.busy += 1;
        }
        Busy {
            seats: Arc::clone(&self.seats),
            number: self.number,
        }
    }

    /// Returns true while a request is in flight.
    pub(crate) fn is_busy(&self) -> bool {
        let table = self.seats.table();
        table.taken.get(&self.number).is_some_and(|t| t.busy > 0)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.seats.table().taken.remove(&self.number);
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        if let Some(taken) = self.seats.table().taken.get_mut(&self.number) {
            taken.busy -= 1;
            taken.since = Instant::now();
        }
    }
}

/// An answer's body that keeps its connection busy until the body is dropped.
#[derive(Debug)]
pub(crate) struct BusyBody {
    body: Body,
    _busy: Busy,
}

impl BusyBody {
    /// Returns `body` together with the value that keeps its connection busy.
    pub(crate) fn new(body: Body, busy: Busy) -> Self {
        Self { body, _busy: busy }
    }
}

impl http_body::Body for BusyBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Shortest time between two log lines about closed connections. The metric counts all of them.
const WARN_EVERY: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_idle_leaves() {
        let seats = Arc::new(Seats::new(2));
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let first = seats.sit(start);
        let busy = first.begin();
        let second = seats.sit(at(1));
        let third = seats.sit(at(2));
        assert!(third.displaces && !third.is_reserve);
        assert!(second.leave.is_cancelled() && !first.leave.is_cancelled());
        let busy_too = third.begin();
        let reserve = seats.sit(at(3));
        assert!(reserve.is_reserve && !reserve.displaces);
        drop((busy, second));
        assert!(!first.is_busy() && third.is_busy());
        drop(busy_too);
        let next = seats.sit(at(4));
        assert!(next.displaces && !next.is_reserve);
        drop((first, third, reserve, next));
        assert!(seats.table().taken.is_empty());
    }
}
