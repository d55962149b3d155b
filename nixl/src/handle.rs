//! Handles and strings that the C API gives to its caller.

use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr::{self, NonNull};

use nixl_sys::nixl_capi_status;

use crate::error::{Error, check};

/// Returns the handle that a constructor of the C API wrote.
pub(crate) fn made<T>(
    call: &'static str,
    create: impl FnOnce(*mut *mut T) -> nixl_capi_status,
) -> Result<NonNull<T>, Error> {
    let mut handle = ptr::null_mut();
    check(call, create(&mut handle))?;
    NonNull::new(handle).ok_or(Error::Status { call, status: 0 })
}

/// Converts `text` for the C API; fails if `text` contains a NUL byte.
pub(crate) fn c_string(call: &'static str, text: &str) -> Result<CString, Error> {
    CString::new(text).map_err(|_| Error::Invalid { call })
}

/// Copies a string that the C API allocated, and frees the original.
pub(crate) fn take_string(text: NonNull<c_char>) -> CString {
    // SAFETY: the C API returns a NUL-terminated string that belongs to the caller.
    let copy = unsafe { CStr::from_ptr(text.as_ptr()) }.to_owned();
    // SAFETY: the library allocated the string with malloc; it is freed once.
    unsafe { libc::free(text.as_ptr().cast::<c_void>()) };
    copy
}

/// Destroys a handle on drop, unless [`Undo::keep`] was called.
///
/// A constructor that makes several handles wraps each handle, so that a later failure leaks no
/// handle.
pub(crate) struct Undo<T, F: FnMut(*mut T)>(NonNull<T>, Option<F>);

impl<T, F: FnMut(*mut T)> Undo<T, F> {
    pub(crate) fn new(handle: NonNull<T>, destroy: F) -> Self {
        Self(handle, Some(destroy))
    }

    pub(crate) fn get(&self) -> *mut T {
        self.0.as_ptr()
    }

    pub(crate) fn keep(mut self) -> NonNull<T> {
        self.1 = None;
        self.0
    }
}

impl<T, F: FnMut(*mut T)> Drop for Undo<T, F> {
    fn drop(&mut self) {
        if let Some(mut destroy) = self.1.take() {
            destroy(self.0.as_ptr());
        }
    }
}
