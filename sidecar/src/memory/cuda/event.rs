//! Points in a GPU's work: an engine's, opened by handle, and this process's own.

use std::ffi::c_char;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::sys::{self, CUevent, CUevent_flags, CUipcEventHandle, CUresult};

use super::device::Device;
use super::driver::{CudaError, check};
use super::{HANDLE_BYTES, Handle};

/// How far the work before an event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum State {
    /// Not done.
    Pending,
    /// Done.
    Fired,
}

/// An event.
#[derive(Debug)]
pub(crate) struct Event {
    raw: CUevent,
    device: Arc<Device>,
    /// Its owner is gone: it may never fire, or say so wrongly.
    orphaned: AtomicBool,
}

// SAFETY: the driver locks its own state, and an event may be queried from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// An event of this process that measures no time, which would make it slower.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        Self::with(device, CUevent_flags::CU_EVENT_DISABLE_TIMING as u32)
    }

    /// An event that other processes may open.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn shared(device: &Arc<Device>) -> Result<(Self, Handle), CudaError> {
        let flags = CUevent_flags::CU_EVENT_DISABLE_TIMING as u32
            | CUevent_flags::CU_EVENT_INTERPROCESS as u32;
        let event = Self::with(device, flags)?;
        let mut handle = CUipcEventHandle {
            reserved: [0; HANDLE_BYTES],
        };
        // SAFETY: the out-pointer is valid, the event live and made for this.
        check("cuIpcGetEventHandle", unsafe {
            sys::cuIpcGetEventHandle(&mut handle, event.raw)
        })
        .map_err(|error| error.ipc("an event cannot be shown to other processes"))?;
        Ok((event, handle.reserved.map(c_char::cast_unsigned)))
    }

    fn with(device: &Arc<Device>, flags: u32) -> Result<Self, CudaError> {
        device.bind()?;
        let mut raw = ptr::null_mut();
        // SAFETY: the out-pointer is valid, a context is current.
        check("cuEventCreate", unsafe {
            sys::cuEventCreate(&mut raw, flags)
        })?;
        Ok(Self::of(raw, device))
    }

    /// Opens an event of another process.
    ///
    /// # Errors
    /// The driver's refusal, and what to set.
    pub(crate) fn open(device: &Arc<Device>, handle: &Handle) -> Result<Self, CudaError> {
        device.bind()?;
        let handle = CUipcEventHandle {
            reserved: handle.map(u8::cast_signed),
        };
        let mut raw = ptr::null_mut();
        // SAFETY: the out-pointer is valid; the driver checks the handle.
        check("cuIpcOpenEventHandle", unsafe {
            sys::cuIpcOpenEventHandle(&mut raw, handle)
        })
        .map_err(|error| error.ipc("the engine's event cannot be opened"))?;
        Ok(Self::of(raw, device))
    }

    fn of(raw: CUevent, device: &Arc<Device>) -> Self {
        Self {
            raw,
            device: Arc::clone(device),
            orphaned: AtomicBool::new(false),
        }
    }

    pub(super) fn raw(&self) -> CUevent {
        self.raw
    }

    /// Whether everything before the last record is done; true if there was none.
    ///
    /// # Errors
    /// The driver's: then it will never be known.
    pub(crate) fn state(&self) -> Result<State, CudaError> {
        self.device.bind()?;
        // SAFETY: live event.
        match unsafe { sys::cuEventQuery(self.raw) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(State::Pending),
            result => check("cuEventQuery", result).map(|()| State::Fired),
        }
    }

    /// Its owner is gone: nobody should wait for it any more.
    pub(crate) fn orphan(&self) {
        self.orphaned.store(true, Ordering::Release);
    }

    /// Whether its owner is gone.
    pub(crate) fn is_orphaned(&self) -> bool {
        self.orphaned.load(Ordering::Acquire)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let destroyed = self.device.bind().and_then(|()| {
            // SAFETY: made or opened once, destroyed once. One that is still queued goes when it has
            // fired.
            check("cuEventDestroy", unsafe {
                sys::cuEventDestroy_v2(self.raw)
            })
        });
        if let Err(error) = destroyed {
            tracing::debug!(%error, "a CUDA event was not destroyed");
        }
    }
}
