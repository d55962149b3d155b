//! Guesses the wire below UCX and sets the sizes of descriptors and requests for it.

/// The cost model of the wire below UCX. UCX does not tell which wire it uses, so the cost model is
/// chosen from UCX's configuration and the host. The model is the same for all peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wire {
    /// Each descriptor has a fixed cost, independent of its size (NVLink 5 µs, RDMA hundreds of ns).
    /// Descriptors are small, and NIXL merges as many neighbours as it can.
    Descriptors,
    /// The CPU makes the copies, through sockets or directly into the peer. Big descriptors are slower over
    /// UCX's TCP and not faster within a host, so descriptors have a medium size and are not merged.
    Streams,
}

/// The kind of memory that holds a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Host,
    Gpu,
}

impl Wire {
    /// Returns the reason why the built-in wire is better for GPU memory; `None` if it is not better. If UCX
    /// has only sockets, it moves 0.5 GB/s between two GPUs; the built-in wire moves at least 7 GB/s.
    pub(super) fn poor(self, same_host: bool, rdma: bool) -> Option<String> {
        match self {
            Self::Streams => Some("UCX_TLS allows nixl only sockets for GPU memory".to_owned()),
            Self::Descriptors if !same_host && !rdma => {
                Some("nixl has no RDMA device here, only sockets for GPU memory".to_owned())
            }
            Self::Descriptors => None,
        }
    }

    /// Chooses the model from `UCX_TLS`, the presence of an RDMA device that NIXL can use, and the memory of the
    /// buffer.
    pub(super) fn judge(ucx_tls: Option<&str>, rdma: bool, place: Place) -> Self {
        let only =
            |names: &[&str]| ucx_tls.is_some_and(|tls| tls.split(',').all(|t| names.contains(&t)));
        let device_copies = match place {
            Place::Host => rdma && !only(&["tcp", "self"]),
            // Without RDMA, devices still copy within the host, over NVLink or the bus.
            Place::Gpu => !only(&["tcp", "self", "cuda_copy", "sm", "shm", "cma"]),
        };
        if device_copies {
            Self::Descriptors
        } else {
            Self::Streams
        }
    }

    /// Returns the bytes of a descriptor for slots of this size.
    pub(super) fn descriptor_bytes(self, slot_bytes: u64) -> u64 {
        match self {
            // NIXL merges descriptors here. The descriptors' size only limits how many unneeded bytes a
            // partial chunk writes, and their number limits the cost of making a request.
            Self::Descriptors => (slot_bytes.div_ceil(64)).max(64 << 10),
            Self::Streams => 512 << 10,
        }
        .min(slot_bytes)
    }

    /// Returns the bytes of a request.
    pub(super) fn batch_bytes(self) -> u64 {
        match self {
            // A request costs about 10 µs, and the thread stays free while the device copies. But a request
            // can be abandoned only as a whole.
            Self::Descriptors => 1 << 30,
            // If the CPU makes the copies, the thread does nothing else during a request: for 10 ms at 6
            // GB/s.
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
