//! Marks points in a GPU's work: events of an engine, opened by handle, and events of this process.

use std::ffi::c_char;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::sys::{self, CUevent, CUevent_flags, CUipcEventHandle, CUresult};

use super::device::Device;
use super::driver::{CudaError, check};
use super::{HANDLE_BYTES, Handle};

/// The progress of the work before an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum State {
    /// The work is not done.
    Pending,
    /// The work is done.
    Fired,
}

/// A CUDA event. The event fires when the GPU has done all work that was queued before the event was
/// recorded.
#[derive(Debug)]
pub(crate) struct Event {
    raw: CUevent,
    device: Arc<Device>,
    /// True once the event's owner is gone. An event without its owner may never fire, or may wrongly
    /// report that it has fired.
    orphaned: AtomicBool,
}

// SAFETY: the driver locks its own state, and an event may be queried from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// Makes an event of this process. The event measures no time, because timing would make it slower.
    ///
    /// # Errors
    /// The driver's error.
    pub(crate) fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        Self::with(device, CUevent_flags::CU_EVENT_DISABLE_TIMING as u32)
    }

    /// Makes an event that other processes may open, and returns it with its handle.
    ///
    /// # Errors
    /// The driver's error.
    pub(crate) fn shared(device: &Arc<Device>) -> Result<(Self, Handle), CudaError> {
        let flags = CUevent_flags::CU_EVENT_DISABLE_TIMING as u32
            | CUevent_flags::CU_EVENT_INTERPROCESS as u32;
        let event = Self::with(device, flags)?;
        let mut handle = CUipcEventHandle {
            reserved: [0; HANDLE_BYTES],
        };
        // SAFETY: the out-pointer is valid, and the event is live and was made with the flag that allows a
        // handle.
        check("cuIpcGetEventHandle", unsafe {
            sys::cuIpcGetEventHandle(&mut handle, event.raw)
        })
        .map_err(|error| error.ipc("cannot share an event with other processes"))?;
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
    /// The driver's error, with the settings to check.
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
        .map_err(|error| error.ipc("cannot open the engine's event"))?;
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

    /// Returns `Fired` if all work before the last record is done, or if there was no record.
    ///
    /// # Errors
    /// The driver's error. After an error the event's state stays unknown.
    pub(crate) fn state(&self) -> Result<State, CudaError> {
        self.device.bind()?;
        // SAFETY: the event is live.
        match unsafe { sys::cuEventQuery(self.raw) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(State::Pending),
            result => check("cuEventQuery", result).map(|()| State::Fired),
        }
    }

    /// Notes that the event's owner is gone, so that no write waits for the event any more.
    pub(crate) fn orphan(&self) {
        self.orphaned.store(true, Ordering::Release);
    }

    /// Returns true if the event's owner is gone.
    pub(crate) fn is_orphaned(&self) -> bool {
        self.orphaned.load(Ordering::Acquire)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let destroyed = self.device.bind().and_then(|()| {
            // SAFETY: the event was made or opened once and is destroyed once.
            // The driver keeps a queued event until the event has fired.
            check("cuEventDestroy", unsafe {
                sys::cuEventDestroy_v2(self.raw)
            })
        });
        if let Err(error) = destroyed {
            tracing::debug!(%error, "a CUDA event was not destroyed");
        }
    }
}
