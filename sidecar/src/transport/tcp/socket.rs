//! Configures and polls sockets so that no thread blocks without a deadline.

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::sockopt;

/// Applies the socket settings that both ends need.
pub(super) fn prepare(socket: &TcpStream, stall: Duration) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    // Answers have 16 bytes, and the sender waits for them, so the kernel must not delay them.
    socket.set_nodelay(true)?;
    // On an idle connection, the kernel notices within a minute that the peer has vanished.
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, Duration::from_secs(30))?;
    sockopt::set_tcp_keepintvl(socket, Duration::from_secs(10))?;
    sockopt::set_tcp_keepcnt(socket, 3)?;
    // While bytes are in flight, the kernel notices within the stall time that the peer has vanished.
    let stall_ms = u32::try_from(stall.as_millis()).unwrap_or(u32::MAX);
    sockopt::set_tcp_user_timeout(socket, stall_ms)?;
    Ok(())
}

/// Waits until the socket has one of `events`, or has failed.
///
/// # Errors
/// `TimedOut` at `deadline`, or the error of `poll(2)`.
pub(super) fn wait(
    socket: impl AsFd,
    events: PollFlags,
    deadline: Option<Instant>,
) -> io::Result<()> {
    loop {
        let timeout = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        if timeout == Some(Duration::ZERO) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let mut fds = [PollFd::new(&socket, events)];
        if poll_for(&mut fds, timeout)? > 0 {
            return Ok(());
        }
    }
}

/// Calls `poll(2)` with a `Duration`. If a signal interrupts the call, no descriptor counts as ready.
pub(super) fn poll_for(fds: &mut [PollFd<'_>], timeout: Option<Duration>) -> io::Result<usize> {
    // A duration that is too long for the kernel is treated as no timeout.
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    match poll(fds, timeout.as_ref()) {
        Ok(ready) => Ok(ready),
        Err(Errno::INTR) => Ok(0),
        Err(error) => Err(error.into()),
    }
}

/// Wakes a thread that polls.
#[derive(Debug)]
pub(super) struct Waker(OwnedFd);

impl Waker {
    pub(super) fn new() -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self(eventfd(0, flags)?))
    }

    /// Makes the descriptor readable until it is cleared.
    pub(super) fn wake(&self) {
        // The write fails only if the counter is full, and then the descriptor is readable already.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    /// Clears the wake. The thread clears the wake before it looks for work, so that no wake is lost.
    pub(super) fn clear(&self) {
        // The read fails only if there was no wake.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}
