//! Queues copies, which the GPU makes one after the other.

use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUmemorytype, CUstream};

use super::Extent;
use super::device::Device;
use super::driver::{CudaError, check};
use super::event::Event;

/// Ranges at equal distances in a source memory, and the place of their copies in a target memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Strided {
    /// Offset of the first range in the source memory, in bytes.
    pub(crate) from: u64,
    /// Offset of the first range's copy in the target memory, in bytes.
    pub(crate) to: u64,
    /// Bytes of each range.
    pub(crate) width: u64,
    /// The number of ranges.
    pub(crate) count: u64,
}

impl Strided {
    /// Returns the bytes of all ranges together.
    pub(crate) fn bytes(&self) -> u64 {
        self.width * self.count
    }
}

/// Pieces of GPU memory at equal distances, in the form that CUDA's two-dimensional copies need.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pitched {
    /// Address of the first piece.
    pub(super) address: u64,
    /// Bytes from the start of one piece to the start of the next.
    pub(super) pitch: usize,
    /// Bytes of each piece.
    pub(super) width: usize,
    /// The number of pieces.
    pub(super) height: usize,
}

impl Pitched {
    /// Returns CUDA's description of a copy of this shape. The callers add the source and the target.
    fn blank(self) -> sys::CUDA_MEMCPY2D {
        sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: CUmemorytype::CU_MEMORYTYPE_HOST,
            srcHost: ptr::null(),
            srcDevice: 0,
            srcArray: ptr::null_mut(),
            srcPitch: 0,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: CUmemorytype::CU_MEMORYTYPE_HOST,
            dstHost: ptr::null_mut(),
            dstDevice: 0,
            dstArray: ptr::null_mut(),
            dstPitch: 0,
            WidthInBytes: self.width,
            Height: self.height,
        }
    }
}

/// A stream of GPU work that does not wait for the work of other streams.
#[derive(Debug)]
pub(crate) struct Stream {
    raw: CUstream,
    device: Arc<Device>,
}

// SAFETY: the driver locks its own state, and a stream works in any thread that has its context current.
unsafe impl Send for Stream {}
// SAFETY: as above; callers in different threads keep their calls in order.
unsafe impl Sync for Stream {}

impl Stream {
    /// Makes a stream on the GPU.
    ///
    /// # Errors
    /// The driver's error.
    pub(crate) fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        device.bind()?;
        let mut raw = ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the out-pointer is valid, a context is current.
        check("cuStreamCreate", unsafe {
            sys::cuStreamCreate(&mut raw, flags)
        })?;
        Ok(Self {
            raw,
            device: Arc::clone(device),
        })
    }

    /// Returns the stream's GPU.
    pub(crate) fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Queues a copy between two GPU memories. The caller records an event after the copy, and keeps both
    /// memories allocated until this event has fired.
    ///
    /// # Errors
    /// A range lies outside of its memory, or the driver returns an error.
    pub(crate) fn push(
        &self,
        from: &impl Extent,
        at: u64,
        to: &impl Extent,
        to_at: u64,
        len: u64,
    ) -> Result<(), CudaError> {
        let source = from.at(at, len)?;
        let target = to.at(to_at, len)?;
        self.copy(target, source, len)
    }

    /// Queues a copy of ranges at equal distances, `pitch` bytes apart on both sides. The caller must keep
    /// both memories allocated, as described at [`Stream::push`].
    ///
    /// # Errors
    /// A range lies outside of its memory, or the driver returns an error.
    pub(crate) fn push_rows(
        &self,
        from: &impl Extent,
        to: &impl Extent,
        rows: Strided,
        pitch: u64,
    ) -> Result<(), CudaError> {
        if rows.count == 1 {
            return self.push(from, rows.from, to, rows.to, rows.width);
        }
        let len = rows.count.saturating_sub(1).saturating_mul(pitch) + rows.width;
        let number = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        let shape = Pitched {
            address: from.at(rows.from, len)?,
            pitch: number(pitch),
            width: number(rows.width),
            height: number(rows.count),
        };
        self.copy_rows(&sys::CUDA_MEMCPY2D {
            srcMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
            srcDevice: shape.address,
            srcPitch: shape.pitch,
            dstMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstDevice: to.at(rows.to, len)?,
            dstPitch: shape.pitch,
            ..shape.blank()
        })
    }

    /// Queues a copy between two addresses, of GPU memory or of host memory.
    ///
    /// # Safety
    /// `len` bytes at either address must be valid, in memory that this context reaches or in host memory,
    /// and must stay valid until the stream has made the copy.
    pub(super) unsafe fn transfer(&self, to: u64, from: u64, len: u64) -> Result<(), CudaError> {
        self.copy(to, from, len)
    }

    /// Queues a copy of pieces of GPU memory into host memory, where the pieces follow each other.
    ///
    /// # Safety
    /// Every piece, and `width * height` bytes of host memory, must be valid and stay valid until the stream
    /// has made the copy.
    pub(super) unsafe fn fetch_rows(&self, to: *mut u8, from: Pitched) -> Result<(), CudaError> {
        self.copy_rows(&sys::CUDA_MEMCPY2D {
            srcMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
            srcDevice: from.address,
            srcPitch: from.pitch,
            dstMemoryType: CUmemorytype::CU_MEMORYTYPE_HOST,
            dstHost: to.cast(),
            dstPitch: from.width,
            ..from.blank()
        })
    }

    /// Queues a copy of host memory into pieces of GPU memory. In host memory the pieces follow each other.
    ///
    /// # Safety
    /// The same errors as [`Stream::fetch_rows`].
    pub(super) unsafe fn put_rows(&self, to: Pitched, from: *const u8) -> Result<(), CudaError> {
        self.copy_rows(&sys::CUDA_MEMCPY2D {
            srcMemoryType: CUmemorytype::CU_MEMORYTYPE_HOST,
            srcHost: from.cast(),
            srcPitch: to.width,
            dstMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstDevice: to.address,
            dstPitch: to.pitch,
            ..to.blank()
        })
    }

    fn copy_rows(&self, what: &sys::CUDA_MEMCPY2D) -> Result<(), CudaError> {
        self.device.bind()?;
        // SAFETY: the callers guarantee that both sides are valid, and the driver reads `what` before the
        // call returns.
        check("cuMemcpy2DAsync", unsafe {
            sys::cuMemcpy2DAsync_v2(what, self.raw)
        })
    }

    fn copy(&self, to: u64, from: u64, len: u64) -> Result<(), CudaError> {
        self.device.bind()?;
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        // SAFETY: with unified addressing an address tells the driver which memory it is in.
        // `push` has checked both ranges; the callers of `transfer` guarantee that their addresses are valid.
        check("cuMemcpyAsync", unsafe {
            sys::cuMemcpyAsync(to, from, len, self.raw)
        })
    }

    /// Queues a write of zeros into a range.
    ///
    /// # Errors
    /// The range lies outside of the memory, or the driver returns an error.
    pub(crate) fn clear(&self, memory: &impl Extent, at: u64, len: u64) -> Result<(), CudaError> {
        let target = memory.at(at, len)?;
        self.device.bind()?;
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        // SAFETY: the range lies within memory of this process, checked by `at`.
        check("cuMemsetD8Async", unsafe {
            sys::cuMemsetD8Async(target, 0, len, self.raw)
        })
    }

    /// Records `event`: it fires once everything that was queued so far is done.
    ///
    /// # Errors
    /// The driver's error.
    pub(crate) fn record(&self, event: &Event) -> Result<(), CudaError> {
        self.device.bind()?;
        // SAFETY: the event and the stream are live and belong to one context.
        check("cuEventRecord", unsafe {
            sys::cuEventRecord(event.raw(), self.raw)
        })
    }

    /// Waits until everything that was queued is done.
    ///
    /// # Errors
    /// The driver's error, which may come from the queued work.
    pub(crate) fn wait(&self) -> Result<(), CudaError> {
        self.device.bind()?;
        // SAFETY: the stream is live.
        check("cuStreamSynchronize", unsafe {
            sys::cuStreamSynchronize(self.raw)
        })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let destroyed = self.device.bind().and_then(|()| {
            // SAFETY: `new` made the stream, and it is destroyed once. Queued work still runs.
            check("cuStreamDestroy", unsafe {
                sys::cuStreamDestroy_v2(self.raw)
            })
        });
        if let Err(error) = destroyed {
            tracing::debug!(%error, "a CUDA stream was not destroyed");
        }
    }
}
