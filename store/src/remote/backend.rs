//! The interface of the engines behind a remote store. Each engine has a file of its own.

use std::fmt::Debug;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;

/// A distributed store of bytes. Its futures may be dropped at any time, and have no bound of their own: the caller sets
/// one.
pub(super) trait Backend: Debug + Send + Sync {
    /// Returns the value of a name, or `None` if there is none. A value above `most` bytes may come back cut.
    fn get<'a>(
        &'a self,
        name: &'a str,
        most: usize,
    ) -> BoxFuture<'a, Result<Option<Bytes>, BackendError>>;

    /// Puts a value of two parts, and replaces an older one. The backend may forget the value after `life`.
    fn put<'a>(
        &'a self,
        name: &'a str,
        parts: [Bytes; 2],
        life: Option<Duration>,
    ) -> BoxFuture<'a, Result<(), BackendError>>;
}

/// A request that failed: its cause as text. The caller counts all failures alike, because none of them says anything
/// about the value.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct BackendError(pub(super) String);

impl BackendError {
    /// Makes an error from an error of a library, with all its causes.
    pub(super) fn new(error: &dyn std::error::Error) -> Self {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            let more = error.to_string();
            // Some libraries repeat the cause in their own text.
            if !text.contains(&more) {
                text.push_str(": ");
                text.push_str(&more);
            }
            cause = error.source();
        }
        Self(text)
    }
}
