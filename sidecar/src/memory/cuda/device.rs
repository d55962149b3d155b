//! Finds GPUs and holds their primary contexts.

use std::ffi::c_char;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUcontext, CUdevice, CUresult};

use super::driver::{CudaError, check, load};

/// The name of a GPU: a number or a UUID.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Which {
    /// The GPU's number in this process, counted from 0.
    Ordinal(u32),
    /// The GPU's UUID, which is the same in every process.
    Uuid(Uuid),
}

impl fmt::Display for Which {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ordinal(ordinal) => write!(f, "cuda:{ordinal}"),
            Self::Uuid(uuid) => write!(f, "{uuid}"),
        }
    }
}

/// A GPU's UUID, written `GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Uuid([u8; 16]);

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GPU")?;
        for (i, byte) in self.0.iter().enumerate() {
            if matches!(i, 0 | 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl FromStr for Uuid {
    type Err = ();

    /// Reads a UUID with or without `GPU-`, which some tools leave out.
    fn from_str(text: &str) -> Result<Self, ()> {
        let text = text.strip_prefix("GPU-").unwrap_or(text);
        let parsed = uuid::Uuid::try_parse(text).map_err(|_| ())?;
        Ok(Self(parsed.into_bytes()))
    }
}

/// A GPU with its primary context retained.
///
/// UCX uses the primary context, too. A second context on the GPU would need as much memory as the primary
/// context.
#[derive(Debug)]
pub(crate) struct Device {
    ordinal: u32,
    raw: CUdevice,
    uuid: Uuid,
    context: CUcontext,
}

// SAFETY: a context may be made current in any thread, and the driver locks its own state. Only `drop`
// releases the handle.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl Device {
    /// Finds a GPU and retains its primary context. The first context of a process takes a few hundred MiB of
    /// the GPU's memory.
    ///
    /// # Errors
    /// There is no driver or no such GPU, or the driver refuses.
    pub(crate) fn open(which: &Which) -> Result<Arc<Self>, CudaError> {
        load()?;
        let ordinal = match which {
            Which::Ordinal(ordinal) => *ordinal,
            Which::Uuid(uuid) => find(uuid)?,
        };
        let present = count()?;
        if ordinal >= present {
            return Err(missing(which));
        }
        let raw = handle(ordinal)?;
        let mut context = std::ptr::null_mut();
        // SAFETY: the out-pointer is valid, the device is one of this process.
        let retained = check("cuDevicePrimaryCtxRetain", unsafe {
            sys::cuDevicePrimaryCtxRetain(&mut context, raw)
        });
        match retained {
            Err(error) if error.is(CUresult::CUDA_ERROR_OUT_OF_MEMORY) => {
                let device = which.to_string();
                return Err(CudaError::NoContext { device });
            }
            other => other?,
        }
        Ok(Arc::new(Self {
            ordinal,
            raw,
            uuid: uuid_of(raw)?,
            context,
        }))
    }

    /// Returns the GPU's number in this process.
    pub(crate) fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// Returns the GPU's UUID.
    pub(crate) fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// Makes this GPU's context current in the calling thread. Every call of this module does this first.
    /// Call this function before you call a library that needs a current context.
    ///
    /// # Errors
    /// The driver's error.
    pub(crate) fn bind(&self) -> Result<(), CudaError> {
        // SAFETY: the context is retained until `drop`.
        check("cuCtxSetCurrent", unsafe {
            sys::cuCtxSetCurrent(self.context)
        })
    }

    /// Returns the free and the total bytes of the GPU's memory.
    ///
    /// # Errors
    /// The driver's error.
    pub(crate) fn room(&self) -> Result<(u64, u64), CudaError> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: both out-pointers are valid.
        check("cuMemGetInfo", unsafe {
            sys::cuMemGetInfo_v2(&mut free, &mut total)
        })?;
        Ok((free as u64, total as u64))
    }

    /// Checks that this GPU reaches the memory of another GPU. A GPU always reaches its own memory.
    ///
    /// # Errors
    /// The text says why the other GPU cannot be reached.
    pub(crate) fn reaches(&self, other: &Uuid) -> Result<(), String> {
        if self.uuid == *other {
            return Ok(());
        }
        let peer = find(other).and_then(handle).map_err(|_| {
            format!("this process does not see the receiver's {other}: check CUDA_VISIBLE_DEVICES")
        })?;
        let mut can = 0;
        // SAFETY: the out-pointer is valid, both devices are of this process.
        check("cuDeviceCanAccessPeer", unsafe {
            sys::cuDeviceCanAccessPeer(&mut can, self.raw, peer)
        })
        .map_err(|error| error.to_string())?;
        if can == 0 {
            return Err(format!("{} has no peer access to {other}", self.uuid));
        }
        Ok(())
    }

    /// Enables this GPU's access to the memory that `other`'s context holds.
    pub(super) fn enable_peer(&self, other: &Self) -> Result<(), CudaError> {
        if self.uuid == other.uuid {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: both contexts are retained.
        let enabled = check("cuCtxEnablePeerAccess", unsafe {
            sys::cuCtxEnablePeerAccess(other.context, 0)
        });
        match enabled {
            Err(error) if error.is(sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED) => Ok(()),
            other => other,
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.ordinal, self.uuid)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: `open` retained the context, and it is released once.
        // Everything made in the context holds a counted reference to `self`.
        let released = check("cuDevicePrimaryCtxRelease", unsafe {
            sys::cuDevicePrimaryCtxRelease_v2(self.raw)
        });
        if let Err(error) = released {
            tracing::debug!(%error, "a CUDA context was not released");
        }
    }
}

/// Returns the UUIDs of the GPUs of this process, in the order of their numbers.
///
/// # Errors
/// There is no driver, or the driver returns an error.
pub(crate) fn all() -> Result<Vec<Uuid>, CudaError> {
    load()?;
    (0..count()?)
        .map(|ordinal| handle(ordinal).and_then(uuid_of))
        .collect()
}

/// Returns true if GPU `from` can read and write the memory of GPU `to`. Makes no context, so it needs no memory.
///
/// # Errors
/// There is no driver or no such GPU, or the driver returns an error.
pub(crate) fn reaches(from: u32, to: u32) -> Result<bool, CudaError> {
    load()?;
    let mut can = 0;
    // SAFETY: the out-pointer is valid, both devices are of this process.
    check("cuDeviceCanAccessPeer", unsafe {
        sys::cuDeviceCanAccessPeer(&mut can, handle(from)?, handle(to)?)
    })?;
    Ok(can != 0)
}

fn find(uuid: &Uuid) -> Result<u32, CudaError> {
    let at = all()?.iter().position(|found| found == uuid);
    at.and_then(|at| u32::try_from(at).ok())
        .ok_or_else(|| missing(&Which::Uuid(*uuid)))
}

fn missing(which: &Which) -> CudaError {
    let present = match all() {
        Ok(all) if all.is_empty() => "it sees none".to_owned(),
        Ok(all) => {
            let names: Vec<String> = (0..)
                .zip(&all)
                .map(|(i, uuid)| format!("cuda:{i} {uuid}"))
                .collect();
            format!("it sees {}", names.join(", "))
        }
        Err(error) => error.to_string(),
    };
    CudaError::NoDevice {
        asked: which.to_string(),
        present,
    }
}

fn count() -> Result<u32, CudaError> {
    let mut count = 0;
    // SAFETY: the out-pointer is valid.
    check("cuDeviceGetCount", unsafe {
        sys::cuDeviceGetCount(&mut count)
    })?;
    Ok(u32::try_from(count).unwrap_or(0))
}

fn handle(ordinal: u32) -> Result<CUdevice, CudaError> {
    let mut device = 0;
    let ordinal = i32::try_from(ordinal).unwrap_or(i32::MAX);
    // SAFETY: the out-pointer is valid; the driver checks the number.
    check("cuDeviceGet", unsafe {
        sys::cuDeviceGet(&mut device, ordinal)
    })?;
    Ok(device)
}

fn uuid_of(device: CUdevice) -> Result<Uuid, CudaError> {
    let mut raw = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: the out-pointer is valid, the device is one of this process.
    check("cuDeviceGetUuid", unsafe {
        sys::cuDeviceGetUuid_v2(&mut raw, device)
    })?;
    Ok(Uuid(raw.bytes.map(c_char::cast_unsigned)))
}
