//! Keeps the references of this process into shared memory apart from each other.

use std::ops::Range;
use std::sync::{Condvar, Mutex, PoisonError};

/// The ranges of a buffer to which Rust references exist now.
#[derive(Debug, Default)]
pub(super) struct Lent {
    now: Mutex<Vec<(Range<usize>, Use)>>,
    returned: Condvar,
}

/// The kind of a reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// Any number of readers may have the same bytes.
    Read,
    /// A writer has its bytes alone.
    Write,
}

/// A range that is lent until this value is dropped.
#[derive(Debug)]
pub(super) struct Loan<'a> {
    lent: &'a Lent,
    range: Range<usize>,
    kind: Use,
}

impl Lent {
    /// Waits until no reference contradicts the new one. References live for one pass over at most a few hundred KiB, so
    /// the wait is short.
    pub(super) fn take(&self, range: Range<usize>, kind: Use) -> Loan<'_> {
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        let clashes = |(other, used): &(Range<usize>, Use)| {
            (kind == Use::Write || *used == Use::Write)
                && other.start < range.end
                && range.start < other.end
        };
        while now.iter().any(clashes) {
            let waited = self.returned.wait(now);
            now = waited.unwrap_or_else(PoisonError::into_inner);
        }
        now.push((range.clone(), kind));
        Loan {
            lent: self,
            range,
            kind,
        }
    }
}

impl Drop for Loan<'_> {
    fn drop(&mut self) {
        let now = self.lent.now.lock();
        let mut now = now.unwrap_or_else(PoisonError::into_inner);
        let own = |(range, kind): &(Range<usize>, Use)| *range == self.range && *kind == self.kind;
        if let Some(at) = now.iter().position(own) {
            now.swap_remove(at);
        }
        self.lent.returned.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn a_writer_is_alone_and_readers_are_not() {
        let lent = Lent::default();
        let first = lent.take(0..10, Use::Read);
        drop(lent.take(5..15, Use::Read));
        drop(lent.take(10..20, Use::Write));
        let returned = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _loan = lent.take(9..11, Use::Write);
                assert!(returned.load(Ordering::SeqCst), "the reader was first");
            });
            std::thread::yield_now();
            returned.store(true, Ordering::SeqCst);
            drop(first);
        });
        assert!(lent.now.lock().unwrap().is_empty());
    }
}
