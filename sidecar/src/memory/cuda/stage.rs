//! Pins a block of host memory, so that the GPU's copy engines can access it directly. Bytes between a GPU
//! and a socket go through this block.

use std::fmt;
use std::ptr::NonNull;
use std::slice;
use std::sync::Arc;

use cudarc::driver::sys;

use super::Extent;
use super::device::Device;
use super::driver::{CudaError, check};
use super::stream::Stream;

/// A pinned block that one thread uses, with the stream that copies to and from it.
///
/// Without a pinned block, the driver copies host memory through a block of its own, at a quarter of the
/// speed.
pub(crate) struct Stage {
    block: NonNull<u8>,
    len: usize,
    stream: Stream,
}

// SAFETY: only this value uses the block, and the block is not bound to a thread.
unsafe impl Send for Stage {}

impl Stage {
    /// Allocates a block of `len` bytes and pins it.
    ///
    /// # Errors
    /// The driver's error if host memory cannot be pinned.
    pub(crate) fn new(device: &Arc<Device>, len: usize) -> Result<Self, CudaError> {
        let stream = Stream::new(device)?;
        let mut block = std::ptr::null_mut();
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE;
        // SAFETY: the out-pointer is valid, a context is current (`Stream::new` has made it current).
        check("cuMemHostAlloc", unsafe {
            sys::cuMemHostAlloc(&mut block, len, flags)
        })?;
        // The driver returns no null block on success.
        let block = NonNull::new(block.cast()).unwrap_or(NonNull::dangling());
        let stage = Self { block, len, stream };
        // SAFETY: the block has `len` new bytes, which are written before any reference to them is made.
        unsafe { stage.block.as_ptr().write_bytes(0, len) };
        Ok(stage)
    }

    /// Returns the length of the block in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Returns the block's bytes.
    pub(crate) fn block(&self) -> &[u8] {
        // SAFETY: the block has `len` initialised bytes, which only this value uses.
        // Every copy into the block has ended, because each function that queues a copy waits for the copy.
        unsafe { slice::from_raw_parts(self.block.as_ptr(), self.len) }
    }

    /// Returns the block's bytes for writing.
    pub(crate) fn block_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `block`, and `&mut self` makes this reference the only one.
        unsafe { slice::from_raw_parts_mut(self.block.as_ptr(), self.len) }
    }

    /// Fills the block's start with a range of GPU memory and waits for the copy.
    ///
    /// # Errors
    /// The range is longer than the block or lies outside of the memory, or the driver returns an error.
    pub(crate) fn fetch(
        &mut self,
        memory: &impl Extent,
        offset: u64,
        len: usize,
    ) -> Result<(), CudaError> {
        let from = memory.at(offset, len as u64)?;
        let to = self.block_mut().get_mut(..len).map(<[u8]>::as_mut_ptr);
        let to = to.ok_or_else(|| self.too_long(len))?;
        // SAFETY: `at` and the slice have checked the two ranges, and the next line waits for the copy.
        unsafe { self.stream.transfer(to.addr() as u64, from, len as u64) }?;
        self.stream.wait()
    }

    /// Copies the block's start into a range of GPU memory and waits for the copy.
    ///
    /// # Errors
    /// The range is longer than the block or lies outside of the memory, or the driver returns an error.
    pub(crate) fn put(
        &mut self,
        memory: &impl Extent,
        offset: u64,
        len: usize,
    ) -> Result<(), CudaError> {
        let to = memory.at(offset, len as u64)?;
        let from = self.block().get(..len).map(<[u8]>::as_ptr);
        let from = from.ok_or_else(|| self.too_long(len))?;
        // SAFETY: `at` and the slice have checked the two ranges, and the next line waits for the copy.
        unsafe { self.stream.transfer(to, from.addr() as u64, len as u64) }?;
        self.stream.wait()
    }

    fn too_long(&self, len: usize) -> CudaError {
        CudaError::Range {
            offset: 0,
            len: len as u64,
            bytes: self.len as u64,
        }
    }
}

impl fmt::Debug for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stage")
            .field("len", &self.len)
            .field("stream", &self.stream)
            .finish_non_exhaustive()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let freed = self.stream.device().bind().and_then(|()| {
            // SAFETY: the block was allocated once and is freed once.
            // No copy is in flight, because each function that queues a copy waits for the copy.
            check("cuMemFreeHost", unsafe {
                sys::cuMemFreeHost(self.block.as_ptr().cast())
            })
        });
        if let Err(error) = freed {
            tracing::debug!(%error, "pinned memory was not freed");
        }
    }
}
