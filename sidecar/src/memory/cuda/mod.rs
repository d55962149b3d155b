//! GPUs, through CUDA's driver API, loaded when it is first asked for: the same binary runs where
//! there is none.
//!
//! Every call names its context first, so any thread may make it. Nothing here holds a Rust reference
//! to device memory; what is copied is bounded before the driver is asked.
//!
//! | file | |
//! |---|---|
//! | [`driver`] | the library: loaded once, or why not |
//! | [`device`] | a GPU, by ordinal or UUID, and its primary context |
//! | [`memory`] | a buffer that this process took, and shows to others |
//! | [`import`] | a buffer of another process |
//! | [`event`] | an engine's events, and this process's own |
//! | [`stream`] | copies in order |
//! | [`stage`] | host memory that copy engines reach, between sockets and GPU |

pub(crate) mod device;
mod driver;
pub(crate) mod event;
pub(crate) mod import;
pub(crate) mod memory;
pub(crate) mod stage;
pub(crate) mod stream;

pub(crate) use device::{Device, Uuid, Which, all};
pub(crate) use driver::{CudaError, is_present};
pub(crate) use event::{Event, State};
pub(crate) use import::Imported;
pub(crate) use memory::DeviceMemory;
pub(crate) use stage::Stage;
pub(crate) use stream::{Stream, Strided};

/// GPU memory that copies may name: of this process, or of another.
pub(crate) trait Extent {
    /// The address of a range of it, for the driver.
    ///
    /// # Errors
    /// A range outside of it.
    fn at(&self, offset: u64, len: u64) -> Result<u64, CudaError>;
}

impl<T: Extent> Extent for std::sync::Arc<T> {
    fn at(&self, offset: u64, len: u64) -> Result<u64, CudaError> {
        (**self).at(offset, len)
    }
}

/// An IPC handle of memory or of an event, as it travels.
pub(crate) type Handle = [u8; HANDLE_BYTES];

/// Bytes of either kind of IPC handle.
pub(crate) const HANDLE_BYTES: usize = 64;

#[cfg(test)]
mod tests;
