//! Commands from other tasks to the task that owns the registry.

use tokio::sync::oneshot;

use crate::fleet::instance::Instance;

/// A command to the registration task.
#[derive(Debug)]
pub(crate) enum Command {
    /// Add this instance.
    Name(Box<Instance>, oneshot::Sender<Result<(), String>>),
    /// Replace the instances of other proxies by this complete list.
    Share(Vec<Instance>),
    /// Remove this instance. The answer is true if the instance was registered.
    Remove(String, oneshot::Sender<bool>),
    /// Drain this instance (true), or give it requests again (false). The answer is true if the
    /// instance is registered.
    Drain(String, bool, oneshot::Sender<bool>),
}
