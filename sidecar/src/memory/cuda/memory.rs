//! Allocates and frees this process's buffers in GPU memory.

use std::ffi::c_char;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use cudarc::driver::sys::{self, CUdeviceptr, CUipcMemHandle, CUresult};

use super::device::Device;
use super::driver::{CudaError, check};
use super::stream::{Pitched, Stream};
use super::{Extent, HANDLE_BYTES, Handle};
use crate::memory::rows::Rows;

/// GPU memory of this process, allocated with cuMemAlloc. UCX, the engine and peers can all open such memory.
/// Memory from cuMemCreate is not used, because UCX silently copies it through sockets.
#[derive(Debug)]
pub(crate) struct DeviceMemory {
    device: Arc<Device>,
    address: CUdeviceptr,
    bytes: u64,
    handle: Handle,
    /// The stream for copies that a caller waits for. Transports have their own streams.
    copies: Mutex<Stream>,
}

impl DeviceMemory {
    /// Allocates `bytes` of GPU memory and clears them.
    ///
    /// # Errors
    /// Too little memory is free (the error says how much is needed and free), or the memory cannot be shared
    /// with other processes.
    pub(crate) fn take(device: Arc<Device>, bytes: u64) -> Result<Arc<Self>, CudaError> {
        let (free, total) = device.room()?;
        let short = || CudaError::Short {
            device: device.to_string(),
            asked: bytes,
            free,
            total,
        };
        // Allocates whole granules. Smaller allocations share a granule, and an IPC handle gives other
        // processes access to the whole granule.
        let whole = bytes.checked_next_multiple_of(GRANULE).ok_or_else(short)?;
        if whole > free {
            return Err(short());
        }
        let copies = Mutex::new(Stream::new(&device)?);
        let mut address = 0;
        // SAFETY: the out-pointer is valid, a context is current (`room` and `new` have made it current).
        let taken = check("cuMemAlloc", unsafe {
            sys::cuMemAlloc_v2(&mut address, usize::try_from(whole).unwrap_or(usize::MAX))
        });
        match taken {
            Err(error) if error.is(CUresult::CUDA_ERROR_OUT_OF_MEMORY) => return Err(short()),
            other => other?,
        }
        let mut memory = Self {
            device,
            address,
            bytes,
            handle: [0; HANDLE_BYTES],
            copies,
        };
        memory.handle = memory.export()?;
        // The memory may still hold old data of another process, which engines and peers must not see.
        let stream = memory.lock();
        stream.clear(&memory, 0, bytes)?;
        stream.wait()?;
        drop(stream);
        let memory = Arc::new(memory);
        own().push((memory.handle, Arc::downgrade(&memory)));
        Ok(memory)
    }

    /// Returns the GPU that holds the memory.
    pub(crate) fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Returns the address of the first byte in this process.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// Returns the number of bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns the IPC handle by which another process opens the memory.
    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Copies a range out of the memory and waits for the copy.
    ///
    /// # Errors
    /// The range lies outside of the memory, or the driver returns an error.
    pub(crate) fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), CudaError> {
        let from = self.at(offset, into.len() as u64)?;
        let stream = self.lock();
        // SAFETY: `at` has checked one range, and the borrow of the other range outlasts the copy.
        unsafe { stream.transfer(into.as_mut_ptr().addr() as u64, from, into.len() as u64) }?;
        stream.wait()
    }

    /// Copies into a range of the memory and waits for the copy.
    ///
    /// # Errors
    /// The range lies outside of the memory, or the driver returns an error.
    pub(crate) fn write(&self, offset: u64, from: &[u8]) -> Result<(), CudaError> {
        let to = self.at(offset, from.len() as u64)?;
        let stream = self.lock();
        // SAFETY: `at` has checked one range, and the borrow of the other range outlasts the copy.
        unsafe { stream.transfer(to, from.as_ptr().addr() as u64, from.len() as u64) }?;
        stream.wait()
    }

    /// Copies pieces at equal distances out of the memory and waits for the copy.
    ///
    /// # Errors
    /// A piece lies outside of the memory, or the driver returns an error.
    pub(crate) fn read_rows(&self, rows: Rows, into: &mut [u8]) -> Result<(), CudaError> {
        let pitched = self.pitched(rows, into.len())?;
        let stream = self.lock();
        // SAFETY: `pitched` has checked the pieces, and the borrow of the block outlasts the copy.
        unsafe { stream.fetch_rows(into.as_mut_ptr(), pitched) }?;
        stream.wait()
    }

    /// Copies pieces at equal distances into the memory and waits for the copy.
    ///
    /// # Errors
    /// A piece lies outside of the memory, or the driver returns an error.
    pub(crate) fn write_rows(&self, rows: Rows, from: &[u8]) -> Result<(), CudaError> {
        let pitched = self.pitched(rows, from.len())?;
        let stream = self.lock();
        // SAFETY: `pitched` has checked the pieces, and the borrow of the block outlasts the copy.
        unsafe { stream.put_rows(pitched, from.as_ptr()) }?;
        stream.wait()
    }

    /// Returns the driver's description of the pieces that fill a block of `len` bytes, if all pieces lie
    /// within the memory.
    fn pitched(&self, rows: Rows, len: usize) -> Result<Pitched, CudaError> {
        let height = len.checked_div(rows.width).unwrap_or(0);
        let between = rows.step.saturating_mul(height.saturating_sub(1) as u64);
        let extent = between.saturating_add(rows.width as u64);
        Ok(Pitched {
            address: self.at(rows.offset, extent)?,
            pitch: usize::try_from(rows.step).unwrap_or(usize::MAX),
            width: rows.width,
            height,
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Stream> {
        self.copies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn export(&self) -> Result<Handle, CudaError> {
        let mut handle = CUipcMemHandle {
            reserved: [0; HANDLE_BYTES],
        };
        // SAFETY: the out-pointer is valid; the address is the start of an allocation of this context.
        check("cuIpcGetMemHandle", unsafe {
            sys::cuIpcGetMemHandle(&mut handle, self.address)
        })
        .map_err(|error| error.ipc("cannot share the buffer with other processes"))?;
        Ok(handle.reserved.map(c_char::cast_unsigned))
    }
}

impl Extent for DeviceMemory {
    fn at(&self, offset: u64, len: u64) -> Result<u64, CudaError> {
        range(self.address, self.bytes, offset, len)
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        own().retain(|(_, memory)| memory.strong_count() > 0);
        let freed = self.device.bind().and_then(|()| {
            // SAFETY: the memory was allocated once and is freed once. Copies hold counted references until
            // they have ended. A process that has opened the memory keeps it mapped.
            check("cuMemFree", unsafe { sys::cuMemFree_v2(self.address) })
        });
        if let Err(error) = freed {
            tracing::debug!(%error, "GPU memory was not freed");
        }
    }
}

/// Returns the memory with this handle, if this process allocated it. CUDA does not open a handle in the
/// process that made the handle.
pub(super) fn of_this_process(handle: &Handle) -> Option<Arc<DeviceMemory>> {
    let own = own();
    let found = own.iter().find(|(known, _)| known == handle)?;
    found.1.upgrade()
}

type Own = Vec<(Handle, Weak<DeviceMemory>)>;

fn own() -> std::sync::MutexGuard<'static, Own> {
    static OWN: Mutex<Own> = Mutex::new(Vec::new());
    OWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the address of a range, if the range lies within the memory.
pub(super) fn range(
    address: CUdeviceptr,
    bytes: u64,
    offset: u64,
    len: u64,
) -> Result<CUdeviceptr, CudaError> {
    match offset.checked_add(len) {
        Some(end) if end <= bytes => Ok(address + offset),
        _ => Err(CudaError::Range { offset, len, bytes }),
    }
}

/// The driver's page size for device memory.
const GRANULE: u64 = 2 << 20;
