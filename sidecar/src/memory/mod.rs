//! Buffers of KV slots that the sidecar owns and the engine maps.
//!
//! A buffer is written and read by other processes and by transport libraries while this process
//! has it, so no Rust reference to its bytes is ever made: everything here is a system call on a
//! range of it, with the range checked first. This directory is the only place of the crate that
//! may be unsafe, and the seam at which device memory will fit: [`Memory`] gains a variant, and
//! nothing outside learns of it but through [`Buffer::export`].

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};
use xxhash_rust::xxh3::Xxh3;

mod available;
mod low_water;
mod memfd;
mod pinned;

pub(crate) use available::{Available, Limit};
pub(crate) use low_water::set_low_water;
use memfd::Memfd;

/// Memory that holds slots.
#[derive(Debug)]
pub(crate) struct Buffer {
    memory: Memory,
    bytes: u64,
}

/// What an engine needs to map a buffer.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Export<'a> {
    /// Descriptor of a sealed memfd, to be mapped shared.
    Memfd(BorrowedFd<'a>),
}

impl Export<'_> {
    /// The name in `Welcome.memory`.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Memfd(_) => "memfd",
        }
    }
}

/// A buffer that could not be taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AllocError {
    /// Zero, or more than an address can name.
    #[error("a buffer of {asked} bytes cannot exist")]
    Absurd {
        /// Bytes.
        asked: u64,
    },
    /// Taking it would exceed a limit: refused before the kernel's memory killer has to decide.
    #[error("a buffer of {} was asked for, but {limit} leaves {}; make the buffer smaller, or \
             raise the limit", Size(*asked), Size(*available))]
    Short {
        /// Bytes.
        asked: u64,
        /// Bytes.
        available: u64,
        /// What stands in the way.
        limit: Limit,
    },
    /// The kernel refused although every known limit allows it.
    #[error("{step} for a buffer of {} failed ({} by {limit})", Size(*asked), Size(*available))]
    Kernel {
        /// What was being done.
        step: &'static str,
        /// Bytes.
        asked: u64,
        /// Bytes.
        available: u64,
        /// The tightest limit.
        limit: Limit,
        /// What the kernel said.
        source: io::Error,
    },
}

#[derive(Debug)]
enum Memory {
    Memfd(Memfd),
}

impl Buffer {
    /// Takes `bytes` of memfd, sealed against shrinking and growing, with every page touched.
    ///
    /// The first write to an untouched page costs more than 10 times a later one (0.8 s a GiB
    /// against 0.06 s), so this call takes the time that the first requests would otherwise pay.
    ///
    /// # Errors
    /// Which limit stands in the way, or the kernel's refusal, with how much was asked for and how
    /// much is available.
    pub(crate) fn memfd(name: &str, bytes: u64) -> Result<Arc<Self>, AllocError> {
        let len = usize::try_from(bytes)
            .ok()
            .filter(|len| *len > 0 && isize::try_from(*len).is_ok())
            .ok_or(AllocError::Absurd { asked: bytes })?;
        let room = Available::now();
        if room.bytes < bytes {
            return Err(AllocError::Short {
                asked: bytes,
                available: room.bytes,
                limit: room.limit,
            });
        }
        let memory = Memfd::take(name, len).map_err(|(step, source)| AllocError::Kernel {
            step,
            asked: bytes,
            available: room.bytes,
            limit: room.limit,
            source,
        })?;
        Ok(Arc::new(Self {
            memory: Memory::Memfd(memory),
            bytes,
        }))
    }

    /// What an engine needs to map the buffer.
    pub(crate) fn export(&self) -> Export<'_> {
        match &self.memory {
            Memory::Memfd(memory) => Export::Memfd(memory.as_fd()),
        }
    }

    /// Address of the first byte, for registration with a transport library.
    pub(crate) fn address(&self) -> usize {
        match &self.memory {
            Memory::Memfd(memory) => memory.address(),
        }
    }

    /// Bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Sends up to `len` bytes of a range into a stream socket; gives how many were taken.
    ///
    /// The socket decides whether the call blocks.
    ///
    /// # Errors
    /// Those of `send(2)`, and `InvalidInput` for a range outside of the buffer.
    pub(crate) fn send(&self, to: impl AsFd, offset: u64, len: usize) -> io::Result<usize> {
        let at = self.range(offset, len as u64)?;
        match &self.memory {
            Memory::Memfd(memory) => memory.send(to.as_fd(), at, len),
        }
    }

    /// Receives up to `len` bytes from a stream socket into a range, without waiting; gives how
    /// many came, 0 for the end of the stream.
    ///
    /// Never waiting is what makes a fence out of a lock around this call.
    ///
    /// # Errors
    /// Those of `recv(2)` (`WouldBlock` if nothing is there), and `InvalidInput` for a range outside
    /// of the buffer.
    pub(crate) fn recv(&self, from: impl AsFd, offset: u64, len: usize) -> io::Result<usize> {
        let at = self.range(offset, len as u64)?;
        match &self.memory {
            Memory::Memfd(memory) => memory.recv(from.as_fd(), at, len),
        }
    }

    /// Copies a range out.
    ///
    /// # Errors
    /// `InvalidInput` for a range outside of the buffer.
    pub(crate) fn copy_out(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.range(offset, into.len() as u64)?;
        match &self.memory {
            Memory::Memfd(memory) => memory.read(offset, into),
        }
    }

    /// Copies into a range.
    ///
    /// # Errors
    /// `InvalidInput` for a range outside of the buffer.
    pub(crate) fn copy_in(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.range(offset, from.len() as u64)?;
        match &self.memory {
            Memory::Memfd(memory) => memory.write(offset, from),
        }
    }

    /// XXH3-64 of a range. If somebody writes into it meanwhile, of no particular state of it.
    ///
    /// # Errors
    /// `InvalidInput` for a range outside of the buffer.
    pub(crate) fn sum(&self, offset: u64, len: u64) -> io::Result<u64> {
        self.range(offset, len)?;
        let mut state = Xxh3::new();
        let mut block = vec![0; block_len(len)];
        let mut at = offset;
        while at < offset + len {
            let part = block_len(offset + len - at);
            self.copy_out(at, &mut block[..part])?;
            state.update(&block[..part]);
            at += part as u64;
        }
        Ok(state.digest())
    }

    /// Fills a range with bytes that `seed` determines.
    ///
    /// # Errors
    /// `InvalidInput` for a range outside of the buffer.
    pub(crate) fn fill_random(&self, offset: u64, len: u64, seed: u64) -> io::Result<()> {
        self.range(offset, len)?;
        let mut random = SmallRng::seed_from_u64(seed);
        let mut block = vec![0; block_len(len)];
        let mut at = offset;
        while at < offset + len {
            let part = block_len(offset + len - at);
            random.fill_bytes(&mut block[..part]);
            self.copy_in(at, &block[..part])?;
            at += part as u64;
        }
        Ok(())
    }

    /// The offset as an index, if the range lies in the buffer.
    fn range(&self, offset: u64, len: u64) -> io::Result<usize> {
        match offset.checked_add(len) {
            Some(end) if end <= self.bytes => usize::try_from(offset).map_err(io::Error::other),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "{len} bytes at {offset} lie outside of a buffer of {}",
                    self.bytes
                ),
            )),
        }
    }
}

/// Bytes for people.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size(pub(crate) u64);

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Precision is lost on purpose: two decimals are printed.
        #[allow(clippy::cast_precision_loss)]
        let bytes = self.0 as f64;
        for (unit, scale) in [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)] {
            if self.0 >= 1 << scale {
                #[allow(clippy::cast_precision_loss)]
                return write!(f, "{:.2} {unit}", bytes / (1_u64 << scale) as f64);
            }
        }
        write!(f, "{} bytes", self.0)
    }
}

/// Sums and fills go block by block: one that stays in the second-level cache between the copy and
/// the computation.
const BLOCK_BYTES: usize = 256 << 10;

fn block_len(left: u64) -> usize {
    usize::try_from(left).map_or(BLOCK_BYTES, |left| left.min(BLOCK_BYTES))
}

#[cfg(test)]
mod tests;
