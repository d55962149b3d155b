//! Between buffers and stream sockets.
//!
//! Host memory goes straight in and out. GPU memory goes through a pinned block of the thread's own:
//! sockets copy from and into host memory only, and copy engines are fast with pinned memory only.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::{Buffer, Memory};
use crate::memory::cuda::Stage;

/// One thread's way from a buffer into sockets.
#[derive(Debug)]
pub(crate) struct Outlet {
    buffer: Arc<Buffer>,
    staged: Option<Staged>,
}

/// A block and what stands in it.
#[derive(Debug)]
struct Staged {
    stage: Stage,
    /// The range of the buffer that the block's start holds.
    holds: Range<u64>,
}

impl Outlet {
    /// # Errors
    /// Of GPU memory: host memory that cannot be pinned.
    pub(crate) fn new(buffer: Arc<Buffer>) -> io::Result<Self> {
        let staged = stage(&buffer)?.map(|stage| Staged { stage, holds: 0..0 });
        Ok(Self { buffer, staged })
    }

    /// Whatever was staged may have changed in the buffer: before each write.
    pub(crate) fn begin(&mut self) {
        if let Some(staged) = &mut self.staged {
            staged.holds = 0..0;
        }
    }

    /// Sends up to `len` bytes of a range into a stream socket; gives how many were taken.
    ///
    /// The socket decides whether the call blocks.
    ///
    /// # Errors
    /// Those of `send(2)`, `InvalidInput` for a range outside of the buffer, the GPU driver's.
    pub(crate) fn send(&mut self, to: impl AsFd, offset: u64, len: usize) -> io::Result<usize> {
        let at = self.buffer.range(offset, len as u64)?;
        match (&self.buffer.memory, &mut self.staged) {
            (Memory::Memfd(memory), _) => memory.send(to.as_fd(), at, len),
            (Memory::Cuda(memory), Some(staged)) => {
                if !staged.holds.contains(&offset) {
                    let part = len.min(staged.stage.len());
                    staged.holds = 0..0;
                    staged.stage.fetch(memory, offset, part)?;
                    staged.holds = offset..offset + part as u64;
                }
                let holds = &staged.holds;
                // Within the block, which is shorter than an address can name.
                let from = usize::try_from(offset - holds.start).map_err(io::Error::other)?;
                let until = usize::try_from(holds.end - holds.start).map_err(io::Error::other)?;
                let until = until.min(from + len);
                Ok(send(
                    to,
                    &staged.stage.block()[from..until],
                    SendFlags::NOSIGNAL,
                )?)
            }
            (Memory::Cuda(_), None) => Err(io::Error::other("no block for GPU memory")),
        }
    }
}

/// One thread's way from sockets into a buffer.
#[derive(Debug)]
pub(crate) struct Inlet {
    buffer: Arc<Buffer>,
    stage: Option<Stage>,
}

impl Inlet {
    /// # Errors
    /// Of GPU memory: host memory that cannot be pinned.
    pub(crate) fn new(buffer: Arc<Buffer>) -> io::Result<Self> {
        let stage = stage(&buffer)?;
        Ok(Self { buffer, stage })
    }

    /// Receives up to `len` bytes from a non-blocking stream socket into a range, and has them there
    /// when it returns; gives how many came, 0 for the end of the stream.
    ///
    /// Never waiting (but some ten microseconds for a copy to a GPU) is what makes a fence out of a
    /// lock around this call.
    ///
    /// # Errors
    /// Those of `recv(2)` (`WouldBlock` if nothing is there), `InvalidInput` for a range outside of
    /// the buffer, the GPU driver's.
    pub(crate) fn recv(&mut self, from: impl AsFd, offset: u64, len: usize) -> io::Result<usize> {
        let at = self.buffer.range(offset, len as u64)?;
        match (&self.buffer.memory, &mut self.stage) {
            (Memory::Memfd(memory), _) => memory.recv(from.as_fd(), at, len),
            (Memory::Cuda(memory), Some(stage)) => {
                let part = len.min(stage.len());
                let block = &mut stage.block_mut()[..part];
                let (came, _) = recv(from, block, RecvFlags::DONTWAIT)?;
                if came > 0 {
                    stage.put(memory, offset, came)?;
                }
                Ok(came)
            }
            (Memory::Cuda(_), None) => Err(io::Error::other("no block for GPU memory")),
        }
    }
}

fn stage(buffer: &Buffer) -> io::Result<Option<Stage>> {
    match &buffer.memory {
        Memory::Memfd(_) => Ok(None),
        Memory::Cuda(memory) => Ok(Some(Stage::new(memory.device(), STAGE_BYTES)?)),
    }
}

/// A block of a connection. A copy over the bus costs some ten microseconds and then 40 GB/s, a
/// socket takes 2 to 4 GB/s: this much hides the former.
const STAGE_BYTES: usize = 2 << 20;
