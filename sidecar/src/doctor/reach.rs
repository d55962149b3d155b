//! Connects to ports of other programs, with a bound for each step.

use std::future::Future;
use std::io::{ErrorKind, Read};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

use crate::config::HostPort;

/// The result of a connection attempt.
#[derive(Debug)]
pub(super) enum Reach {
    /// The port accepts connections.
    Open(TcpStream),
    /// The host answers that no process listens.
    Refused,
    /// Nothing answers: a firewall drops the packets, or the host is down.
    Silent,
    /// The name is unknown, or there is no route to the host.
    Nowhere(String),
}

/// Connects to a port. Tries each address of a name.
pub(super) fn connect(to: &HostPort) -> Reach {
    let addresses = match (to.host.as_str(), to.port).to_socket_addrs() {
        Ok(addresses) => addresses,
        Err(error) => return Reach::Nowhere(format!("{} cannot be resolved: {error}", to.host)),
    };
    let mut last = Reach::Nowhere(format!("{} has no address", to.host));
    for address in addresses {
        last = match TcpStream::connect_timeout(&address, BOUND) {
            Ok(stream) => return Reach::Open(stream),
            Err(error) => match error.kind() {
                ErrorKind::ConnectionRefused => Reach::Refused,
                ErrorKind::TimedOut | ErrorKind::WouldBlock => Reach::Silent,
                _ => Reach::Nowhere(format!("{address}: {error}")),
            },
        };
    }
    last
}

/// Returns true if the server speaks ZeroMQ: it then sends its greeting without being asked.
pub(super) fn greets(mut stream: TcpStream) -> bool {
    let mut first = [0; 1];
    stream.set_read_timeout(Some(BOUND)).is_ok()
        && stream.read_exact(&mut first).is_ok()
        && first[0] == ZMTP_SIGNATURE
}

/// Runs a future to its end. The caller bounds its time.
pub(super) fn block<T>(future: impl Future<Output = T>) -> Result<T, String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start the runtime: {error}"))?;
    Ok(runtime.block_on(future))
}

/// The time for a connection, and for an answer.
pub(super) const BOUND: Duration = Duration::from_secs(3);
/// The first byte of ZeroMQ's greeting.
const ZMTP_SIGNATURE: u8 = 0xff;
