//! The memory of which instance holds a stored response.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

/// The instances that hold the last stored responses, by the ids of the responses.
#[derive(Debug, Default)]
pub(crate) struct StoredResponses(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    holders: HashMap<String, String>,
    /// The ids of the responses, oldest first.
    order: VecDeque<String>,
}

impl StoredResponses {
    /// Notes that an instance holds a response. Forgets the oldest response if there are too many.
    pub(crate) fn remember(&self, id: &str, instance: &str) {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = table.holders.insert(id.to_owned(), instance.to_owned());
        if before.is_some() {
            return;
        }
        table.order.push_back(id.to_owned());
        if table.order.len() > MOST
            && let Some(oldest) = table.order.pop_front()
        {
            table.holders.remove(&oldest);
        }
    }

    /// Returns the id of the instance that holds a response; `None` if this proxy does not know it.
    pub(crate) fn holder(&self, id: &str) -> Option<String> {
        let table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        table.holders.get(id).cloned()
    }
}

/// Maximum number of responses that are remembered. An entry needs about 200 bytes.
const MOST: usize = 20_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_is_bounded() {
        let stored = StoredResponses::default();
        for number in 0..=MOST {
            stored.remember(&format!("resp_{number}"), "d");
        }
        assert_eq!(stored.holder("resp_0"), None);
        stored.remember("resp_1", "other");
        assert_eq!(stored.holder("resp_1").as_deref(), Some("other"));
        assert_eq!(stored.0.lock().unwrap().holders.len(), MOST);
    }
}
