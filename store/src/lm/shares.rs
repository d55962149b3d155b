//! The share of one host in the room for values in flight and in the look-ups.
//!
//! A client that sends or reads slowly holds room for a while. Without a share, the connections of one host could hold all
//! room, and the clients of all other hosts would wait.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::Semaphore;

/// The shares of the hosts that have connections.
#[derive(Debug)]
pub(super) struct Shares {
    /// Units of room and number of look-ups of one host.
    each: [usize; 2],
    hosts: Mutex<HashMap<IpAddr, Weak<Share>>>,
}

/// The share of one host. Its connections hold it.
#[derive(Debug)]
pub(super) struct Share {
    /// Room for values in flight, in units.
    pub(super) room: Semaphore,
    /// Look-ups at the same time.
    pub(super) lookups: Semaphore,
    /// Look-ups in the remote store at the same time.
    pub(super) remote_lookups: Semaphore,
}

impl Shares {
    /// Gives each host three quarters of `units` of room and of `lookups`.
    pub(super) fn new(units: usize, lookups: usize) -> Self {
        let part = |all: usize| all - all / 4;
        Self {
            each: [part(units), part(lookups)],
            hosts: Mutex::default(),
        }
    }

    /// Returns the share of the host with this address.
    pub(super) fn of(&self, address: IpAddr) -> Arc<Share> {
        let host = host(address);
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(share) = hosts.get(&host).and_then(Weak::upgrade) {
            return share;
        }
        hosts.retain(|_, share| share.strong_count() > 0);
        let [room, lookups] = self.each;
        let share = Arc::new(Share {
            room: Semaphore::new(room),
            lookups: Semaphore::new(lookups),
            remote_lookups: Semaphore::new(lookups),
        });
        hosts.insert(host, Arc::downgrade(&share));
        share
    }
}

/// Returns the address that stands for a host. A host has a whole /64 network of IPv6 addresses.
fn host(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let network = u128::from(address) >> 64 << 64;
            IpAddr::V6(Ipv6Addr::from(network))
        }
        address @ IpAddr::V4(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_of_one_host_have_one_share_while_they_live() {
        let shares = Shares::new(8, 32);
        let of = |address: &str| shares.of(address.parse().unwrap());
        let first = of("10.0.0.1");
        assert_eq!(
            (
                first.room.available_permits(),
                first.lookups.available_permits()
            ),
            (6, 24)
        );
        assert!(Arc::ptr_eq(&first, &of("::ffff:10.0.0.1")));
        assert!(!Arc::ptr_eq(&first, &of("10.0.0.2")));
        let six = of("2001:db8::1");
        assert!(Arc::ptr_eq(&six, &of("2001:db8::2")));
        assert!(!Arc::ptr_eq(&six, &of("2001:db8:0:1::1")));
        drop((first, six));
        of("10.0.0.3");
        assert_eq!(
            shares.hosts.lock().unwrap().len(),
            1,
            "shares without connections are gone"
        );
    }
}
