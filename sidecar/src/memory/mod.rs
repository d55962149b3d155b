//! Holds the buffers of KV slots, which the sidecar owns and the engine maps.
//!
//! While this process has a buffer, other processes and transport libraries read and write its bytes. So no
//! Rust reference to the buffer's bytes is ever made: every access is a call of the kernel or of CUDA's
//! driver on a range that was checked first. This folder, with `cuda` in it, is the only place of the crate
//! that may contain unsafe code. [`Buffer::export`] and [`Buffer::cuda`] tell whether a buffer is in host
//! memory or in GPU memory; [`Outlet`] and [`Inlet`] move its bytes to and from sockets.

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
mod lend;
mod low_water;
mod memfd;
mod pinned;
pub(crate) mod rows;
pub(crate) mod size;

pub(crate) use available::{Available, Limit};
pub(crate) use flow::{Inlet, Outlet, PIECE_BYTES};
pub(crate) use low_water::set_low_water;
use memfd::Memfd;
pub(crate) use rows::Rows;
pub(crate) use size::Size;

/// Memory of the host or of a GPU that holds slots.
#[derive(Debug)]
pub(crate) struct Buffer {
    memory: Memory,
    bytes: u64,
}

/// The thing that an engine needs to map a buffer.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Export<'a> {
    /// The descriptor of a sealed memfd, which the engine maps shared.
    Memfd(BorrowedFd<'a>),
    /// GPU memory, which the engine opens by its IPC handle.
    Cuda,
}

impl Export<'_> {
    /// Returns the memory's name in `Welcome.memory`.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Memfd(_) => "memfd",
            Self::Cuda => "cuda",
        }
    }
}

/// An error of the allocation of a buffer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AllocError {
    /// The size is zero, or larger than the address space.
    #[error("a buffer cannot have {asked} bytes")]
    Absurd {
        /// The bytes that were asked for.
        asked: u64,
    },
    /// The size exceeds a limit. Without this refusal, the kernel's out-of-memory killer could later end a
    /// process.
    #[error("a buffer of {} was asked for, but {limit} leaves {}; make the buffer smaller, or \
             raise the limit", Size(*asked), Size(*available))]
    Short {
        /// The bytes that were asked for.
        asked: u64,
        /// The bytes that the limit still allows.
        available: u64,
        /// The limit that is too low.
        limit: Limit,
    },
    /// The kernel refused although every known limit allows the size.
    #[error("{step} for a buffer of {} failed, although {limit} leaves {}", Size(*asked), Size(*available))]
    Kernel {
        /// The step that failed, such as a system call's name.
        step: &'static str,
        /// The bytes that were asked for.
        asked: u64,
        /// The bytes that the tightest limit still allows.
        available: u64,
        /// The tightest limit.
        limit: Limit,
        /// The kernel's error.
        source: io::Error,
    },
    /// There is no such GPU, it has too little memory, or its memory cannot be shared.
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

#[derive(Debug)]
enum Memory {
    Memfd(Memfd),
    Cuda(Arc<DeviceMemory>),
}

impl Buffer {
    /// Allocates `bytes` in a memfd, seals it against shrinking and growing, and touches every page.
    ///
    /// The first write to a page takes more than 10 times as long as later writes (0.8 s per GiB against 0.06
    /// s). The allocation makes the first writes, so that the first requests are not slow.
    ///
    /// # Errors
    /// A limit is too low, or the kernel refuses. The error has the bytes that were asked for and the bytes
    /// that are available.
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

    /// Allocates `bytes` of a GPU's memory and clears them.
    ///
    /// # Errors
    /// There is no such GPU, it has too little memory (the error says how much is needed and free), or its
    /// memory cannot be shared with other processes.
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

    /// Returns the buffer's GPU memory; `None` if the buffer is host memory.
    pub(crate) fn cuda(&self) -> Option<&Arc<DeviceMemory>> {
        match &self.memory {
            Memory::Memfd(_) => None,
            Memory::Cuda(memory) => Some(memory),
        }
    }

    /// Returns the thing that an engine needs to map the buffer.
    pub(crate) fn export(&self) -> Export<'_> {
        match &self.memory {
            Memory::Memfd(memory) => Export::Memfd(memory.as_fd()),
            Memory::Cuda(_) => Export::Cuda,
        }
    }

    /// Returns the address of the first byte in this process, for registration with a transport library.
    pub(crate) fn address(&self) -> usize {
        match &self.memory {
            Memory::Memfd(memory) => memory.address(),
            // Addresses have 64 bits on every host with a CUDA GPU.
            Memory::Cuda(memory) => usize::try_from(memory.address()).unwrap_or(usize::MAX),
        }
    }

    /// Returns the length of the buffer in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Copies a range out of the buffer.
    ///
    /// # Errors
    /// `InvalidInput` for a range outside of the buffer. For GPU memory also the driver's error.
    pub(crate) fn copy_out(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.range(offset, into.len() as u64)?;
        match &self.memory {
            Memory::Memfd(memory) => memory.read(offset, into),
            Memory::Cuda(memory) => Ok(memory.read(offset, into)?),
        }
    }

    /// Copies into a range of the buffer.
    ///
    /// # Errors
    /// The same errors as [`Buffer::copy_out`].
    pub(crate) fn copy_in(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.range(offset, from.len() as u64)?;
        match &self.memory {
            Memory::Memfd(memory) => memory.write(offset, from),
            Memory::Cuda(memory) => Ok(memory.write(offset, from)?),
        }
    }

    /// Returns the XXH3-64 sum of a range. If another process writes into the range meanwhile, the sum may
    /// mix old and new bytes.
    ///
    /// # Errors
    /// `InvalidInput` for a range outside of the buffer. For GPU memory also the driver's error.
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

    /// Fills a range with random bytes that `seed` determines.
    ///
    /// # Errors
    /// `InvalidInput` for a range outside of the buffer. For GPU memory also the driver's error.
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

    /// Returns the offset as an index, if the range lies in the buffer.
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

/// Bytes of a block in sums and fills. A block of this size stays in the second-level cache between the copy
/// and the computation.
const BLOCK_BYTES: usize = 256 << 10;
/// Bytes of a block for GPU memory. Blocks for GPU memory are larger, because a copy over the bus takes about
/// ten microseconds, even if it copies only a few bytes.
const GPU_BLOCK_BYTES: usize = 4 << 20;

fn block_len(left: u64, most: usize) -> usize {
    usize::try_from(left).map_or(most, |left| left.min(most))
}

#[cfg(test)]
mod tests;
