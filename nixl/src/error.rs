//! NIXL's statuses as errors.

use nixl_sys::nixl_capi_status as Status;

/// A failed call. The C API returns one status for most causes and writes the details to standard
/// error, so this error cannot say more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The parameters do not fit together. A second call with the same parameters would fail too.
    #[error("nixl {call}: invalid parameters")]
    Invalid {
        /// The C function, without the prefix `nixl_capi_`.
        call: &'static str,
    },
    /// The peer's metadata is not loaded (NIXL may have dropped it), or the memory is not registered.
    #[error("nixl {call}: metadata not loaded or memory not registered")]
    NotFound {
        /// The C function, without the prefix `nixl_capi_`.
        call: &'static str,
    },
    /// The backend failed. Most often the peer process has ended.
    #[error(
        "nixl {call}: the backend failed (the peer has ended, or UCX_TLS allows no transport to it)"
    )]
    Backend {
        /// The C function, without the prefix `nixl_capi_`.
        call: &'static str,
    },
    /// The C API returned an unexpected status.
    #[error("nixl {call}: status {status}")]
    Status {
        /// The C function, without the prefix `nixl_capi_`.
        call: &'static str,
        /// The status that the function returned.
        status: i32,
    },
    /// The library did not find the backend's plugin.
    #[error("nixl found no {plugin} plugin in plugins/ beside libnixl.so, or in NIXL_PLUGIN_DIR")]
    NoPlugin {
        /// The backend's name.
        plugin: String,
    },
    /// An earlier transfer on this connection failed. The caller must load the metadata again.
    #[error("the nixl connection to {agent} has failed")]
    Broken {
        /// The peer's agent name.
        agent: String,
    },
    /// Other metadata with the same name is already loaded and in use. Each agent has a new name at each
    /// start, so one of the two peers uses another agent's name.
    #[error("another nixl peer is connected under the agent name {agent}")]
    Taken {
        /// The name that both peers use.
        agent: String,
    },
    /// The connection has failed, and it cannot be replaced before its transfers have ended.
    #[error("{running} transfers of the failed nixl connection to {agent} have not ended")]
    Busy {
        /// The peer's agent name.
        agent: String,
        /// Number of transfers that have not ended.
        running: usize,
    },
}

/// Converts the status of a call into a result, for calls that never return "in progress".
pub(crate) fn check(call: &'static str, status: Status) -> Result<(), Error> {
    match status {
        Status::NIXL_CAPI_DONE => Ok(()),
        other => Err(error(call, other)),
    }
}

/// Converts a status other than "done" into an error.
pub(crate) fn error(call: &'static str, status: Status) -> Error {
    match status {
        Status::NIXL_CAPI_INVALID_PARAMETER => Error::Invalid { call },
        Status::NIXL_CAPI_NOT_FOUND => Error::NotFound { call },
        Status::NIXL_CAPI_BACKEND => Error::Backend { call },
        Status(status) => Error::Status { call, status },
    }
}
