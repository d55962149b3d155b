//! Buffers of KV slots that the sidecar owns and the engine maps.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// Memory that holds slots. The seam for CUDA: everything else asks only for these.
#[derive(Debug)]
pub(crate) struct Buffer {
    _todo: (),
}

impl Buffer {
    /// Takes, seals (no shrink, no grow) and pre-touches `bytes` of memfd.
    ///
    /// # Errors
    /// The kernel's refusal, with how much was asked for and how much is available.
    pub(crate) fn memfd(_name: &str, _bytes: u64) -> io::Result<Arc<Self>> {
        unimplemented!()
    }
    /// The descriptor that an engine maps.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        unimplemented!()
    }
    /// Address of the first byte, for registration with a transport library.
    pub(crate) fn address(&self) -> usize {
        unimplemented!()
    }
    /// Bytes.
    pub(crate) fn bytes(&self) -> u64 {
        unimplemented!()
    }
    /// `send(2)` of a range; the kernel reads the memory, no reference to it is made.
    pub(crate) fn send(&self, _to: impl AsFd, _offset: u64, _len: usize) -> io::Result<usize> {
        unimplemented!()
    }
    /// `recv(2)` into a range.
    pub(crate) fn recv(&self, _from: impl AsFd, _offset: u64, _len: usize) -> io::Result<usize> {
        unimplemented!()
    }
    /// XXH3-64 of a range.
    pub(crate) fn sum(&self, _offset: u64, _len: u64) -> u64 {
        unimplemented!()
    }
}
