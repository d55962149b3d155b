//! NIXL's statuses as errors.

use nixl_sys::nixl_capi_status as Status;

/// A call that failed. The C API folds most causes into one status and logs the rest to standard
/// error, so that is all that can be told here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The parameters do not fit together; another try gives the same.
    #[error("nixl {call}: invalid parameters")]
    Invalid {
        /// The function, without its prefix.
        call: &'static str,
    },
    /// Metadata not loaded (or dropped meanwhile), or memory outside every registration.
    #[error("nixl {call}: metadata not loaded or memory not registered")]
    NotFound {
        /// The function, without its prefix.
        call: &'static str,
    },
    /// The backend failed: most often the peer is gone.
    #[error("nixl {call}: backend failed (peer gone, or no wire to it under this UCX_TLS)")]
    Backend {
        /// The function, without its prefix.
        call: &'static str,
    },
    /// A status that the C API is not known to give here.
    #[error("nixl {call}: status {status}")]
    Status {
        /// The function, without its prefix.
        call: &'static str,
        /// What it returned.
        status: i32,
    },
    /// The backend's plugin is not where the library looks for it.
    #[error(
        "nixl has no {plugin} plugin: it looks in plugins/ beside libnixl.so, or in NIXL_PLUGIN_DIR"
    )]
    NoPlugin {
        /// The backend.
        plugin: String,
    },
    /// An earlier transfer on this connection failed; load the metadata anew.
    #[error("the nixl connection to {agent} has failed")]
    Broken {
        /// The peer's agent name.
        agent: String,
    },
    /// Other metadata is loaded under the same name and in use. Agents have a new name at each start,
    /// so one of the two is not who it says it is.
    #[error("another nixl peer is connected under the agent name {agent}")]
    Taken {
        /// The name.
        agent: String,
    },
    /// The connection has failed and cannot be replaced before its transfers have ended.
    #[error("{running} transfers of the failed nixl connection to {agent} have not ended")]
    Busy {
        /// The peer's agent name.
        agent: String,
        /// How many.
        running: usize,
    },
}

/// Done or an error; for calls that cannot be in progress.
pub(crate) fn check(call: &'static str, status: Status) -> Result<(), Error> {
    match status {
        Status::NIXL_CAPI_DONE => Ok(()),
        other => Err(error(call, other)),
    }
}

pub(crate) fn error(call: &'static str, status: Status) -> Error {
    match status {
        Status::NIXL_CAPI_INVALID_PARAMETER => Error::Invalid { call },
        Status::NIXL_CAPI_NOT_FOUND => Error::NotFound { call },
        Status::NIXL_CAPI_BACKEND => Error::Backend { call },
        Status(status) => Error::Status { call, status },
    }
}
