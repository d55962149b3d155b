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

/// Where a buffer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Host,
    Gpu,
}

impl Wire {
    /// Judges from `UCX_TLS`, from the presence of an RDMA device, and from where the buffer is.
    pub(super) fn of_this_host(ucx_tls: Option<&str>, place: Place) -> Self {
        Self::judge(ucx_tls, has_rdma(), place)
    }

    /// Why the built-in wire is better for GPU memory, if it is: where UCX has sockets only, it moves
    /// half a gigabyte a second between two GPUs, and the built-in wire 7 and more.
    pub(super) fn poor(self, same_host: bool) -> Option<String> {
        match self {
            Self::Streams => Some("UCX_TLS leaves nixl only sockets for GPU memory".to_owned()),
            Self::Descriptors if !same_host && !has_rdma() => {
                Some("nixl has no RDMA device here, only sockets for GPU memory".to_owned())
            }
            Self::Descriptors => None,
        }
    }

    fn judge(ucx_tls: Option<&str>, rdma: bool, place: Place) -> Self {
        let only =
            |names: &[&str]| ucx_tls.is_some_and(|tls| tls.split(',').all(|t| names.contains(&t)));
        let device_copies = match place {
            Place::Host => rdma && !only(&["tcp", "self"]),
            // Without RDMA still within the host, over NVLink or the bus.
            Place::Gpu => !only(&["tcp", "self", "cuda_copy", "sm", "shm", "cma"]),
        };
        if device_copies {
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

    /// Bytes of a request.
    pub(super) fn batch_bytes(self) -> u64 {
        match self {
            // A request costs some ten microseconds, and nobody waits while the device copies; but
            // what is given up, is given up whole.
            Self::Descriptors => 1 << 30,
            // Where the CPU copies, this is how long the thread is deaf: 10 ms at 6 GB/s.
            Self::Streams => 64 << 20,
        }
    }

    pub(super) fn merge(self) -> nixl::Merge {
        match self {
            Self::Descriptors => nixl::Merge::Neighbours,
            Self::Streams => nixl::Merge::Nothing,
        }
    }
}

pub(super) fn has_rdma() -> bool {
    Path::new("/sys/class/infiniband")
        .read_dir()
        .is_ok_and(|mut devices| devices.next().is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wire_follows_from_configuration_and_host() {
        let check = |tls, rdma, expect| assert_eq!(Wire::judge(tls, rdma, Place::Host), expect);
        check(None, false, Wire::Streams);
        check(None, true, Wire::Descriptors);
        check(Some("tcp"), true, Wire::Streams);
        check(Some("self,tcp"), true, Wire::Streams);
        check(Some("rc,tcp"), true, Wire::Descriptors);
        check(Some("rc"), false, Wire::Streams);
        let check = |tls, rdma, expect| assert_eq!(Wire::judge(tls, rdma, Place::Gpu), expect);
        check(None, false, Wire::Descriptors);
        check(Some("cuda_ipc,cuda_copy,tcp"), false, Wire::Descriptors);
        check(Some("rc,cuda_copy"), true, Wire::Descriptors);
        check(Some("tcp,cuda_copy"), true, Wire::Streams);
    }
}
