//! The driver's library.

use std::ffi::{CStr, c_char};
use std::ptr;
use std::sync::OnceLock;

use cudarc::driver::sys::{self, CUresult};

use crate::memory::size::Size;

/// What CUDA does not do, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CudaError {
    /// No library.
    #[error(
        "libcuda.so.1 is not found: this host has no NVIDIA driver, or the container was started \
         without it (docker: --gpus all; Kubernetes: a limit nvidia.com/gpu); without a GPU write cpu"
    )]
    NoDriver,
    /// A library that is too old.
    #[error("the NVIDIA driver is for CUDA {}.{}; 11.4 or newer is needed", .0 / 1000, .0 % 1000 / 10)]
    TooOld(i32),
    /// No such GPU.
    #[error(
        "there is no GPU {asked} for this process ({present}); check CUDA_VISIBLE_DEVICES and what \
         the container was given"
    )]
    NoDevice {
        /// Ordinal or UUID.
        asked: String,
        /// What there is.
        present: String,
    },
    /// Not enough memory.
    #[error(
        "a buffer of {} was asked for on GPU {device}, which has {} of {} free; make the buffer \
         smaller, or leave it more room (vLLM: --gpu-memory-utilization)",
        Size(*asked), Size(*free), Size(*total)
    )]
    Short {
        /// Ordinal and UUID.
        device: String,
        /// Bytes.
        asked: u64,
        /// Bytes.
        free: u64,
        /// Bytes.
        total: u64,
    },
    /// Not enough memory to begin with.
    #[error(
        "{device} has no memory left for this process's CUDA context, about 500 MiB: leave it more \
         room (vLLM: --gpu-memory-utilization)"
    )]
    NoContext {
        /// Ordinal or UUID.
        device: String,
    },
    /// Memory or an event cannot be shared between processes.
    #[error(
        "{what}: {cause}. CUDA IPC needs both processes on one host, in one IPC and one PID \
         namespace (docker: --ipc=host --pid=host; Kubernetes: hostIPC and hostPID), and both to \
         see the GPU"
    )]
    Ipc {
        /// What was tried.
        what: &'static str,
        /// The driver's word.
        cause: Box<CudaError>,
    },
    /// A range that is not within its memory.
    #[error("{len} bytes at {offset} lie outside of {bytes} bytes of GPU memory")]
    Range {
        /// Bytes.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Bytes.
        bytes: u64,
    },
    /// Anything else.
    #[error("{call}: {name} ({text})")]
    Call {
        /// The function.
        call: &'static str,
        /// As in CUDA's headers.
        name: String,
        /// The driver's explanation.
        text: String,
        /// The number.
        code: u32,
    },
}

impl CudaError {
    /// As a failure of sharing between processes.
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

/// Whether this host has a driver that can be used.
pub(crate) fn is_present() -> bool {
    load().is_ok()
}

/// Loads and initialises the driver, once.
pub(super) fn load() -> Result<(), CudaError> {
    static LOADED: OnceLock<Result<(), CudaError>> = OnceLock::new();
    LOADED.get_or_init(first_load).clone()
}

fn first_load() -> Result<(), CudaError> {
    // SAFETY: loading runs the library's initialisers, as every user of CUDA does; asked first
    // because cudarc panics at the first call where the library is missing.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    let mut version = 0;
    // SAFETY: the out-pointer is valid; needs no initialisation.
    check("cuDriverGetVersion", unsafe {
        sys::cuDriverGetVersion(&mut version)
    })?;
    if version < OLDEST {
        return Err(CudaError::TooOld(version));
    }
    // SAFETY: no contract beyond the flags, which must be 0.
    check("cuInit", unsafe { sys::cuInit(0) })
}

/// The driver's first version that has every function that is called here.
const OLDEST: i32 = 11_040;

/// A result as an error, with its name and explanation.
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
        // SAFETY: on success a static NUL-terminated string.
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
