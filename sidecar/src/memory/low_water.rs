//! Sets the socket option `SO_RCVLOWAT`, which none of the safe crates in use offers.

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Lets `poll(2)` report a socket as readable only when `bytes` bytes have arrived, the stream has ended, or
/// the socket can hold no more. The caller must know that this many bytes will come; otherwise its wait may
/// never end.
///
/// # Errors
/// The errors of `setsockopt(2)`.
pub(crate) fn set_low_water(socket: impl AsFd, bytes: usize) -> io::Result<()> {
    let value = c_int::try_from(bytes).unwrap_or(c_int::MAX);
    // SAFETY: SO_RCVLOWAT takes a c_int. The pointer is to a c_int, with its size, and the kernel only reads
    // it during the call. The descriptor is borrowed, so it is open.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const value).cast(),
            INT_BYTES,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

// The size of a c_int fits into this type.
#[allow(clippy::cast_possible_truncation)]
const INT_BYTES: libc::socklen_t = size_of::<c_int>() as libc::socklen_t;
