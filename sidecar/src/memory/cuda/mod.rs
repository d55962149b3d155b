//! Uses GPUs through CUDA's driver API. The library is loaded at the first use, so that the same binary also
//! runs on hosts without a GPU.
//!
//! Every call makes its context current first, so any thread may make the call. No Rust reference to device
//! memory exists in this module. Each range is checked before the driver is called.
//!
//! | file | |
//! |---|---|
//! | [`driver`] | loads the library once, or says why it cannot be loaded |
//! | [`device`] | a GPU, by ordinal or UUID, and its primary context |
//! | [`memory`] | a buffer that this process allocated and shares with others |
//! | [`import`] | a buffer of another process |
//! | [`event`] | an engine's events, and this process's own |
//! | [`stream`] | copies in order |
//! | [`stage`] | pinned host memory between sockets and the GPU |

pub(crate) mod device;
mod driver;
pub(crate) mod event;
pub(crate) mod import;
pub(crate) mod memory;
pub(crate) mod stage;
pub(crate) mod stream;

pub(crate) use device::{Device, Uuid, Which, all, reaches};
pub(crate) use driver::{CudaError, is_present};
pub(crate) use event::{Event, State};
pub(crate) use import::Imported;
pub(crate) use memory::DeviceMemory;
pub(crate) use stage::Stage;
pub(crate) use stream::{Stream, Strided};

/// GPU memory, of this process or of another process, that can be the source or the target of a copy.
pub(crate) trait Extent {
    /// Returns the address of a range of the memory, for the driver.
    ///
    /// # Errors
    /// The range lies outside of the memory.
    fn at(&self, offset: u64, len: u64) -> Result<u64, CudaError>;
}

impl<T: Extent> Extent for std::sync::Arc<T> {
    fn at(&self, offset: u64, len: u64) -> Result<u64, CudaError> {
        (**self).at(offset, len)
    }
}

/// An IPC handle of memory or of an event, as processes send it to each other.
pub(crate) type Handle = [u8; HANDLE_BYTES];

/// Length of an IPC handle in bytes, the same for memory and for events.
pub(crate) const HANDLE_BYTES: usize = 64;

#[cfg(test)]
mod tests;
