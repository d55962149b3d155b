//! Joins the outcomes of several jobs into the outcome of one write.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::oneshot;

use crate::transport::Outcome;

/// The jobs of one write, with their common outcome.
#[derive(Debug)]
pub(super) struct Batch {
    left: AtomicUsize,
    result: Mutex<(Outcome, Option<oneshot::Sender<Outcome>>)>,
}

/// A job's share of a batch. A ticket that is dropped without an outcome counts as failed, and its bytes may
/// still arrive.
#[derive(Debug)]
pub(super) struct Ticket(Option<Arc<Batch>>);

impl Batch {
    /// Returns `jobs` tickets and the future of their common outcome. `jobs` must not be 0.
    pub(super) fn tickets(jobs: usize) -> (Vec<Ticket>, oneshot::Receiver<Outcome>) {
        let (done, outcome) = oneshot::channel();
        let batch = Arc::new(Self {
            left: AtomicUsize::new(jobs),
            result: Mutex::new((Outcome::Done, Some(done))),
        });
        let ticket = || Ticket(Some(Arc::clone(&batch)));
        ((0..jobs).map(|_| ticket()).collect(), outcome)
    }

    /// Adds the outcome of a job. If one job fails, the write fails. The write's failure is terminal only if
    /// every failed job has a terminal failure.
    fn settle(&self, outcome: Outcome) {
        let mut result = self.result.lock().unwrap_or_else(PoisonError::into_inner);
        let (sum, done) = &mut *result;
        match (&mut *sum, outcome) {
            (_, Outcome::Done) => {}
            (Outcome::Done, failed) => *sum = failed,
            (Outcome::Failed { terminal, .. }, Outcome::Failed { terminal: also, .. }) => {
                *terminal &= also;
            }
        }
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1
            && let Some(done) = done.take()
        {
            // The caller may no longer wait: see `Link::write_when`.
            drop(done.send(sum.clone()));
        }
    }
}

impl Ticket {
    pub(super) fn settle(mut self, outcome: Outcome) {
        if let Some(batch) = self.0.take() {
            batch.settle(outcome);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(batch) = self.0.take() {
            batch.settle(Outcome::Failed {
                terminal: false,
                error: "the sending thread ended without a result".to_owned(),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(terminal: bool) -> Outcome {
        Outcome::Failed {
            terminal,
            error: String::new(),
        }
    }

    #[test]
    fn a_write_is_as_good_as_its_worst_job() {
        for (jobs, expect) in [
            (vec![Outcome::Done], Outcome::Done),
            (vec![Outcome::Done, Outcome::Done], Outcome::Done),
            (vec![Outcome::Done, failed(true)], failed(true)),
            (
                vec![failed(true), failed(true), Outcome::Done],
                failed(true),
            ),
            (vec![failed(true), failed(false)], failed(false)),
            (vec![failed(false), failed(true)], failed(false)),
        ] {
            let (tickets, mut outcome) = Batch::tickets(jobs.len());
            for (ticket, job) in tickets.into_iter().zip(jobs) {
                assert!(outcome.try_recv().is_err(), "not before the last");
                ticket.settle(job);
            }
            assert_eq!(outcome.try_recv(), Ok(expect));
        }
    }

    #[test]
    fn a_job_that_is_lost_may_still_arrive() {
        let (tickets, mut outcome) = Batch::tickets(1);
        drop(tickets);
        let Ok(Outcome::Failed { terminal, .. }) = outcome.try_recv() else {
            panic!("it failed");
        };
        assert!(!terminal);
    }
}
