//! The journal of the events at the scripted engines, in order.

use std::sync::Mutex;

use tokio::sync::Notify;
use tokio::time::timeout;

/// Lines such as `p prefill` or `d left`.
#[derive(Default)]
pub struct Journal {
    lines: Mutex<Vec<String>>,
    news: Notify,
}

impl Journal {
    pub fn write(&self, line: String) {
        self.lines.lock().unwrap().push(line);
        self.news.notify_waiters();
    }

    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap().clone()
    }

    pub fn has(&self, line: &str) -> bool {
        self.lines().iter().any(|l| l == line)
    }

    /// Waits for a line.
    pub async fn until(&self, line: &str) {
        let wait = async {
            loop {
                let news = self.news.notified();
                if self.has(line) {
                    return;
                }
                news.await;
            }
        };
        let in_time = timeout(super::PATIENCE, wait).await.is_ok();
        assert!(in_time, "no {line:?} in {:?}", self.lines());
    }
}
