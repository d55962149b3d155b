//! Maps GPU memory of another process.

use std::sync::Arc;

use cudarc::driver::sys::{self, CUdeviceptr, CUipcMem_flags, CUipcMemHandle};

use super::device::Device;
use super::driver::{CudaError, check};
use super::memory::{self, DeviceMemory};
use super::{Extent, Handle};

/// GPU memory that another process allocated, mapped into this process. The mapping outlives that process.
#[derive(Debug)]
pub(crate) struct Imported {
    /// The GPU whose context maps the memory; not always the GPU that holds the memory.
    device: Arc<Device>,
    address: CUdeviceptr,
    bytes: u64,
    /// The memory itself, if this process allocated the memory, so that nothing is mapped; otherwise `None`.
    own: Option<Arc<DeviceMemory>>,
}

impl Imported {
    /// Maps the memory for copies by `device`, which must be able to reach the memory ([`Device::reaches`]).
    ///
    /// # Errors
    /// The driver's error, with the settings to check.
    pub(crate) fn open(
        device: &Arc<Device>,
        handle: &Handle,
        bytes: u64,
    ) -> Result<Self, CudaError> {
        if let Some(own) = memory::of_this_process(handle) {
            device.enable_peer(own.device())?;
            return Ok(Self {
                device: Arc::clone(device),
                address: own.address(),
                bytes: bytes.min(own.bytes()),
                own: Some(own),
            });
        }
        device.bind()?;
        let raw = CUipcMemHandle {
            reserved: handle.map(u8::cast_signed),
        };
        let mut address = 0;
        let flags = CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        // SAFETY: the out-pointer is valid; the driver checks the handle.
        check("cuIpcOpenMemHandle", unsafe {
            sys::cuIpcOpenMemHandle_v2(&mut address, raw, flags)
        })
        .map_err(|error| error.ipc("cannot open the buffer of the other process"))?;
        let mut imported = Self {
            device: Arc::clone(device),
            address,
            bytes,
            own: None,
        };
        // The peer sent the length of its buffer. With a wrong length, copies could write beyond the
        // mapping, so the length of the mapping is the limit.
        let mapped = imported.mapped()?;
        if mapped < bytes {
            let len = bytes;
            imported.bytes = mapped;
            return Err(CudaError::Range {
                offset: 0,
                len,
                bytes: mapped,
            });
        }
        Ok(imported)
    }

    fn mapped(&self) -> Result<u64, CudaError> {
        let (mut base, mut bytes) = (0, 0);
        // SAFETY: both out-pointers are valid; the address was mapped by `open`.
        check("cuMemGetAddressRange", unsafe {
            sys::cuMemGetAddressRange_v2(&mut base, &mut bytes, self.address)
        })?;
        Ok((base + bytes as u64).saturating_sub(self.address))
    }
}

impl Extent for Imported {
    fn at(&self, offset: u64, len: u64) -> Result<u64, CudaError> {
        memory::range(self.address, self.bytes, offset, len)
    }
}

impl Drop for Imported {
    fn drop(&mut self) {
        if self.own.is_some() {
            return;
        }
        let closed = self.device.bind().and_then(|()| {
            // SAFETY: `open` mapped the memory, and the mapping is closed once.
            // Copies into the memory have ended, because the owner of each copy keeps `self` until then.
            check("cuIpcCloseMemHandle", unsafe {
                sys::cuIpcCloseMemHandle(self.address)
            })
        });
        if let Err(error) = closed {
            tracing::debug!(%error, "another process's GPU memory was not closed");
        }
    }
}
