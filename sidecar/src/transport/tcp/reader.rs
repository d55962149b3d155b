//! Receives from one connection: moves bytes from its socket into slots.

use std::cell::{Cell, RefCell};
use std::io::{self, Read, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::identity::PublicKey;
use protocol::LeaseId;
use rustix::event::PollFlags;

use super::counts::Counters;
use super::frame::{Answer, Part, Refusal, Write};
use super::handshake::Admission;
use super::pieces::{Rest, pieces};
use super::seal::{Forged, Seals, TAG_BYTES};
use super::slot_gate::{Pass, SlotGates, SlotLayout, Writer};
use super::socket::wait;
use crate::memory::{Buffer, Inlet, set_low_water};

/// The state that all connections of a receiver share.
#[derive(Debug)]
pub(super) struct Receiver {
    pub(super) buffer: Arc<Buffer>,
    pub(super) gates: SlotGates,
    pub(super) counters: Counters,
    /// The rules for connections.
    pub(super) admission: Admission,
    /// Time limit for the rest of a frame's head once the head has begun.
    pub(super) handshake: Duration,
    /// The connection ends if it makes no progress for this time while it receives a frame's bytes or sends an
    /// answer.
    pub(super) stall: Duration,
    /// A silent connection is closed after this time, unless its lease is open.
    pub(super) idle: Duration,
}

/// One connection after its hello was accepted.
#[derive(Debug)]
pub(super) struct Reader {
    pub(super) receiver: Arc<Receiver>,
    pub(super) socket: Arc<TcpStream>,
    pub(super) peer: SocketAddr,
    /// The lease of the last write that was admitted; 0 before the first write. A peer cannot guess a lease, so
    /// a peer that has used this lease is trusted while the lease is open.
    pub(super) shown: Arc<AtomicU64>,
    pub(super) writer: Writer,
    /// The key that the peer has proved; `None` if it has proved none.
    pub(super) key: Option<PublicKey>,
    /// The protection of both directions; `None` if the data is plain.
    pub(super) seals: RefCell<Option<Seals>>,
    /// The kernel wakes this thread only when this many bytes have come; 1 at first.
    pub(super) low_water: Cell<usize>,
}

/// The reason why a connection ends.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    #[error("closed between writes")]
    Closed,
    #[error("refused: {0}")]
    Refused(#[from] Refusal),
    #[error("broken: {0}")]
    Broken(#[from] io::Error),
}

impl From<Forged> for End {
    fn from(_: Forged) -> Self {
        Self::Refused(Refusal::Forged)
    }
}

impl Reader {
    /// Serves the connection until it ends. The call blocks: each connection has a thread of its own.
    pub(super) fn run(self) {
        let counters = &self.receiver.counters;
        let end = match Inlet::new(Arc::clone(&self.receiver.buffer)) {
            Ok(mut inlet) => loop {
                match self.frame(&mut inlet) {
                    Ok(()) => {}
                    Err(end) => break end,
                }
            },
            Err(error) => End::Broken(error),
        };
        match &end {
            End::Closed => {
                tracing::debug!(peer = %self.peer, "sender disconnected");
                return;
            }
            End::Refused(why) => counters.refuse(*why),
            End::Broken(_) => {
                counters.broken.fetch_add(1, Ordering::Relaxed);
            }
        }
        if let Some(dropped) = counters.log.allow(Instant::now()) {
            tracing::warn!(peer = %self.peer, %end, dropped, "tcp connection ended");
        }
        if matches!(end, End::Refused(_)) {
            self.part_ways();
        }
    }

    /// Receives one `Write`, from its head to the answer.
    fn frame(&self, inlet: &mut Inlet) -> Result<(), End> {
        let (write, parts) = self.head()?;
        let batch = write.batch;
        // A key may leave the roster while its connection is open.
        if self
            .key
            .is_some_and(|key| self.receiver.admission.permits(&key).is_none())
        {
            let why = Refusal::Key;
            self.answer(Answer::Refused { batch, why })?;
            return Err(why.into());
        }
        // The sum of valid parts may still overflow, but no slots can hold so many bytes.
        let bytes = parts
            .iter()
            .try_fold(0_u64, |sum, part| sum.checked_add(part.bytes))
            .ok_or(Refusal::Bounds)?;
        let tags: u64 = match &*self.seals.borrow() {
            Some(_) => parts.iter().map(|part| pieces(part.bytes)).sum(),
            None => 0,
        };
        // A fixed time for each frame would be too short for long frames, so the time grows with the bytes: 1
        // ms per KiB.
        let deadline = Instant::now() + self.receiver.stall + Duration::from_millis(bytes >> 10);
        let layout = self.receiver.gates.current();
        let admitted: Result<Vec<Pass>, Refusal> = parts
            .iter()
            .map(|part| layout.admit(write.lease, &self.writer, *part))
            .collect();
        let refused = match admitted {
            Ok(passes) => {
                self.shown.store(write.lease.0, Ordering::Relaxed);
                let mut seals = self.seals.borrow_mut();
                match seals.as_mut().map(|seals| &mut seals.back) {
                    Some(seal) => {
                        let mut rest = Rest { bytes, tags };
                        let landed =
                            self.land_protected(inlet, seal, &layout, &passes, &mut rest, deadline);
                        match landed {
                            // The sender learns that nothing of the write can land any more.
                            Err(End::Refused(why @ Refusal::Forged)) => {
                                drop(seals);
                                self.answer(Answer::Refused { batch, why })?;
                                return Err(why.into());
                            }
                            landed => landed?,
                        }
                    }
                    None => self.land(inlet, &layout, &passes, bytes, deadline)?,
                }
            }
            // If a lease has just ended, the peer may have writes under other leases on this connection. So the
            // bytes for the closed slots are read and dropped, and later writes are still served.
            Err(Refusal::Closed) if self.shown.load(Ordering::Relaxed) != 0 => {
                let mut seals = self.seals.borrow_mut();
                if let Some(seals) = seals.as_mut() {
                    seals.back.skip(tags);
                }
                self.discard(Rest { bytes, tags }.total(), deadline)?;
                Some(Refusal::Closed)
            }
            Err(why) => {
                self.answer(Answer::Refused { batch, why })?;
                return Err(why.into());
            }
        };
        match refused {
            None => {
                let counters = &self.receiver.counters;
                counters.batches.fetch_add(1, Ordering::Relaxed);
                counters.bytes.fetch_add(bytes, Ordering::Relaxed);
                self.answer(Answer::Landed { batch })
            }
            Some(why) => {
                self.receiver.counters.refuse(why);
                self.answer(Answer::Refused { batch, why })
            }
        }
    }

    /// Reads a frame's head and parts. Waits for the frame's first byte for at most `idle`, or longer while the
    /// connection's lease is open.
    fn head(&self) -> Result<(Write, Vec<Part>), End> {
        // Every frame has at least one part, and each part has at least one byte, so the first read cannot
        // read bytes of the next frame.
        let mut head = vec![0; Write::BYTES + Part::BYTES];
        self.wake_at(1)?;
        let got = loop {
            match (&*self.socket).read(&mut head) {
                Ok(0) => return Err(End::Closed),
                Ok(n) => break n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.rest()?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        };
        let deadline = Instant::now() + self.receiver.handshake;
        self.fill(&mut head[got..], deadline)?;
        let write = head.first_chunk().and_then(Write::decode);
        let write = write.ok_or(Refusal::Malformed)?;
        // The decoder has checked that there are at most `MAX_PIECES`. Nothing else of the head is believed before its
        // tag is verified.
        let begun = head.len();
        head.resize(Write::BYTES + write.parts as usize * Part::BYTES, 0);
        self.fill(&mut head[begun..], deadline)?;
        if let Some(seals) = &mut *self.seals.borrow_mut() {
            let mut tag = [0; TAG_BYTES];
            self.fill(&mut tag, deadline)?;
            seals.back.check(&head, &tag)?;
        }
        let parts = head[Write::BYTES..]
            .chunks_exact(Part::BYTES)
            .map(|part| exact(part).and_then(Part::decode));
        let parts: Option<Vec<Part>> = parts.collect();
        Ok((write, parts.ok_or(Refusal::Malformed)?))
    }

    /// Waits for the next frame.
    fn rest(&self) -> Result<(), End> {
        let until = Instant::now() + self.receiver.idle;
        match wait(&self.socket, PollFlags::IN, Some(until)) {
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                let lease = LeaseId(self.shown.load(Ordering::Relaxed));
                let open = self.receiver.gates.current().open_leases();
                if open.contains(&lease) {
                    Ok(()) // the engine still computes KV of this lease
                } else {
                    Err(End::Closed)
                }
            }
            other => Ok(other?),
        }
    }

    /// Moves the frame's bytes into their slots. Returns the reason if a gate was closed meanwhile.
    fn land(
        &self,
        inlet: &mut Inlet,
        layout: &SlotLayout,
        passes: &[Pass],
        bytes: u64,
        deadline: Instant,
    ) -> Result<Option<Refusal>, End> {
        let mut left = bytes;
        for pass in passes {
            let mut at = 0;
            while at < pass.bytes {
                let want =
                    usize::try_from(pass.bytes - at).map_or(COPY_BYTES, |n| n.min(COPY_BYTES));
                let copied =
                    layout.through(pass, || inlet.recv(&*self.socket, pass.offset + at, want));
                match copied {
                    None => {
                        self.discard(left, deadline)?;
                        return Ok(Some(Refusal::Closed));
                    }
                    Some(Ok(0)) => return Err(cut_off().into()),
                    Some(Ok(n)) => {
                        at += n as u64;
                        left -= n as u64;
                    }
                    Some(Err(error)) => self.retry(error, left, deadline)?,
                }
            }
        }
        Ok(None)
    }

    /// Reads bytes for closed slots and drops them, so that the next frame can be read.
    pub(super) fn discard(&self, mut left: u64, deadline: Instant) -> Result<(), End> {
        let mut scratch = vec![0; SCRATCH_BYTES];
        while left > 0 {
            let want = usize::try_from(left).map_or(SCRATCH_BYTES, |n| n.min(SCRATCH_BYTES));
            match (&*self.socket).read(&mut scratch[..want]) {
                Ok(0) => return Err(cut_off().into()),
                Ok(n) => left -= n as u64,
                Err(error) => self.retry(error, left, deadline)?,
            }
        }
        Ok(())
    }

    fn fill(&self, out: &mut [u8], deadline: Instant) -> Result<(), End> {
        let left = out.len() as u64;
        self.fill_within(out, left, deadline)
    }

    /// Fills `out` from a frame of which `left` bytes are still to come.
    pub(super) fn fill_within(
        &self,
        mut out: &mut [u8],
        mut left: u64,
        deadline: Instant,
    ) -> Result<(), End> {
        while !out.is_empty() {
            match (&*self.socket).read(out) {
                Ok(0) => return Err(cut_off().into()),
                Ok(n) => {
                    out = &mut out[n..];
                    left -= n as u64;
                }
                Err(error) => self.retry(error, left, deadline)?,
            }
        }
        Ok(())
    }

    /// Sets the number of bytes for which the kernel wakes this thread: see [`WAKE_BYTES`].
    fn wake_at(&self, bytes: usize) -> io::Result<()> {
        if self.low_water.replace(bytes) == bytes {
            return Ok(());
        }
        set_low_water(&self.socket, bytes)
    }

    /// If a read has found no bytes, waits for bytes within the stall time and the frame's deadline. The peer
    /// sends only `left` more bytes, so the call waits for at most this number of bytes.
    pub(super) fn retry(&self, error: io::Error, left: u64, deadline: Instant) -> Result<(), End> {
        match error.kind() {
            io::ErrorKind::Interrupted => Ok(()),
            io::ErrorKind::WouldBlock => {
                self.wake_at(
                    usize::try_from(left).map_or(WAKE_BYTES, |left| left.min(WAKE_BYTES)),
                )?;
                let until = deadline.min(Instant::now() + self.receiver.stall);
                match wait(&self.socket, PollFlags::IN, Some(until)) {
                    Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                        Err(Refusal::Stalled.into())
                    }
                    other => Ok(other?),
                }
            }
            _ => Err(error.into()),
        }
    }

    fn answer(&self, answer: Answer) -> Result<(), End> {
        let deadline = Instant::now() + self.receiver.stall;
        let mut bytes = answer.encode().to_vec();
        if let Some(seals) = &mut *self.seals.borrow_mut() {
            seals.out.sign(&mut bytes);
        }
        let mut left = &bytes[..];
        while !left.is_empty() {
            match (&*self.socket).write(left) {
                Ok(n) => left = &left[n..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    wait(&self.socket, PollFlags::OUT, Some(deadline))?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Closes the connection so that the peer can still read the refusal. If a socket is closed while it has
    /// unread bytes, the kernel resets the connection, and the reset may arrive before the refusal.
    fn part_ways(&self) {
        let deadline = Instant::now() + LINGER;
        if self.wake_at(1).is_err() || self.socket.shutdown(Shutdown::Write).is_err() {
            return;
        }
        let mut scratch = vec![0; SCRATCH_BYTES];
        while Instant::now() < deadline {
            match (&*self.socket).read(&mut scratch) {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if wait(&self.socket, PollFlags::IN, Some(deadline)).is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }
}

/// Maximum bytes of one copy while the gate is locked. With this limit, a call of `SlotGates::close` waits for
/// at most about 0.1 ms.
const COPY_BYTES: usize = 512 << 10;
/// Minimum number of bytes for which the kernel wakes the thread. With a minimum of one byte the rate is
/// 4.1 GB/s, with 256 KiB 4.5 GB/s, and with this size 6.2 GB/s. These rates are for 512 MiB in pieces of
/// 16 MiB over 2 connections, with copies of the same size as the minimum.
const WAKE_BYTES: usize = 512 << 10;
const SCRATCH_BYTES: usize = 64 << 10;
/// The time that a refused peer has to read the reason.
const LINGER: Duration = Duration::from_millis(200);

fn exact<const N: usize>(bytes: &[u8]) -> Option<&[u8; N]> {
    bytes.try_into().ok()
}

pub(super) fn cut_off() -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "the sender closed the connection within a write",
    )
}
