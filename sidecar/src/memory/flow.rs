//! Moves bytes between buffers and stream sockets.
//!
//! Bytes of host memory go directly to and from a socket. Bytes of GPU memory go through a pinned block of
//! host memory, one per thread: sockets can only use host memory, and the GPU's copy engines are fast only
//! with pinned memory.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::{Buffer, Memory};
use crate::memory::cuda::{DeviceMemory, Stage};

/// Sends bytes of a buffer into sockets, for one thread.
#[derive(Debug)]
pub(crate) struct Outlet {
    buffer: Arc<Buffer>,
    staged: Option<Staged>,
}

/// A pinned block and the range of the buffer that it holds.
#[derive(Debug)]
struct Staged {
    stage: Stage,
    /// The range of the buffer, in bytes, that was copied to the start of the block; empty if the block holds
    /// no valid copy.
    holds: Range<u64>,
}

impl Outlet {
    /// Makes an outlet for a buffer.
    ///
    /// # Errors
    /// For GPU memory: host memory cannot be pinned.
    pub(crate) fn new(buffer: Arc<Buffer>) -> io::Result<Self> {
        let staged = stage(&buffer)?.map(|stage| Staged { stage, holds: 0..0 });
        Ok(Self { buffer, staged })
    }

    /// Discards the staged bytes, because the buffer may have changed since they were copied. Callers do this
    /// before each write.
    pub(crate) fn begin(&mut self) {
        if let Some(staged) = &mut self.staged {
            staged.holds = 0..0;
        }
    }

    /// Sends up to `len` bytes of a range into a stream socket and returns how many bytes the socket
    /// accepted.
    ///
    /// The call blocks only if the socket is a blocking socket.
    ///
    /// # Errors
    /// The errors of `send(2)`, `InvalidInput` for a range outside of the buffer, and the GPU driver's
    /// errors.
    pub(crate) fn send(&mut self, to: impl AsFd, offset: u64, len: usize) -> io::Result<usize> {
        let at = self.buffer.range(offset, len as u64)?;
        match (&self.buffer.memory, &mut self.staged) {
            (Memory::Memfd(memory), _) => memory.send(to.as_fd(), at, len),
            (Memory::Cuda(memory), Some(staged)) => {
                staged.hold(memory, offset, len)?;
                let holds = &staged.holds;
                // Both numbers fit, because the block is shorter than the address space.
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

impl Outlet {
    /// Lends a range of at most [`PIECE_BYTES`] bytes to a function that computes over it. The function must treat the
    /// bytes as data only, because an engine shares the memory.
    ///
    /// # Errors
    /// `InvalidInput` for a range outside of the buffer, and the GPU driver's errors.
    pub(crate) fn read_by<T>(
        &mut self,
        offset: u64,
        len: usize,
        f: impl FnOnce(&[u8]) -> T,
    ) -> io::Result<T> {
        let at = self.buffer.range(offset, len as u64)?;
        match (&self.buffer.memory, &mut self.staged) {
            (Memory::Memfd(memory), _) => Ok(memory.read_by(at, len, f)),
            (Memory::Cuda(memory), Some(staged)) => {
                // The function needs all bytes at once, so a block that ends within the range is filled again.
                if staged.holds.start != offset || staged.holds.end < offset + len as u64 {
                    staged.holds = 0..0;
                }
                staged.hold(memory, offset, len)?;
                Ok(f(&staged.stage.block()[..len]))
            }
            (Memory::Cuda(_), None) => Err(io::Error::other("no block for GPU memory")),
        }
    }
}

impl Staged {
    /// Makes the block hold the byte at `offset`, and as many of `len` bytes as fit.
    fn hold(&mut self, memory: &Arc<DeviceMemory>, offset: u64, len: usize) -> io::Result<()> {
        if !self.holds.contains(&offset) {
            let part = len.min(self.stage.len());
            self.holds = 0..0;
            self.stage.fetch(memory.as_ref(), offset, part)?;
            self.holds = offset..offset + part as u64;
        }
        Ok(())
    }
}

/// Receives bytes from sockets into a buffer, for one thread.
#[derive(Debug)]
pub(crate) struct Inlet {
    buffer: Arc<Buffer>,
    stage: Option<Stage>,
}

impl Inlet {
    /// Makes an inlet for a buffer.
    ///
    /// # Errors
    /// For GPU memory: host memory cannot be pinned.
    pub(crate) fn new(buffer: Arc<Buffer>) -> io::Result<Self> {
        let stage = stage(&buffer)?;
        Ok(Self { buffer, stage })
    }

    /// Receives up to `len` bytes from a stream socket into a range, without waiting for the peer. Returns
    /// the number of received bytes; 0 means the end of the stream. When the call returns, these bytes are in
    /// the range.
    ///
    /// A lock around this call is a write fence: the thread that gets the lock knows that no receive is in
    /// flight. A thread that waits for the lock gets it soon, because this call does not wait for the peer (a
    /// copy to a GPU takes about ten microseconds).
    ///
    /// # Errors
    /// The errors of `recv(2)` (`WouldBlock` if the socket has no bytes), `InvalidInput` for a range outside
    /// of the buffer, and the GPU driver's errors.
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

impl Inlet {
    /// Receives a part of a piece that [`Inlet::settle`] completes: up to `len` bytes, which begin `at` bytes after the
    /// piece's first byte at `offset`. Over GPU memory the bytes wait in the block.
    ///
    /// # Errors
    /// As [`Inlet::recv`].
    pub(crate) fn recv_piece(
        &mut self,
        from: impl AsFd,
        offset: u64,
        at: usize,
        len: usize,
    ) -> io::Result<usize> {
        let start = self.buffer.range(offset + at as u64, len as u64)?;
        match (&self.buffer.memory, &mut self.stage) {
            (Memory::Memfd(memory), _) => memory.recv(from.as_fd(), start, len),
            (Memory::Cuda(_), Some(stage)) => {
                let block = stage.block_mut().get_mut(at..at + len);
                let block = block.ok_or(io::ErrorKind::InvalidInput)?;
                Ok(recv(from, block, RecvFlags::DONTWAIT)?.0)
            }
            (Memory::Cuda(_), None) => Err(io::Error::other("no block for GPU memory")),
        }
    }

    /// Lends a piece of at most [`PIECE_BYTES`] bytes to a function that checks the received bytes, or writes others
    /// there. The function must treat the bytes as data only. Over GPU memory, the bytes reach the GPU only if the
    /// function returns true.
    ///
    /// # Errors
    /// `InvalidInput` for a range outside of the buffer, and the GPU driver's errors.
    pub(crate) fn settle(
        &mut self,
        offset: u64,
        len: usize,
        f: impl FnOnce(&mut [u8]) -> bool,
    ) -> io::Result<bool> {
        let at = self.buffer.range(offset, len as u64)?;
        match (&self.buffer.memory, &mut self.stage) {
            (Memory::Memfd(memory), _) => Ok(memory.write_by(at, len, f)),
            (Memory::Cuda(memory), Some(stage)) => {
                let block = stage.block_mut().get_mut(..len);
                let good = f(block.ok_or(io::ErrorKind::InvalidInput)?);
                if good {
                    stage.put(memory.as_ref(), offset, len)?;
                }
                Ok(good)
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

/// Bytes of a connection's block. A copy over the bus takes about ten microseconds plus the time for its
/// bytes at 40 GB/s; a socket moves 2 to 4 GB/s. With this size the fixed cost of a copy does not matter.
const STAGE_BYTES: usize = 2 << 20;
/// Bytes that have one tag. A piece stays in the second-level cache between the computation over it and the copy to or from
/// the socket.
pub(crate) const PIECE_BYTES: usize = 256 << 10;
