//! Notices that files were written or replaced.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

/// Files, and facts about them that change when one of them is written or replaced.
#[derive(Clone, Debug)]
pub struct Watch {
    files: Vec<PathBuf>,
    before: Vec<Mark>,
}

/// Inode, length, and the time of the last change in seconds and nanoseconds; `None` if there is no such file.
type Mark = Option<(u64, u64, i64, i64)>;

impl Watch {
    /// Looks at the files for the first time. Call it before the files are read: a change between a reading and the first
    /// look would be missed.
    pub fn new(files: Vec<PathBuf>) -> Self {
        let before = marks(&files);
        Self { files, before }
    }

    /// Returns true if there is no file to watch.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Calls `read` when a file has changed, and at each SIGHUP. Runs until it is dropped.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn run(mut self, mut read: impl FnMut()) {
        let mut hangup = signal(SignalKind::hangup()).ok();
        loop {
            let asked = async {
                match &mut hangup {
                    Some(hangup) => drop(hangup.recv().await),
                    None => std::future::pending().await,
                }
            };
            let asked = tokio::time::timeout(LOOK_EVERY, asked).await.is_ok();
            let now = marks(&self.files);
            if asked || now != self.before {
                self.before = now;
                read();
            }
        }
    }
}

fn marks(files: &[PathBuf]) -> Vec<Mark> {
    let mark = |path| {
        let file = std::fs::metadata(path).ok()?;
        Some((file.ino(), file.len(), file.mtime(), file.mtime_nsec()))
    };
    files.iter().map(mark).collect()
}

/// Time between two looks at the files.
const LOOK_EVERY: Duration = Duration::from_secs(2);
