//! The registration ports, and the errors of binding and reading them.

use std::net::SocketAddr;

use common::identity::{Identity, Role};
use common::zmq::{self, Closed, Inbox, Protection};
use protocol::registration::PROXY_NAME;

/// Error of a registration port: the port cannot be opened, or it has failed.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// The address could not be bound.
    #[error("cannot bind the registration port {address}: {text}")]
    Bind {
        /// The configured address.
        address: SocketAddr,
        /// The process that holds the port, or the error of the system.
        text: String,
    },
    /// The port's socket is closed.
    #[error("the registration port is closed: {0}")]
    Closed(#[from] Closed),
}

/// Binds the registration port of sidecars.
///
/// # Errors
/// The address is in use, does not belong to this host, or is not permitted.
pub(crate) async fn bind(
    address: SocketAddr,
    identity: Option<&Identity>,
) -> Result<Inbox, PortError> {
    let protection = Protection::of(identity, &[Role::Sender, Role::Receiver]);
    let port = Inbox::pull(PROXY_NAME, address, &protection).await;
    port.map_err(|error| failed(address, error))
}

/// Binds the port of P2P NCCL instances, which are DEALERs.
///
/// # Errors
/// The address is in use, does not belong to this host, or is not permitted.
pub(crate) async fn bind_p2p(address: SocketAddr) -> Result<Inbox, PortError> {
    let port = Inbox::router(address).await;
    port.map_err(|error| failed(address, error))
}

fn failed(address: SocketAddr, error: zmq::BindError) -> PortError {
    let text = match error {
        zmq::BindError::InUse { holder, .. } => format!("it is taken by {holder}"),
        zmq::BindError::Refused { cause, .. } => cause,
    };
    PortError::Bind { address, text }
}
