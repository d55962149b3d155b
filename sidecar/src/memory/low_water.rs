//! The one socket option of a landing buffer's sockets that no safe crate at hand offers.

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Lets `poll(2)` call a socket readable only once `bytes` are there, or the stream has ended, or the
/// socket can hold no more. Whoever waits must know that so much will come.
///
/// # Errors
/// Those of `setsockopt(2)`.
pub(crate) fn set_low_water(socket: impl AsFd, bytes: usize) -> io::Result<()> {
    let value = c_int::try_from(bytes).unwrap_or(c_int::MAX);
    // SAFETY: SO_RCVLOWAT takes a c_int; the pointer is to one, with its size, and the kernel only
    // reads it during the call. The descriptor is borrowed, so it is open.
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

// A c_int's size fits.
#[allow(clippy::cast_possible_truncation)]
const INT_BYTES: libc::socklen_t = size_of::<c_int>() as libc::socklen_t;
