//! When the bytes of a write stand in the send buffer.

use std::fmt;
use std::num::NonZero;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::memory::cuda::{Event, State};

/// When a write may read the send buffer. A transport looks at it on its own thread, and posts nothing
/// before; it bounds the wait by the time that a write may stand still.
///
/// Looking, instead of having the GPU wait: an engine that is killed before its GPU gets to the event
/// never fires it, and a copy that the GPU has queued behind it can be neither cancelled nor proven
/// harmless. What a look costs is [`LOOK`].
#[derive(Clone, Debug, Default)]
pub(crate) struct Ready {
    /// Absent once they do.
    after: Option<Arc<dyn Signal>>,
    times: Arc<Times>,
}

/// What a transport's thread has noted of a write, for who measures it.
#[derive(Debug, Default)]
pub(crate) struct Times {
    began: OnceLock<Instant>,
    ended: OnceLock<Instant>,
    lasting: Notify,
}

/// Something that says when bytes stand.
pub(crate) trait Signal: Send + Sync + fmt::Debug {
    /// How it is now.
    fn readiness(&self) -> Readiness;
}

/// Whether bytes stand where they should.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Readiness {
    /// Yes.
    There,
    /// Not yet.
    NotYet,
    /// They never will, or nobody will ever know.
    Never(String),
}

impl Ready {
    /// They do.
    pub(crate) fn now() -> Self {
        Self::default()
    }

    /// Once `signal` says so.
    pub(crate) fn after(signal: Arc<dyn Signal>) -> Self {
        Self {
            after: Some(signal),
            times: Arc::default(),
        }
    }

    /// How it is now. What is there stays there.
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

    /// How it is in the end, within `bound`: for who has no thread of a transport to look.
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
                // The runtime's timers are no finer.
                Readiness::NotYet => tokio::time::sleep(Duration::from_millis(1)).await,
                readiness => return readiness,
            }
        }
    }

    /// Whether it may be another answer next time.
    pub(crate) fn is_pending(&self) -> bool {
        self.after.is_some()
    }

    /// Nobody asks any more.
    pub(crate) fn forget(&mut self) {
        self.after = None;
    }

    /// The write is posted and has not ended, and its wire may need the receiver's help.
    pub(crate) fn lasts(&self) {
        self.times.lasting.notify_one();
    }

    /// The write has ended.
    pub(crate) fn end(&self) {
        self.times.ended.get_or_init(Instant::now);
    }

    /// What will have been noted once the write has ended.
    pub(crate) fn times(&self) -> Arc<Times> {
        Arc::clone(&self.times)
    }
}

impl Times {
    /// When the bytes were first seen in their slots.
    pub(crate) fn began(&self) -> Option<Instant> {
        self.began.get().copied()
    }

    /// Completes when the write lasts; see [`Ready::lasts`].
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub(crate) async fn lasting(&self) {
        self.lasting.notified().await;
    }

    /// When the wire was done.
    pub(crate) fn ended(&self) -> Option<Instant> {
        self.ended.get().copied()
    }
}

impl Signal for Event {
    fn readiness(&self) -> Readiness {
        let state = self.state();
        // Asked last: an event may seem to have fired because its owner died.
        if self.is_orphaned() {
            return Readiness::Never("the engine that was to fill the slots has gone".to_owned());
        }
        match state {
            Ok(State::Fired) => Readiness::There,
            Ok(State::Pending) => Readiness::NotYet,
            Err(error) => Readiness::Never(format!("the engine's event failed: {error}")),
        }
    }
}

/// Time between two looks: a hundredth of the push of a long prompt. A look costs under 1 µs, and this
/// pace a few hundredths of a core, only while a GPU computes what is to be pushed.
pub(crate) const LOOK: Duration = Duration::from_micros(20);

/// Lets the calling thread sleep as short as [`LOOK`]: the kernel adds 50 µs otherwise.
pub(crate) fn sleep_exactly() {
    let slack = NonZero::new(1_000);
    if let Err(error) = rustix::thread::set_current_timer_slack(slack) {
        tracing::debug!(%error, "timer slack not set");
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

    /// Every transport: a write that is not ready holds nobody up, goes when it is, and is ended, with
    /// nothing sent, when it never will be. `stall` is the link's.
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
