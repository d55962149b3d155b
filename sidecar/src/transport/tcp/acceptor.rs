//! Listens for connections, and decides which of them to admit.
//!
//! One thread polls the listener and every connection that has not sent its hello yet. A thread for a
//! connection starts only after a valid hello. So a connection that is silent or sends garbage never gets a
//! thread; it uses one file descriptor for a short time. The number of connections is limited in each of the
//! two stages. If a stage is full, the thread makes room: it closes the oldest connection of the address that
//! has the most connections. So one address can displace only its own connections. A connection with an open
//! lease is closed only to make room for another address, and only if its own address has more than half of the
//! maximum number of connections.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use protocol::LeaseId;
use rustix::event::{PollFd, PollFlags};

use super::frame::{Hello, Refusal, VERSION};
use super::handshake::Waiting;
use super::reader::{Reader, Receiver};
use super::socket::{Waker, poll_for, prepare};

/// The owner of the listening thread. When the owner is dropped, it ends every connection and joins every
/// thread.
#[derive(Debug)]
pub(super) struct Acceptor {
    control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Control {
    waker: Waker,
    stop: AtomicBool,
    /// Connections with a thread that is about to end.
    ended: Mutex<Vec<u64>>,
}

impl Acceptor {
    pub(super) fn start(
        listener: TcpListener,
        receiver: Arc<Receiver>,
        max_connections: usize,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let control = Arc::new(Control {
            waker: Waker::new()?,
            stop: AtomicBool::new(false),
            ended: Mutex::default(),
        });
        let mut accepting = Accepting {
            listener,
            receiver,
            control: Arc::clone(&control),
            max_connections,
            waiting: Vec::new(),
            connections: HashMap::new(),
            next: 0,
        };
        let thread = thread::Builder::new()
            .name("tcp-accept".to_owned())
            .spawn(move || accepting.run())?;
        Ok(Self {
            control,
            thread: Some(thread),
        })
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        self.control.stop.store(true, Ordering::SeqCst);
        self.control.waker.wake();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the tcp listening thread panicked");
        }
    }
}

/// The state of the listening thread.
struct Accepting {
    listener: TcpListener,
    receiver: Arc<Receiver>,
    control: Arc<Control>,
    max_connections: usize,
    waiting: Vec<Waiting>,
    connections: HashMap<u64, Connection>,
    next: u64,
}

/// A connection that was admitted and has a thread.
struct Connection {
    socket: Arc<TcpStream>,
    from: IpAddr,
    shown: Arc<AtomicU64>,
    evicted: bool,
    thread: JoinHandle<()>,
}

impl Accepting {
    fn run(&mut self) {
        let mut pause = None;
        while !self.control.stop.load(Ordering::SeqCst) {
            let (listening, ready) = match self.poll(pause.take()) {
                Ok(ready) => ready,
                Err(error) => {
                    tracing::error!(%error, "the tcp listener cannot poll: it accepts no more connections");
                    break;
                }
            };
            self.control.waker.clear();
            self.reap();
            self.greet(&ready);
            if listening {
                pause = self.accept();
            }
        }
        for connection in self.connections.values() {
            // A thread that is about to end has already closed its socket, so an error here is harmless.
            drop(connection.socket.shutdown(Shutdown::Both));
        }
        for (_, connection) in self.connections.drain() {
            join(connection.thread);
        }
    }

    /// Waits for an event. If `pause` is given, ignores the listener for that time. Returns true for each
    /// socket that is ready: first for the listener, then for the waiting connections in their order.
    fn poll(&self, pause: Option<Duration>) -> io::Result<(bool, Vec<bool>)> {
        let now = Instant::now();
        let patience = self
            .waiting
            .iter()
            .map(|waiting| waiting.until.saturating_duration_since(now))
            .chain(pause)
            .min();
        let interest = match pause {
            Some(_) => PollFlags::empty(),
            None => PollFlags::IN,
        };
        let mut fds = vec![
            PollFd::new(&self.control.waker, PollFlags::IN),
            PollFd::new(&self.listener, interest),
        ];
        let sockets = self.waiting.iter().map(|waiting| &waiting.socket);
        fds.extend(sockets.map(|socket| PollFd::new(socket, PollFlags::IN)));
        poll_for(&mut fds, patience)?;
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        Ok((ready[1], ready[2..].to_vec()))
    }

    /// Accepts new connections. If the process has no file descriptor left, returns how long the listener must
    /// pause.
    fn accept(&mut self) -> Option<Duration> {
        for _ in 0..ACCEPTS_A_ROUND {
            let (socket, peer) = match self.listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                // The connection has failed, but the listener still works.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted
                    ) =>
                {
                    continue;
                }
                Err(error) => {
                    if let Some(dropped) = self.receiver.counters.log.allow(Instant::now()) {
                        tracing::warn!(%error, dropped, "the tcp listener cannot accept a connection");
                    }
                    return Some(ACCEPT_PAUSE);
                }
            };
            self.receiver
                .counters
                .accepted
                .fetch_add(1, Ordering::Relaxed);
            if prepare(&socket, self.receiver.stall).is_err() {
                continue;
            }
            if self.waiting.len() >= MAX_WAITING {
                let all = self.waiting.iter().map(|waiting| waiting.peer.ip());
                // The list is in the order of arrival, so a connection with a smaller index is older.
                if let Some(oldest) = oldest_of_the_most(all.enumerate()) {
                    self.waiting.remove(oldest);
                    self.evicted();
                }
            }
            let until = Instant::now() + self.receiver.handshake;
            self.waiting.push(Waiting::new(socket, peer, until));
        }
        None
    }

    /// Reads from waiting connections that have bytes, and refuses connections that were silent for too long.
    fn greet(&mut self, ready: &[bool]) {
        let now = Instant::now();
        let all = std::mem::take(&mut self.waiting);
        for (mut waiting, ready) in all.into_iter().zip(ready) {
            let rules = &self.receiver.admission;
            let step = if *ready {
                waiting.read(rules)
            } else {
                Ok(None)
            };
            match step {
                Ok(Some(hello)) => self.admit(waiting, hello),
                Ok(None) if now < waiting.until => self.waiting.push(waiting),
                Ok(None) => self.refuse(&mut waiting, Refusal::Stalled),
                Err(Some(why)) => self.refuse(&mut waiting, why),
                // A port scanner connects and sends nothing.
                Err(None) => {
                    tracing::debug!(peer = %waiting.peer, "a peer disconnected before its hello")
                }
            }
        }
    }

    /// Starts the thread of a connection, if its hello is valid and there is room.
    fn admit(&mut self, mut waiting: Waiting, hello: Hello) {
        // The version comes first: the other fields of a hello of another version may mean something else.
        let layout = self.receiver.gates.current();
        let wrong = if hello.version != VERSION {
            Some(Refusal::Version)
        } else if layout.slots() == 0 {
            Some(Refusal::NoSlots)
        } else if (hello.slots, hello.slot_bytes) != (layout.slots(), layout.slot_bytes()) {
            Some(Refusal::Geometry)
        } else if !self.make_room(waiting.peer.ip()) {
            Some(Refusal::Busy)
        } else {
            None
        };
        if let Some(why) = wrong {
            return self.refuse(&mut waiting, why);
        }
        let welcomed = match waiting.welcome(&self.receiver.admission) {
            Ok(welcomed) => welcomed,
            Err(Some(why)) => return self.refuse(&mut waiting, why),
            Err(None) => return,
        };
        let socket = Arc::new(waiting.socket);
        let shown = Arc::new(AtomicU64::new(0));
        let landing = Reader {
            receiver: Arc::clone(&self.receiver),
            socket: Arc::clone(&socket),
            peer: waiting.peer,
            shown: Arc::clone(&shown),
            writer: welcomed.writer,
            key: welcomed.key,
            seals: RefCell::new(welcomed.seals),
            low_water: Cell::new(1),
        };
        let id = self.next;
        self.next += 1;
        // The notice is dropped when the thread ends, even by a panic, so that no dead connection counts as
        // live forever.
        let notice = Notice(Arc::clone(&self.control), id);
        let spawned = thread::Builder::new()
            .name(format!("tcp-land-{id}"))
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let _notice = notice;
                landing.run();
            });
        match spawned {
            Ok(thread) => {
                let from = waiting.peer.ip();
                let connection = Connection {
                    socket,
                    from,
                    shown,
                    evicted: false,
                    thread,
                };
                self.connections.insert(id, connection);
                tracing::debug!(peer = %waiting.peer, "sender connected");
            }
            Err(error) => {
                tracing::error!(peer = %waiting.peer, %error, "cannot start a thread for a sender")
            }
        }
    }

    /// Makes room for one more connection and returns true if there is room. If necessary, closes a connection
    /// without an open lease, or a connection of an address that has more than half of the maximum number of
    /// connections.
    fn make_room(&mut self, newcomer: IpAddr) -> bool {
        let live = self
            .connections
            .values()
            .filter(|connection| !connection.evicted)
            .count();
        if live < self.max_connections {
            return true;
        }
        // The threads of evicted connections need a moment to end, so the number of all threads is limited,
        // too.
        if self.connections.len() >= 2 * self.max_connections {
            return false;
        }
        let open = self.receiver.gates.current().open_leases();
        let writes = |connection: &Connection| {
            open.contains(&LeaseId(connection.shown.load(Ordering::Relaxed)))
        };
        let all = || {
            let all = self.connections.iter();
            all.filter(|(_, connection)| !connection.evicted)
        };
        // Connections without an open lease are closed first, because no write is lost with them.
        let strangers = all()
            .filter(|(_, connection)| !writes(connection))
            .map(|(id, connection)| (*id, connection.from));
        let Some(id) = oldest_of_the_most(strangers).or_else(|| {
            let id = oldest_of_the_most(all().map(|(id, connection)| (*id, connection.from)))?;
            let host = self.connections.get(&id)?.from;
            let its = all().filter(|(_, connection)| connection.from == host);
            (host != newcomer && its.count() * 2 > self.max_connections).then_some(id)
        }) else {
            return false;
        };
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.evicted = true;
            drop(connection.socket.shutdown(Shutdown::Both));
            self.evicted();
        }
        true
    }

    fn evicted(&self) {
        self.receiver
            .counters
            .evicted
            .fetch_add(1, Ordering::Relaxed);
    }

    fn refuse(&self, waiting: &mut Waiting, why: Refusal) {
        self.receiver.counters.refuse(why);
        if let Some(dropped) = self.receiver.counters.log.allow(Instant::now()) {
            tracing::warn!(peer = %waiting.peer, %why, dropped, "tcp connection refused");
        }
        waiting.tell(why);
    }

    fn reap(&mut self) {
        let ended = std::mem::take(
            &mut *self
                .control
                .ended
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        for id in ended {
            if let Some(connection) = self.connections.remove(&id) {
                join(connection.thread);
            }
        }
    }
}

/// When a connection's thread ends, even by a panic, it drops this value. The drop tells the listening thread
/// that the connection's thread has ended.
struct Notice(Arc<Control>, u64);

impl Drop for Notice {
    fn drop(&mut self) {
        let ended = self.0.ended.lock();
        ended.unwrap_or_else(PoisonError::into_inner).push(self.1);
        self.0.waker.wake();
    }
}

/// Returns the lowest id of the address with the most ids.
fn oldest_of_the_most<I: Ord + Copy>(all: impl Iterator<Item = (I, IpAddr)>) -> Option<I> {
    let mut of: HashMap<IpAddr, (usize, I)> = HashMap::new();
    for (id, from) in all {
        let entry = of.entry(from).or_insert((0, id));
        entry.0 += 1;
        entry.1 = entry.1.min(id);
    }
    of.into_values()
        .max_by_key(|(count, id)| (*count, std::cmp::Reverse(*id)))
        .map(|(_, id)| id)
}

fn join(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        tracing::error!("a tcp receiving thread panicked");
    }
}

/// Maximum number of connections that have not sent their hello yet.
const MAX_WAITING: usize = 64;
/// Maximum number of connections that are accepted per round, so that a flood of new connections does not delay
/// the hellos of the waiting connections.
const ACCEPTS_A_ROUND: usize = 16;
/// The pause of the listener after the process has run out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// The stack of a receiving thread. The thread's largest stack frame has a few hundred bytes.
const STACK_BYTES: usize = 256 << 10;
