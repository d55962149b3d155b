//! Sends over one connection: a thread turns jobs into frames and answers into outcomes.
//!
//! # The outcome of a failed write
//! [`Outcome::Failed`] has `terminal: true` only if no byte can still arrive: the job was never begun, or the
//! receiver refused the job because the gate was closed. If a job was begun and has no answer, its outcome is
//! `terminal: false`, even if the connection was closed. The job's bytes may be in this kernel's queue, on the
//! network, or in the receiver's queue, and the receiver's thread lets the bytes land until the gate is
//! closed. After an error this module resets the connection. The reset drops the bytes in this side's queue,
//! but proves nothing about the receiver's queue. `terminal: false` costs nothing over this wire: the sender
//! reports the slots as dirty, and the receiver closes them. After the slots are closed no byte can arrive, so
//! the receiver can use the slots again at once.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use protocol::LeaseId;
use rustix::event::{PollFd, PollFlags};
use rustix::net::{SendFlags, send, sockopt};

use super::batch::Ticket;
use super::frame::{Answer, Part, Write};
use super::protected_writer::Protected;
use super::seal::{Seals, TAG_BYTES};
use super::socket::{Waker, poll_for};
use crate::memory::{Buffer, Outlet};
use crate::transport::readiness::{LOOK, sleep_exactly};
use crate::transport::{Outcome, Readiness, Ready};

/// The handle of one sending connection. When the handle is dropped, the thread finishes its jobs, each within
/// the job's stall time, and ends.
#[derive(Debug)]
pub(super) struct ConnectionWriter {
    queue: Arc<Queue>,
}

/// One frame to send.
#[derive(Debug)]
pub(super) struct Job {
    /// The readiness of the job's bytes; the job begins only when they are ready.
    pub(super) ready: Ready,
    /// The time at which the job was posted.
    pub(super) queued: Instant,
    pub(super) lease: LeaseId,
    /// The ranges to send, at most [`super::frame::MAX_PIECES`].
    pub(super) sources: Vec<Source>,
    pub(super) ticket: Ticket,
}

/// A range of the send buffer and its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Source {
    /// The range's first byte, as an offset in the send buffer.
    pub(super) from: u64,
    pub(super) to: Part,
}

#[derive(Debug)]
struct Queue {
    waker: Waker,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Open(VecDeque<Job>),
    /// The handle was dropped. Queued jobs are still sent.
    Closing(VecDeque<Job>),
    /// The connection is lost. Holds the reason.
    Dead(String),
}

impl ConnectionWriter {
    /// Starts the thread of a connection that the receiver has welcomed.
    pub(super) fn start(
        socket: TcpStream,
        seals: Option<Seals>,
        buffer: Arc<Buffer>,
        stall: Duration,
        name: &str,
    ) -> io::Result<Self> {
        let queue = Arc::new(Queue {
            waker: Waker::new()?,
            state: Mutex::new(State::Open(VecDeque::new())),
        });
        let on_gpu = buffer.cuda().is_some();
        let worker = Worker {
            socket,
            outlet: Outlet::new(buffer)?,
            stall,
            queue: Arc::clone(&queue),
            sending: None,
            unanswered: VecDeque::new(),
            protected: seals.map(Protected::new),
            answer: [0; Answer::BYTES + TAG_BYTES],
            answered: 0,
            batch: 0,
            progress: Instant::now(),
            awaiting: false,
        };
        let name = name.to_owned();
        thread::Builder::new()
            .name("tcp-send".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                if on_gpu {
                    sleep_exactly();
                }
                worker.run(&name);
            })?;
        Ok(Self { queue })
    }

    /// Returns true if the connection is lost.
    pub(super) fn is_dead(&self) -> bool {
        matches!(&*self.queue.lock(), State::Dead(_))
    }

    /// Queues a job. The job's ticket receives the outcome.
    pub(super) fn post(&self, job: Job) {
        let refused = match &mut *self.queue.lock() {
            State::Open(jobs) if jobs.len() < MAX_QUEUED => {
                jobs.push_back(job);
                self.queue.waker.wake();
                return;
            }
            State::Open(_) | State::Closing(_) => format!("{MAX_QUEUED} writes are waiting"),
            State::Dead(why) => format!("the connection has ended: {why}"),
        };
        job.ticket.settle(Outcome::Failed {
            terminal: true,
            error: refused,
        });
    }
}

impl Drop for ConnectionWriter {
    fn drop(&mut self) {
        let mut state = self.queue.lock();
        if let State::Open(jobs) = &mut *state {
            *state = State::Closing(std::mem::take(jobs));
        }
        self.queue.waker.wake();
    }
}

impl Queue {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Worker {
    socket: TcpStream,
    outlet: Outlet,
    stall: Duration,
    queue: Arc<Queue>,
    sending: Option<Sending>,
    /// Batches that were begun and have no answer yet, in order. A part of the last batch may still be
    /// unsent.
    unanswered: VecDeque<(u64, Ticket)>,
    /// The protection of both directions; `None` if the data is plain.
    protected: Option<Protected>,
    answer: [u8; Answer::BYTES + TAG_BYTES],
    answered: usize,
    batch: u64,
    /// The last time at which bytes were sent or an answer came.
    progress: Instant,
    /// True if a queued job waits for its bytes.
    awaiting: bool,
}

/// A frame that is partly sent.
struct Sending {
    head: Vec<u8>,
    head_sent: usize,
    sources: std::vec::IntoIter<Source>,
    now: Option<Source>,
    sent: u64,
}

/// The result of a send: `All` if the socket accepted all bytes, `Blocked` if the socket is full.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pushed {
    All,
    Blocked,
}

impl Worker {
    fn run(mut self, name: &str) {
        let end = self.serve();
        let why = match end {
            Ok(()) => "closed by this side".to_owned(),
            Err(error) => {
                tracing::warn!(link = name, %error, "tcp link lost");
                // The socket closes with a reset instead of an orderly end, so that the kernel drops the bytes
                // that it has not sent yet.
                let _ = sockopt::set_socket_linger(&self.socket, Some(Duration::ZERO));
                error.to_string()
            }
        };
        let never_begun = match std::mem::replace(&mut *self.queue.lock(), State::Dead(why.clone()))
        {
            State::Open(jobs) | State::Closing(jobs) => jobs,
            State::Dead(_) => VecDeque::new(),
        };
        drop(self.socket);
        for (_, ticket) in self.unanswered {
            ticket.settle(Outcome::Failed {
                terminal: false,
                error: why.clone(),
            });
        }
        for job in never_begun {
            job.ticket.settle(Outcome::Failed {
                terminal: true,
                error: why.clone(),
            });
        }
    }

    /// Sends and reads answers until the handle is dropped and every batch is answered.
    fn serve(&mut self) -> io::Result<()> {
        loop {
            self.begin();
            if self.finished() {
                return Ok(());
            }
            // The answers are read before a failed send is reported, because the receiver's refusal explains
            // the failure better.
            let pushed = self.push();
            self.listen()?;
            let pushed = pushed?;
            if pushed == Pushed::Blocked || !self.begin() {
                self.wait(pushed)?;
            }
        }
    }

    fn finished(&self) -> bool {
        self.sending.is_none()
            && self.unanswered.is_empty()
            && matches!(&*self.queue.lock(), State::Closing(jobs) if jobs.is_empty())
    }

    /// Begins the next job, if there is one and the pipeline has room. Returns true if this call has begun a
    /// job.
    fn begin(&mut self) -> bool {
        if self.sending.is_some() || self.unanswered.len() >= MAX_UNANSWERED {
            return false;
        }
        let Some(job) = self.next_job() else {
            return false;
        };
        self.outlet.begin();
        if self.unanswered.is_empty() {
            self.progress = Instant::now();
        }
        self.batch += 1;
        let parts: Vec<Part> = job.sources.iter().map(|source| source.to).collect();
        let head = Write {
            // A job has at most `MAX_PIECES` parts.
            parts: u32::try_from(parts.len()).unwrap_or(u32::MAX),
            batch: self.batch,
            lease: job.lease,
        };
        let mut sources = job.sources.into_iter();
        let mut head = head.encode(&parts);
        if let Some(protected) = &mut self.protected {
            protected.seals.out.sign(&mut head);
        }
        self.sending = Some(Sending {
            head,
            head_sent: 0,
            now: sources.next(),
            sources,
            sent: 0,
        });
        self.unanswered.push_back((self.batch, job.ticket));
        true
    }

    /// Takes the first job that is ready, and fails the jobs that will never be ready.
    fn next_job(&mut self) -> Option<Job> {
        self.awaiting = false;
        let mut queue = self.queue.lock();
        let (State::Open(jobs) | State::Closing(jobs)) = &mut *queue else {
            return None;
        };
        let mut at = 0;
        while let Some(job) = jobs.get_mut(at) {
            let error = match job.ready.look() {
                Readiness::There => return jobs.remove(at),
                Readiness::NotYet if job.queued.elapsed() < self.stall => {
                    self.awaiting = true;
                    at += 1;
                    continue;
                }
                Readiness::NotYet => format!("not ready within {:?}", self.stall),
                Readiness::Never(why) => why,
            };
            if let Some(job) = jobs.remove(at) {
                let terminal = true;
                job.ticket.settle(Outcome::Failed { terminal, error });
            }
        }
        None
    }

    /// Sends as many bytes as the socket accepts.
    fn push(&mut self) -> io::Result<Pushed> {
        let Some(sending) = &mut self.sending else {
            return Ok(Pushed::All);
        };
        let outlet = &mut self.outlet;
        let protected = self.protected.as_mut();
        let result = sending.push(&self.socket, outlet, protected, &mut self.progress);
        match result {
            Ok(()) => {
                self.sending = None;
                Ok(Pushed::All)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Pushed::Blocked),
            Err(error) => Err(error),
        }
    }

    /// Reads the answers that have come.
    fn listen(&mut self) -> io::Result<()> {
        let whole = match &self.protected {
            Some(_) => Answer::BYTES + TAG_BYTES,
            None => Answer::BYTES,
        };
        loop {
            match (&self.socket).read(&mut self.answer[self.answered..whole]) {
                Ok(0) => return Err(io::Error::other("the receiver closed the connection")),
                Ok(n) => self.answered += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if self.answered == whole {
                self.answered = 0;
                self.progress = Instant::now();
                self.settle()?;
            }
        }
    }

    /// Gives the answered batch its outcome.
    fn settle(&mut self) -> io::Result<()> {
        let nonsense = || io::Error::other("the receiver's answer is not valid");
        let (answer, tag) = self.answer.split_at(Answer::BYTES);
        if let Some(protected) = &mut self.protected
            && protected.seals.back.check(answer, tag).is_err()
        {
            let text = "an answer's tag is wrong: it was changed, repeated or reordered on the way";
            return Err(io::Error::other(text));
        }
        let answer = answer.first_chunk().and_then(Answer::decode);
        let (batch, outcome) = match answer {
            Some(Answer::Landed { batch }) => (batch, Outcome::Done),
            Some(Answer::Refused { batch: 0, why }) => return Err(io::Error::other(why)),
            Some(Answer::Refused { batch, why }) => {
                let error = why.to_string();
                (
                    batch,
                    Outcome::Failed {
                        terminal: true,
                        error,
                    },
                )
            }
            Some(Answer::Welcome) | None => return Err(nonsense()),
        };
        if self.unanswered.front().map(|(front, _)| *front) != Some(batch) {
            return Err(nonsense());
        }
        let half_sent = self.sending.is_some() && self.unanswered.len() == 1;
        match (self.unanswered.pop_front(), outcome) {
            // If the receiver refuses a batch before it has read the whole batch, the receiver is about to
            // close the connection.
            (Some((_, ticket)), outcome @ Outcome::Failed { .. }) if half_sent => {
                let error = io::Error::other(format!("{outcome:?}"));
                ticket.settle(outcome);
                Err(error)
            }
            (Some(_), Outcome::Done) if half_sent => Err(nonsense()),
            (Some((_, ticket)), outcome) => {
                ticket.settle(outcome);
                Ok(())
            }
            (None, _) => Err(nonsense()),
        }
    }

    /// Waits until the socket has room, an answer comes, or a job comes. While a batch has no answer, waits
    /// for at most the stall time.
    fn wait(&self, pushed: Pushed) -> io::Result<()> {
        let patience = if self.unanswered.is_empty() {
            None
        } else {
            let left = self.stall.saturating_sub(self.progress.elapsed());
            if left.is_zero() {
                let text = format!("no progress for {:?}", self.stall);
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            Some(left)
        };
        let patience = if self.awaiting {
            Some(patience.map_or(LOOK, |left| left.min(LOOK)))
        } else {
            patience
        };
        let interest = match pushed {
            Pushed::All => PollFlags::IN,
            Pushed::Blocked => PollFlags::IN | PollFlags::OUT,
        };
        let mut fds = [
            PollFd::new(&self.socket, interest),
            PollFd::new(&self.queue.waker, PollFlags::IN),
        ];
        poll_for(&mut fds, patience)?;
        if !fds[1].revents().is_empty() {
            self.queue.waker.clear();
        }
        Ok(())
    }
}

impl Sending {
    /// Sends until everything is sent or an error comes; `WouldBlock` means that the socket is full.
    fn push(
        &mut self,
        socket: &TcpStream,
        outlet: &mut Outlet,
        mut protected: Option<&mut Protected>,
        progress: &mut Instant,
    ) -> io::Result<()> {
        while self.head_sent < self.head.len() {
            // More bytes follow, so the head must not be sent in a segment of its own.
            let flags = SendFlags::MORE | SendFlags::NOSIGNAL;
            match send(socket, &self.head[self.head_sent..], flags) {
                Ok(n) => self.head_sent += n,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            *progress = Instant::now();
        }
        while let Some(source) = self.now {
            let left = source.to.bytes - self.sent;
            let from = source.from + self.sent;
            let result = match &mut protected {
                Some(protected) => {
                    let last = self.sources.len() == 0;
                    protected.send(socket, outlet, from, left, last, progress)
                }
                None => {
                    let want =
                        usize::try_from(left).map_or(SEND_BYTES, |left| left.min(SEND_BYTES));
                    outlet.send(socket, from, want)
                }
            };
            match result {
                Ok(n) => {
                    self.sent += n as u64;
                    *progress = Instant::now();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if self.sent == source.to.bytes {
                self.now = self.sources.next();
                self.sent = 0;
            }
        }
        Ok(())
    }
}

/// Maximum number of jobs that wait on one connection. The sender machine has far fewer transfers in flight.
const MAX_QUEUED: usize = 4096;
/// Maximum number of batches without an answer. The number is large enough that small writes need not wait for
/// a round trip.
const MAX_UNANSWERED: usize = 64;
/// Bytes of one send call. Answers are read only between two calls.
const SEND_BYTES: usize = 1 << 20;
const STACK_BYTES: usize = 256 << 10;
