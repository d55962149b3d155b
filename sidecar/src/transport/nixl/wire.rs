//! What is known of the wire below UCX.

use std::path::Path;

/// What the wire's cost depends on. UCX does not tell which wire it uses, so this is what its
/// configuration and the host allow, for all peers alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wire {
    /// Each descriptor has a price (NVLink 5 µs, RDMA some hundred ns), whatever its size: small
    /// descriptors that NIXL merges into as few as it can.
    Descriptors,
    /// The CPU copies, through sockets or straight into the peer. UCX's TCP loses with big
    /// descriptors, and to the same host they win nothing: middle-sized ones, each on its own.
    Streams,
}

impl Wire {
    /// Judges from `UCX_TLS` and from the presence of an RDMA device.
    pub(super) fn of_this_host(ucx_tls: Option<&str>) -> Self {
        let rdma = Path::new("/sys/class/infiniband")
            .read_dir()
            .is_ok_and(|mut devices| devices.next().is_some());
        Self::judge(ucx_tls, rdma)
    }

    fn judge(ucx_tls: Option<&str>, rdma: bool) -> Self {
        let tcp_only = ucx_tls.is_some_and(|tls| tls.split(',').all(|t| t == "tcp" || t == "self"));
        if rdma && !tcp_only {
            Self::Descriptors
        } else {
            Self::Streams
        }
    }

    /// Bytes of a descriptor of a slot.
    pub(super) fn descriptor_bytes(self, slot_bytes: u64) -> u64 {
        match self {
            // Merged anyhow, so the size only bounds what a partial chunk writes too much, and the
            // count what making a request costs.
            Self::Descriptors => (slot_bytes.div_ceil(64)).max(64 << 10),
            Self::Streams => 512 << 10,
        }
        .min(slot_bytes)
    }

    pub(super) fn merge(self) -> nixl::Merge {
        match self {
            Self::Descriptors => nixl::Merge::Neighbours,
            Self::Streams => nixl::Merge::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wire_follows_from_configuration_and_host() {
        let check = |tls, rdma, expect| assert_eq!(Wire::judge(tls, rdma), expect);
        check(None, false, Wire::Streams);
        check(None, true, Wire::Descriptors);
        check(Some("tcp"), true, Wire::Streams);
        check(Some("self,tcp"), true, Wire::Streams);
        check(Some("rc,tcp"), true, Wire::Descriptors);
        check(Some("rc"), false, Wire::Streams);
    }
}
