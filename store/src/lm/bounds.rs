//! The limits of the port.

use std::net::IpAddr;

use ipnet::IpNet;

/// The limits of the port.
#[derive(Clone, Debug)]
pub struct Bounds {
    /// Bytes of the largest value.
    pub max_value: usize,
    /// Bytes of all values that are being received or sent.
    pub in_flight: usize,
    /// Bytes per second that a client must send or read at least.
    pub least_rate: u64,
    /// Number of connections.
    pub connections: usize,
    /// Networks of the clients besides this machine.
    pub allow: Vec<IpNet>,
}

impl Bounds {
    /// Returns true if a client of this address may connect.
    pub(super) fn is_allowed(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        ip.is_loopback() || self.allow.iter().any(|net| net.contains(&ip))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_and_the_named_networks_may_connect() {
        let bounds = Bounds {
            max_value: 1,
            in_flight: 1,
            least_rate: 1,
            connections: 1,
            allow: vec!["10.1.0.0/16".parse().unwrap()],
        };
        for (ip, allowed) in [
            ("127.0.0.1", true),
            ("::1", true),
            ("10.1.2.3", true),
            ("::ffff:10.1.2.3", true),
            ("10.2.2.3", false),
            ("::ffff:10.2.2.3", false),
            ("2001:db8::1", false),
        ] {
            assert_eq!(bounds.is_allowed(ip.parse().unwrap()), allowed, "{ip}");
        }
    }
}
