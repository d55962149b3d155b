//! Two processes for a test: the test itself writes into the memory of a child process, which runs
//! the same test binary.

use std::env;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use memmap2::MmapRaw;
use nixl::{Agent, Config, Library, Memory, Pinned, Registration, Row, Search};

/// Returns the library, or prints that the test is skipped and returns `None`.
pub(crate) fn library() -> Option<&'static Library> {
    match Library::load(&Search::from_env()) {
        Ok(library) => Some(library),
        Err(error) if env::var_os("PD_REQUIRE_NIXL").is_some_and(|v| v == "1") => panic!("{error}"),
        Err(error) => {
            // The test does not use eprintln, because the test harness hides its output when the
            // test passes.
            let text = format!("SKIP (set PD_REQUIRE_NIXL=1 to fail instead): {error}\n");
            io::stderr().write_all(text.as_bytes()).unwrap();
            None
        }
    }
}

/// Anonymous shared memory whose pages exist already: NIXL writes 6 to 20 times slower into pages
/// that were not touched before.
#[derive(Debug)]
pub(crate) struct Mapping(MmapRaw);

impl Mapping {
    pub(crate) fn new(bytes: usize) -> Arc<Self> {
        let map = MmapRaw::from(memmap2::MmapMut::map_anon(bytes).unwrap());
        let mapping = Self(map);
        mapping.write(0, &vec![0; bytes]);
        Arc::new(mapping)
    }

    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.0.len());
        // SAFETY: within the mapping; no reference into it exists.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                self.0.as_mut_ptr().add(offset),
                bytes.len(),
            );
        }
    }

    pub(crate) fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        assert!(offset + len <= self.0.len());
        let mut bytes = vec![0; len];
        // SAFETY: as in `write`.
        unsafe {
            std::ptr::copy_nonoverlapping(self.0.as_ptr().add(offset), bytes.as_mut_ptr(), len);
        }
        bytes
    }
}

// SAFETY: an owned mapping stays at its address until it is dropped, and only raw copies access it.
unsafe impl Pinned for Mapping {
    fn address(&self) -> usize {
        self.0.as_ptr() as usize
    }
    fn bytes(&self) -> u64 {
        self.0.len() as u64
    }
}

/// An agent with one registered mapping.
pub(crate) struct Side {
    pub(crate) agent: Agent,
    pub(crate) registration: Rc<Registration>,
    pub(crate) memory: Arc<Mapping>,
}

impl Side {
    pub(crate) fn new(library: &'static Library, name: &str, bytes: usize) -> Self {
        let agent = Agent::new(library, &Config::ucx(name)).unwrap();
        let memory = Mapping::new(bytes);
        let registration = agent
            .register(Arc::clone(&memory) as Arc<dyn Pinned>, Memory::Dram, DEVICE)
            .unwrap();
        Self {
            agent,
            registration: Rc::new(registration),
            memory,
        }
    }
}

/// The device id of all memory in these tests. The id is not 0, so that a test fails if one side
/// does not pass the id to NIXL.
pub(crate) const DEVICE: u64 = 3;

/// The child process that owns the memory into which a test writes.
pub(crate) struct Target {
    pub(crate) child: Child,
    pub(crate) metadata: Vec<u8>,
    pub(crate) address: u64,
    control: TcpStream,
}

impl Target {
    /// Starts the test `child` of this binary with the given environment.
    pub(crate) fn start(bytes: usize, variables: &[(&str, &str)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut command = Command::new(env::current_exe().unwrap());
        command
            .args(["--exact", "child", "--nocapture"])
            .env(
                "PD_TEST_CHILD",
                listener.local_addr().unwrap().port().to_string(),
            )
            .env("PD_TEST_BYTES", bytes.to_string())
            .stdout(Stdio::null());
        for (name, value) in variables {
            command.env(name, value);
        }
        let child = command.spawn().unwrap();
        let (mut control, _) = listener.accept().unwrap();
        control
            .set_read_timeout(Some(Duration::from_secs(90)))
            .unwrap();
        let metadata = receive(&mut control).unwrap();
        let address = u64::from_le_bytes(receive(&mut control).unwrap().try_into().unwrap());
        Self {
            child,
            metadata,
            address,
            control,
        }
    }

    /// Returns a row of the child's memory.
    pub(crate) fn row(&self, offset: u64, bytes: u64) -> Row {
        Row {
            address: self.address + offset,
            bytes,
            device: DEVICE,
        }
    }

    /// Returns bytes of the child's memory, read by the child.
    pub(crate) fn read(&mut self, offset: usize, len: usize) -> Vec<u8> {
        let mut order = b"r".to_vec();
        order.extend((offset as u64).to_le_bytes());
        order.extend((len as u64).to_le_bytes());
        send(&mut self.control, &order).unwrap();
        receive(&mut self.control).unwrap()
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // The results are ignored, because a test may have killed the child already.
        let _killed = self.child.kill();
        let _status = self.child.wait();
    }
}

/// Runs the child process. The test named `child` calls this function, which does nothing unless a
/// [`Target`] started this process.
pub(crate) fn run_child() {
    let Ok(port) = env::var("PD_TEST_CHILD") else {
        return;
    };
    let bytes = env::var("PD_TEST_BYTES").unwrap().parse().unwrap();
    let mut control = TcpStream::connect(("127.0.0.1", port.parse().unwrap())).unwrap();
    let library = library().unwrap();
    let name = format!("target-{}", std::process::id());
    let side = Side::new(library, &name, bytes);
    send(&mut control, &side.agent.metadata().unwrap()).unwrap();
    let address = side.memory.address() as u64;
    send(&mut control, &address.to_le_bytes()).unwrap();
    loop {
        side.agent.progress().unwrap();
        control.set_nonblocking(true).unwrap();
        let ready = control.peek(&mut [0]);
        control.set_nonblocking(false).unwrap();
        match ready {
            Ok(1..) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                std::thread::yield_now();
                continue;
            }
            // The test process has closed the connection.
            _ => return,
        }
        let order = receive(&mut control).unwrap();
        let number = |at: usize| {
            usize::try_from(u64::from_le_bytes(order[at..at + 8].try_into().unwrap())).unwrap()
        };
        send(&mut control, &side.memory.read(number(1), number(9))).unwrap();
    }
}

fn send(to: &mut TcpStream, bytes: &[u8]) -> io::Result<()> {
    to.write_all(&(bytes.len() as u64).to_le_bytes())?;
    to.write_all(bytes)
}

fn receive(from: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut length = [0; 8];
    from.read_exact(&mut length)?;
    let mut bytes = vec![0; usize::try_from(u64::from_le_bytes(length)).unwrap()];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}
