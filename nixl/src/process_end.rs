//! The end of a process that may have loaded NIXL.

/// Ends this process with an exit code, and runs no destructor of any loaded library.
///
/// NIXL, UCX and the libraries below them stay loaded until the end. If the process has a second copy of one of these
/// libraries, for example through `LD_PRELOAD`, their destructors can crash. An end without a fault would then look like
/// a crash to whatever has started the process. The kernel frees all that the destructors would free.
///
/// The caller flushes what Rust has buffered. This function flushes the streams of the C library: UCX writes its log to
/// `stdout`, and without the flush nothing of it would reach a pipe.
pub fn end_process(code: u8) -> ! {
    // SAFETY: a null pointer means all open streams. The threads that remain may write to them at the same time, because
    // the C library locks each stream.
    unsafe { libc::fflush(std::ptr::null_mut()) };
    // SAFETY: the function takes a number, has no other precondition, and does not return.
    unsafe { libc::_exit(code.into()) }
}
