//! Limits the number and the memory of the request bodies that are being received. When another body needs
//! room, the slowest body loses its place.
//!
//! A body that stops half-way holds its place and its bytes until `--client-timeout`. Without the limits, a
//! few hundred bodies that stop half-way would keep every client out. A new body takes the place of the
//! slowest body of one address: the address whose bodies hold the most memory. So an address with many bodies
//! cannot displace the bodies of other addresses.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

/// All request bodies that are being received.
#[derive(Debug)]
pub(crate) struct Uploads {
    most: usize,
    most_bytes: usize,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    bytes: usize,
    open: BTreeMap<u64, Open>,
}

#[derive(Debug)]
struct Open {
    from: Option<IpAddr>,
    bytes: usize,
    /// Start of the current interval of measurement, and the number of bytes that had come before it.
    since: (Instant, usize),
    /// Number of bytes that came in the last complete interval of measurement.
    pace: usize,
    /// Time at which the last bytes came.
    last: Instant,
    begun: Instant,
    displaced: CancellationToken,
}

/// The place of one body. Dropping the `Upload` frees the place and the memory.
#[derive(Debug)]
pub(crate) struct Upload {
    uploads: Arc<Uploads>,
    number: u64,
    displaced: CancellationToken,
}

/// Error: no place or memory is free, and no other body may lose its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Full;

impl Uploads {
    /// Returns limits for at most `most` bodies at once, which together may hold at most `most_bytes` bytes.
    pub(crate) fn new(most: usize, most_bytes: usize) -> Self {
        Self {
            most,
            most_bytes,
            table: Mutex::default(),
        }
    }

    /// Takes a place for a new body. If all places are taken, the slowest body loses its place.
    ///
    /// # Errors
    /// Returns [`Full`] if no other body may lose its place.
    pub(crate) fn begin(
        self: &Arc<Self>,
        now: Instant,
        from: Option<IpAddr>,
    ) -> Result<Upload, Full> {
        let from = from.map(network);
        let mut table = self.table();
        if table.open.len() >= self.most {
            table.displace(now, None)?;
        }
        let (number, displaced) = (table.next, CancellationToken::new());
        table.next += 1;
        let open = Open {
            from,
            bytes: 0,
            since: (now, 0),
            pace: 0,
            last: now,
            begun: now,
            displaced: displaced.clone(),
        };
        table.open.insert(number, open);
        Ok(Upload {
            uploads: Arc::clone(self),
            number,
            displaced,
        })
    }

    /// Returns the number of bodies that are being received.
    pub(crate) fn len(&self) -> usize {
        self.table().open.len()
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // A panic cannot leave the table half changed, so a poisoned lock is harmless.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Upload {
    /// Reserves memory for bytes that have arrived. If the memory is used up, slower bodies lose their
    /// places.
    ///
    /// # Errors
    /// Returns [`Full`] if no other body may lose its place.
    pub(crate) fn grow(&self, now: Instant, bytes: usize) -> Result<(), Full> {
        let mut table = self.uploads.table();
        while table.bytes + bytes > self.uploads.most_bytes {
            table.displace(now, Some(self.number))?;
        }
        if let Some(open) = table.open.get_mut(&self.number) {
            open.bytes += bytes;
            open.last = now;
            let (since, before) = open.since;
            if now.duration_since(since) >= SPAN {
                open.pace = open.bytes - before;
                open.since = (now, open.bytes);
            }
            table.bytes += bytes;
        }
        Ok(())
    }

    /// Waits until another body has taken the place of this body.
    pub(crate) async fn displaced(&self) {
        self.displaced.cancelled().await;
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.uploads.table().remove(self.number);
    }
}

impl Table {
    /// Removes the slowest body of the address whose bodies hold the most memory. Bodies of other addresses,
    /// and the body `but`, keep their places.
    fn displace(&mut self, now: Instant, but: Option<u64>) -> Result<(), Full> {
        let mut held: BTreeMap<Option<IpAddr>, usize> = BTreeMap::new();
        for open in self.open.values() {
            *held.entry(open.from).or_default() += open.bytes + PLACE_BYTES;
        }
        let most = held.into_iter().max_by_key(|(_, held)| *held);
        let from = most.ok_or(Full)?.0;
        let may_go = |(number, open): &(&u64, &Open)| {
            Some(**number) != but && open.from == from && now.duration_since(open.begun) >= GRACE
        };
        let slowest = self
            .open
            .iter()
            .filter(may_go)
            .min_by_key(|(_, open)| (open.pace_at(now), open.begun));
        let number = *slowest.ok_or(Full)?.0;
        if let Some(open) = self.remove(number) {
            open.displaced.cancel();
        }
        Ok(())
    }

    fn remove(&mut self, number: u64) -> Option<Open> {
        let open = self.open.remove(&number)?;
        self.bytes -= open.bytes;
        Some(open)
    }
}

impl Open {
    /// Returns the number of bytes that come per interval of measurement; 0 if no bytes have come for one
    /// interval.
    fn pace_at(&self, now: Instant) -> usize {
        if now.duration_since(self.last) >= SPAN {
            return 0;
        }
        self.pace.max(self.bytes - self.since.1)
    }
}

/// Returns the network whose addresses one client can use: the first 64 bits of an IPv6 address, or the whole
/// IPv4 address. If single addresses were counted, a client with many IPv6 addresses would count as many
/// clients.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        address => address,
    }
}

/// The interval over which a body's pace is measured.
const SPAN: Duration = Duration::from_secs(1);
/// A body that began less than this time ago cannot lose its place, because its pace is not known yet. Most
/// bodies are complete within this time.
const GRACE: Duration = Duration::from_millis(200);
/// The memory that the connection and the task of each body take, in addition to its bytes.
const PLACE_BYTES: usize = 16 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn from(text: &str) -> Option<IpAddr> {
        Some(text.parse().unwrap())
    }

    #[test]
    fn the_slowest_of_the_largest_holder_goes_first() {
        let uploads = Arc::new(Uploads::new(3, 1000));
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let stopped = uploads.begin(start, from("10.0.0.1")).unwrap();
        stopped.grow(start, 500).unwrap();
        let steady = uploads.begin(start, from("10.0.0.1")).unwrap();
        steady.grow(at(2500), 10).unwrap();
        let other = uploads.begin(start, from("10.0.0.2")).unwrap();
        // All bodies are younger than `GRACE`, so none of them is displaced.
        assert_eq!(uploads.begin(at(100), from("10.0.0.3")).unwrap_err(), Full);
        let fresh = uploads.begin(at(3000), from("10.0.0.3")).unwrap();
        assert!(stopped.displaced.is_cancelled() && uploads.len() == 3);
        assert!(!steady.displaced.is_cancelled() && !other.displaced.is_cancelled());
        // The bytes of the displaced body are free already, and the end of this body does not free
        // them again.
        fresh.grow(at(3000), 990).unwrap();
        drop(stopped);
        assert_eq!(uploads.table().bytes, 1000);
        // If the only body of an address is too large, bodies of other addresses keep their memory.
        assert_eq!(fresh.grow(at(3000), 10), Err(Full));
        assert!(!steady.displaced.is_cancelled() && !other.displaced.is_cancelled());
        // A body that needs memory also displaces a body of the address that holds the most memory.
        steady.grow(at(4000), 10).unwrap();
        assert!(fresh.displaced.is_cancelled() && !other.displaced.is_cancelled());
        drop((fresh, steady, other));
        assert_eq!((uploads.len(), uploads.table().bytes), (0, 0));
    }

    #[test]
    fn a_network_is_one_holder() {
        let one = network("2001:db8::1".parse().unwrap());
        assert_eq!(one, network("2001:db8::ffff:1".parse().unwrap()));
        assert_ne!(one, network("2001:db8:0:1::1".parse().unwrap()));
        let v4 = network("::ffff:10.0.0.1".parse().unwrap());
        assert_eq!(v4, network("10.0.0.1".parse().unwrap()));
    }
}
