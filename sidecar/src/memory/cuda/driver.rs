//! Loads the CUDA driver's library and turns its results into errors.

use std::ffi::{CStr, c_char};
use std::ptr;
use std::sync::OnceLock;

use cudarc::driver::sys::{self, CUresult};

use crate::memory::size::Size;

/// A failure of CUDA, with a text that says what to change.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CudaError {
    /// The host or the container has no driver library.
    #[error(
        "libcuda.so.1 is not found: this host has no NVIDIA driver, or the container was started \
         without it (docker: --gpus all; Kubernetes: a limit nvidia.com/gpu); without a GPU set \
         pd_buffer_device to cpu"
    )]
    NoDriver,
    /// The driver is older than `OLDEST`. Holds the driver's version, 1000 * major + 10 * minor.
    #[error("the NVIDIA driver is for CUDA {}.{}; 11.4 or newer is needed", .0 / 1000, .0 % 1000 / 10)]
    TooOld(i32),
    /// This process does not see the GPU.
    #[error(
        "this process does not see GPU {asked} ({present}); check CUDA_VISIBLE_DEVICES and the GPUs of the \
         container"
    )]
    NoDevice {
        /// The ordinal or UUID that was asked for.
        asked: String,
        /// The GPUs that this process sees, or why they cannot be listed.
        present: String,
    },
    /// The GPU has too little free memory for the buffer.
    #[error(
        "a buffer of {} was asked for on GPU {device}, which has {} of {} free; make the buffer \
         smaller, or leave more memory free (vLLM: a lower --gpu-memory-utilization)",
        Size(*asked), Size(*free), Size(*total)
    )]
    Short {
        /// The GPU's ordinal and UUID.
        device: String,
        /// The bytes that were asked for.
        asked: u64,
        /// The free bytes of the GPU's memory.
        free: u64,
        /// The total bytes of the GPU's memory.
        total: u64,
    },
    /// The GPU has too little free memory for this process's context.
    #[error(
        "{device} has no memory left for this process's CUDA context, about 500 MiB: leave more \
         memory free (vLLM: a lower --gpu-memory-utilization)"
    )]
    NoContext {
        /// The ordinal or UUID that was asked for.
        device: String,
    },
    /// Memory or an event cannot be shared between processes.
    #[error(
        "{what}: {cause}. CUDA IPC needs both processes on one host, in one IPC and one PID \
         namespace (docker: --ipc=host --pid=host; Kubernetes: hostIPC and hostPID), and both to \
         see the GPU"
    )]
    Ipc {
        /// The operation that failed, in words for the user.
        what: &'static str,
        /// The driver's error.
        cause: Box<CudaError>,
    },
    /// A range lies outside of its memory.
    #[error("{len} bytes at {offset} lie outside of {bytes} bytes of GPU memory")]
    Range {
        /// The range's first byte, counted from the start of the memory.
        offset: u64,
        /// Bytes of the range.
        len: u64,
        /// Bytes of the memory.
        bytes: u64,
    },
    /// Any other error that the driver returns.
    #[error("{call}: {name} ({text})")]
    Call {
        /// The driver's function that failed.
        call: &'static str,
        /// The error's name in CUDA's headers.
        name: String,
        /// The driver's explanation.
        text: String,
        /// The error's number in CUDA's headers.
        code: u32,
    },
}

impl CudaError {
    /// Wraps the error as a failure to share memory or an event between processes.
    pub(super) fn ipc(self, what: &'static str) -> Self {
        Self::Ipc {
            what,
            cause: Box::new(self),
        }
    }

    pub(super) fn is(&self, result: CUresult) -> bool {
        matches!(self, Self::Call { code, .. } if *code == result as u32)
    }
}

impl From<CudaError> for std::io::Error {
    fn from(error: CudaError) -> Self {
        let kind = match &error {
            CudaError::Range { .. } => std::io::ErrorKind::InvalidInput,
            _ => std::io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}

/// Returns true if this host has a driver that can be used.
pub(crate) fn is_present() -> bool {
    load().is_ok()
}

/// Loads and initialises the driver at the first call. Later calls return the first result.
pub(super) fn load() -> Result<(), CudaError> {
    static LOADED: OnceLock<Result<(), CudaError>> = OnceLock::new();
    LOADED.get_or_init(first_load).clone()
}

fn first_load() -> Result<(), CudaError> {
    // SAFETY: loading runs the library's initialisers, as every user of CUDA does.
    // The library's presence is checked first, because cudarc panics at the first call if the library is
    // missing.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    let mut version = 0;
    // SAFETY: the out-pointer is valid, and this call may come before cuInit.
    check("cuDriverGetVersion", unsafe {
        sys::cuDriverGetVersion(&mut version)
    })?;
    if version < OLDEST {
        return Err(CudaError::TooOld(version));
    }
    // SAFETY: the only requirement is that the flags are 0.
    check("cuInit", unsafe { sys::cuInit(0) })
}

/// The first driver version that has every function that this module calls.
const OLDEST: i32 = 11_040;

/// Returns the driver's result as an error with its name and explanation.
pub(super) fn check(call: &'static str, result: CUresult) -> Result<(), CudaError> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let told = |tell: unsafe fn(CUresult, *mut *const c_char) -> CUresult| {
        let mut text = ptr::null();
        // SAFETY: the out-pointer is valid.
        let known = unsafe { tell(result, &mut text) } == CUresult::CUDA_SUCCESS;
        if !known || text.is_null() {
            return String::from("unknown");
        }
        // SAFETY: on success `text` points to a static NUL-terminated string.
        unsafe { CStr::from_ptr(text) }
            .to_string_lossy()
            .into_owned()
    };
    Err(CudaError::Call {
        call,
        name: told(sys::cuGetErrorName),
        text: told(sys::cuGetErrorString),
        code: result as u32,
    })
}
