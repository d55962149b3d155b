//! Tells transports when the bytes of a write are in the send buffer.

use std::fmt;
use std::num::NonZero;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::memory::cuda::{Event, State};

/// The event that a write waits for before it reads the send buffer. A transport checks on its own thread
/// whether the event has fired, and posts nothing before that. The stall time of writes limits the wait.
///
/// The transport polls for the event; it does not make the GPU wait. If an engine is killed before its GPU
/// reaches the event, the event never fires. If a copy were queued on the GPU behind the event, no process
/// could then cancel the copy, or prove that the copy will never run. [`LOOK`] gives the cost of a check.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ready {
    /// The signal that reports the state of the bytes; `None` once the bytes are in the buffer.
    after: Option<Arc<dyn Signal>>,
    times: Arc<Times>,
}

/// The times that a transport's thread notes about a write, for measurements.
#[derive(Debug, Default)]
pub(crate) struct Times {
    began: OnceLock<Instant>,
    ended: OnceLock<Instant>,
    lasting: Notify,
}

/// A source that tells whether the bytes of a write are in the send buffer.
pub(crate) trait Signal: Send + Sync + fmt::Debug {
    /// Returns the present state.
    fn readiness(&self) -> Readiness;
}

/// The state of a write's bytes in the send buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Readiness {
    /// The bytes are in the buffer.
    There,
    /// The bytes are not in the buffer yet.
    NotYet,
    /// The bytes will never be in the buffer, or their state can no longer be determined. Holds the reason.
    Never(String),
}

impl Ready {
    /// Creates a `Ready` for bytes that are already in the buffer.
    pub(crate) fn now() -> Self {
        Self::default()
    }

    /// Creates a `Ready` for bytes that are in the buffer once `signal` reports it.
    pub(crate) fn after(signal: Arc<dyn Signal>) -> Self {
        Self {
            after: Some(signal),
            times: Arc::default(),
        }
    }

    /// Returns the present state. Once the bytes are in the buffer, the state does not change any more.
    pub(crate) fn look(&mut self) -> Readiness {
        let readiness = match &self.after {
            None => Readiness::There,
            Some(signal) => signal.readiness(),
        };
        if readiness == Readiness::There {
            self.times.began.get_or_init(Instant::now);
            self.after = None;
        }
        readiness
    }

    /// Waits for the final state, at most for `bound`. Use this function only if no transport's thread polls
    /// the state.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub(crate) async fn stands(mut self, bound: Duration) -> Readiness {
        let until = Instant::now() + bound;
        loop {
            match self.look() {
                Readiness::NotYet if Instant::now() >= until => {
                    return Readiness::Never(format!("not ready within {bound:?}"));
                }
                // The runtime's timers have a granularity of a millisecond.
                Readiness::NotYet => tokio::time::sleep(Duration::from_millis(1)).await,
                readiness => return readiness,
            }
        }
    }

    /// Returns true if the state may still change.
    pub(crate) fn is_pending(&self) -> bool {
        self.after.is_some()
    }

    /// Drops the signal, because no caller needs the state any more.
    pub(crate) fn forget(&mut self) {
        self.after = None;
    }

    /// Notes that the write was posted and did not end at once. The write's wire may now need the receiver's
    /// help.
    pub(crate) fn lasts(&self) {
        self.times.lasting.notify_one();
    }

    /// Notes that the write has ended.
    pub(crate) fn end(&self) {
        self.times.ended.get_or_init(Instant::now);
    }

    /// Returns the times of the write, which are complete once the write has ended.
    pub(crate) fn times(&self) -> Arc<Times> {
        Arc::clone(&self.times)
    }
}

impl Times {
    /// Returns the time at which the bytes were first found in the send buffer; `None` before.
    pub(crate) fn began(&self) -> Option<Instant> {
        self.began.get().copied()
    }

    /// Completes when the transport has posted the write and the write did not end at once
    /// ([`Ready::lasts`]). Never completes for a write that ends at once.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub(crate) async fn lasting(&self) {
        self.lasting.notified().await;
    }

    /// Returns the time at which the wire had written everything; `None` before.
    pub(crate) fn ended(&self) -> Option<Instant> {
        self.ended.get().copied()
    }
}

impl Signal for Event {
    fn readiness(&self) -> Readiness {
        let state = self.state();
        // The owner is checked after the state: an event may seem to have fired because its owner died.
        if self.is_orphaned() {
            return Readiness::Never(
                "the engine disconnected before it had filled the slots".to_owned(),
            );
        }
        match state {
            Ok(State::Fired) => Readiness::There,
            Ok(State::Pending) => Readiness::NotYet,
            Err(error) => Readiness::Never(format!("the engine's event failed: {error}")),
        }
    }
}

/// The time between two checks: about 1 % of the time that the push of a long prompt takes. A check costs under
/// 1 µs, so the checks use a few percent of a core, and only while a GPU computes the KV to push.
pub(crate) const LOOK: Duration = Duration::from_micros(20);

/// Lets the calling thread sleep for times as short as [`LOOK`]; by default the kernel adds 50 µs.
pub(crate) fn sleep_exactly() {
    let slack = NonZero::new(1_000);
    if let Err(error) = rustix::thread::set_current_timer_slack(slack) {
        tracing::debug!(%error, "cannot set the timer slack");
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Mutex;

    use protocol::LeaseId;
    use protocol::sender::Piece;

    use super::*;
    use crate::transport::{Link, Outcome};

    /// A signal that a test sets.
    #[derive(Debug)]
    pub(crate) struct Switch(Mutex<Readiness>);

    impl Switch {
        pub(crate) fn new() -> Arc<Self> {
            Arc::new(Self(Mutex::new(Readiness::NotYet)))
        }

        pub(crate) fn set(&self, readiness: Readiness) {
            *self.0.lock().unwrap() = readiness;
        }
    }

    impl Signal for Switch {
        fn readiness(&self) -> Readiness {
            self.0.lock().unwrap().clone()
        }
    }

    /// Checks the rules for writes that are not ready, for any transport. A write that is not ready delays no
    /// other write, begins when it is ready, and fails without sending anything if it never becomes ready.
    /// `stall` is the link's stall time.
    pub(crate) async fn check(link: &dyn Link, lease: LeaseId, piece: Piece, stall: Duration) {
        let pieces = || vec![piece];
        let switch = Switch::new();
        let ready = Ready::after(Arc::clone(&switch) as Arc<dyn Signal>);
        let times = ready.times();
        let mut late = link.write_when(ready, lease, pieces());
        assert_eq!(link.write(lease, pieces()).await, Outcome::Done);
        tokio::select! {
            biased;
            outcome = &mut late => panic!("not ready: {outcome:?}"),
            () = tokio::time::sleep(Duration::from_millis(20)) => {}
        }
        assert!(times.began().is_none());
        switch.set(Readiness::There);
        assert_eq!(late.await, Outcome::Done);
        assert!(times.began().is_some());

        let gone = Switch::new();
        gone.set(Readiness::Never("gone".to_owned()));
        let long = format!("not ready within {stall:?}");
        for (signal, error) in [(gone, "gone"), (Switch::new(), &long)] {
            let write = link.write_when(Ready::after(signal), lease, pieces());
            let expect = Outcome::Failed {
                terminal: true,
                error: error.to_owned(),
            };
            assert_eq!(write.await, expect);
        }
        assert_eq!(link.write(lease, pieces()).await, Outcome::Done);
    }

    #[tokio::test]
    async fn a_look_from_the_runtime_ends_with_the_event_or_its_bound() {
        let bound = Duration::from_millis(50);
        let switch = Switch::new();
        let stands = |bound| Ready::after(Arc::clone(&switch) as Arc<dyn Signal>).stands(bound);
        assert!(matches!(stands(bound).await, Readiness::Never(_)));
        let (readiness, ()) = tokio::join!(stands(100 * bound), async {
            tokio::time::sleep(bound).await;
            switch.set(Readiness::There);
        });
        assert_eq!(readiness, Readiness::There);
        let gone = Readiness::Never("gone".to_owned());
        switch.set(gone.clone());
        assert_eq!(stands(bound).await, gone);
    }

    #[test]
    fn what_is_there_stays_there() {
        let switch = Switch::new();
        let mut ready = Ready::after(Arc::clone(&switch) as Arc<dyn Signal>);
        let times = ready.times();
        assert_eq!(ready.look(), Readiness::NotYet);
        assert!(times.began().is_none() && ready.is_pending());
        switch.set(Readiness::There);
        assert_eq!(ready.look(), Readiness::There);
        switch.set(Readiness::NotYet);
        assert_eq!(ready.look(), Readiness::There, "recorded anew since");
        assert!(times.began().is_some() && !ready.is_pending());
    }
}
