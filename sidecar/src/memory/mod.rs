//! Buffers of KV slots that the sidecar owns and the engine maps.
//!
//! A buffer is written and read by other processes and by transport libraries while this process
//! has it, so no Rust reference to its bytes is ever made: everything here is a call of the kernel or
//! of CUDA's driver on a range of it, with the range checked first. This directory (with `cuda`
//! in it) is the only place of the crate that may be unsafe. Where a buffer is, host or GPU, others learn from
//! [`Buffer::export`] and [`Buffer::cuda`]; [`Outlet`] and [`Inlet`] bring it to sockets and back.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};
use xxhash_rust::xxh3::Xxh3;

use self::cuda::{CudaError, DeviceMemory};

mod available;
mod copy_rows;
pub(crate) mod cuda;
mod flow;
mod low_water;
mod memfd;
mod pinned;
pub(crate) mod rows;
pub(crate) mod size;

pub(crate) use available::{Available, Limit};
pub(crate) use flow::{Inlet, Outlet};
pub(crate) use low_water::set_low_water;
use memfd::Memfd;
pub(crate) use rows::Rows;
pub(crate) use size::Size;

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
    /// GPU memory, to be opened by its IPC handle.
    Cuda,
}

impl Export<'_> {
    /// The name in `Welcome.memory`.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Memfd(_) => "memfd",
            Self::Cuda => "cuda",
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
    /// No GPU, too little memory on it, or memory that cannot be shared.
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

#[derive(Debug)]
enum Memory {
    Memfd(Memfd),
    Cuda(Arc<DeviceMemory>),
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

    /// Takes `bytes` of a GPU's memory, cleared.
    ///
    /// # Errors
    /// No such GPU, too little memory on it (how much is needed and free), or memory that cannot be
    /// shared with other processes.
    pub(crate) fn on_gpu(which: &cuda::Which, bytes: u64) -> Result<Arc<Self>, AllocError> {
        if bytes == 0 {
            return Err(AllocError::Absurd { asked: bytes });
        }
        let memory = DeviceMemory::take(cuda::Device::open(which)?, bytes)?;
        Ok(Arc::new(Self {
            memory: Memory::Cuda(memory),
            bytes,
        }))
    }

    /// The buffer as GPU memory, if it is that.
    pub(crate) fn cuda(&self) -> Option<&Arc<DeviceMemory>> {
        match &self.memory {
            Memory::Memfd(_) => None,
            Memory::Cuda(memory) => Some(memory),
        }
    }

    /// What an engine needs to map the buffer.
    pub(crate) fn export(&self) -> Export<'_> {
        match &self.memory {
            Memory::Memfd(memory) => Export::Memfd(memory.as_fd()),
            Memory::Cuda(_) => Export::Cuda,
        }
    }

    /// Address of the first byte, for registration with a transport library; of GPU memory, as this
    /// process names it.
    pub(crate) fn address(&self) -> usize {
        match &self.memory {
            Memory::Memfd(memory) => memory.address(),
            // Addresses have 64 bits on every host that has such a GPU.
            Memory::Cuda(memory) => usize::try_from(memory.address()).unwrap_or(usize::MAX),
        }
    }

    /// Bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Copies a range out.
    ///
    /// # Errors
    /// `InvalidInput` for a range outside of the buffer; of GPU memory the driver's, too.
    pub(crate) fn copy_out(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.range(offset, into.len() as u64)?;
        match &self.memory {
            Memory::Memfd(memory) => memory.read(offset, into),
            Memory::Cuda(memory) => Ok(memory.read(offset, into)?),
        }
    }

    /// Copies into a range.
    ///
    /// # Errors
    /// As [`Buffer::copy_out`].
    pub(crate) fn copy_in(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.range(offset, from.len() as u64)?;
        match &self.memory {
            Memory::Memfd(memory) => memory.write(offset, from),
            Memory::Cuda(memory) => Ok(memory.write(offset, from)?),
        }
    }

    /// XXH3-64 of a range. If somebody writes into it meanwhile, of no particular state of it.
    ///
    /// # Errors
    /// `InvalidInput` for a range outside of the buffer.
    pub(crate) fn sum(&self, offset: u64, len: u64) -> io::Result<u64> {
        self.range(offset, len)?;
        let mut state = Xxh3::new();
        let most = self.block_bytes();
        let mut block = vec![0; block_len(len, most)];
        let mut at = offset;
        while at < offset + len {
            let part = block_len(offset + len - at, most);
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
        let most = self.block_bytes();
        let mut block = vec![0; block_len(len, most)];
        let mut at = offset;
        while at < offset + len {
            let part = block_len(offset + len - at, most);
            random.fill_bytes(&mut block[..part]);
            self.copy_in(at, &block[..part])?;
            at += part as u64;
        }
        Ok(())
    }

    fn block_bytes(&self) -> usize {
        match &self.memory {
            Memory::Memfd(_) => BLOCK_BYTES,
            Memory::Cuda(_) => GPU_BLOCK_BYTES,
        }
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

/// Sums and fills go block by block: one that stays in the second-level cache between the copy and
/// the computation.
const BLOCK_BYTES: usize = 256 << 10;
/// Of GPU memory: a copy over the bus costs some ten microseconds whatever its size.
const GPU_BLOCK_BYTES: usize = 4 << 20;

fn block_len(left: u64, most: usize) -> usize {
    usize::try_from(left).map_or(most, |left| left.min(most))
}

#[cfg(test)]
mod tests;
