//! Reads and completes the address of a data port.

use protocol::message::Advert;

use crate::transport::spec::NoAddress;

/// Returns `host:port`, with brackets around an IPv6 address.
pub(super) fn join(host: &str, port: u16) -> String {
    if host.contains(':') && !host.starts_with('[') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
}

/// Returns the address of an advert. If the advert has only `:port`, the result has `host`, the name under
/// which this process reached the peer.
///
/// # Errors
/// The advert has no address, because the peer does not receive, or the address is not a `host:port`.
pub(super) fn of(offer: &Advert, host: &str) -> Result<Option<String>, NoAddress> {
    if offer.address.is_empty() {
        return Err(NoAddress::Absent);
    }
    complete(&offer.address, host)
        .map(Some)
        .ok_or(NoAddress::Invalid)
}

fn complete(address: &str, host: &str) -> Option<String> {
    let (name, port) = address.rsplit_once(':')?;
    let port: u16 = port.parse().ok().filter(|port| *port != 0)?;
    Some(if name.is_empty() {
        join(host, port)
    } else {
        address.to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::join;

    #[test]
    fn an_ipv6_address_gets_brackets() {
        assert_eq!(join("fe80::1", 5), "[fe80::1]:5");
        assert_eq!(join("[fe80::1]", 5), "[fe80::1]:5");
        assert_eq!(join("h", 5), "h:5");
    }
}
