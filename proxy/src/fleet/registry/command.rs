//! What other tasks ask of the task that owns the registry.

use tokio::sync::oneshot;

use crate::fleet::instance::Instance;

/// Something that the registration task is asked to do.
#[derive(Debug)]
pub(crate) enum Command {
    /// Take this instance in.
    Name(Box<Instance>, oneshot::Sender<Result<(), String>>),
    /// These are all that other proxies have written.
    Share(Vec<Instance>),
    /// Forget this one. Answers whether it was there.
    Remove(String, oneshot::Sender<bool>),
    /// Give this one no new requests, or give it some again. Answers whether it is there.
    Drain(String, bool, oneshot::Sender<bool>),
}
