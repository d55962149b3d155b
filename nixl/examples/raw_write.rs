//! Baseline for benchmarks: measures the speed of a program that calls NIXL and does nothing else.
//!
//! Two processes run on this host. The sender creates each request once, from prepared lists. The sender then only
//! posts and polls the request, with an optional pause before each post. The receiver polls without a pause.
//!
//! The sender can divide the bytes into descriptors in several ways. The sender measures these divisions in
//! alternation, and then measures the fastest division again. This last measurement is the result, because a caller of
//! NIXL is free to choose the division. At the end the sender compares the bytes that arrived with the bytes that it
//! sent.
//!
//! ```text
//! UCX_TLS=tcp cargo run --release -p nixl --example raw_write -- --total-mib 64 --chunk-mib 1
//! ```
//! This command prints one line of JSON. Both processes inherit `UCX_TLS`.

use std::env;
use std::error::Error;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufRead, BufReader, Write as _};
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use memmap2::MmapRaw;
use nixl::{
    Agent, Config, Library, Memory, Merge, Pinned, Registration, Row, Search, State, Transfer,
};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = env::args().skip(1).collect();
    let mut order = Order {
        total: 64 << 20,
        chunk: 1 << 20,
        rounds: 21,
        pause: Duration::ZERO,
    };
    let mut receiver = false;
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        let mut number = || -> Result<usize, Box<dyn Error>> {
            let value = rest.next().ok_or_else(|| format!("{arg} needs a number"))?;
            Ok(value.parse()?)
        };
        match arg.as_str() {
            "--total-mib" => order.total = number()? << 20,
            "--total-kib" => order.total = number()? << 10,
            "--chunk-mib" => order.chunk = number()? << 20,
            "--chunk-kib" => order.chunk = number()? << 10,
            "--rounds" => order.rounds = number()?,
            "--pause-us" => order.pause = Duration::from_micros(number()?.try_into()?),
            "--receiver" => receiver = true,
            other => return Err(format!("unknown argument {other}").into()),
        }
    }
    let whole = order.chunk > 0 && order.total > 0 && order.total.is_multiple_of(order.chunk);
    if !whole || order.rounds == 0 {
        return Err(
            "the total must be a multiple of the chunk size, and the rounds at least 1".into(),
        );
    }
    if receiver {
        receive(&order)
    } else {
        send(&order, &args)
    }
}

struct Order {
    total: usize,
    chunk: usize,
    rounds: usize,
    /// The pause before each write.
    pause: Duration,
}

/// A division of the bytes into descriptors, with a request that uses this division.
struct Variant {
    name: String,
    transfer: Transfer,
    /// Duration of each counted round in seconds. The list is sorted at the end of the measurement.
    seconds: Vec<f64>,
}

impl Variant {
    fn median(&self) -> f64 {
        self.seconds[self.seconds.len() / 2]
    }
}

fn send(order: &Order, args: &[String]) -> Result<(), Box<dyn Error>> {
    // The receiver is a second process of this program with the same arguments, because both
    // processes must use the same sizes.
    let mut child = Command::new(env::current_exe()?)
        .args(args)
        .arg("--receiver")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut lines = BufReader::new(child.stdout.take().ok_or("no output")?).lines();
    let mut line = || {
        lines
            .next()
            .ok_or("the receiver process has ended")?
            .map_err(Box::<dyn Error>::from)
    };
    let address: u64 = line()?.parse()?;
    let metadata = unhex(&line()?)?;

    // The sender creates one request per division before the measurement, so that it measures only
    // posting and polling.
    let side = Side::new("raw-sender", order.total)?;
    side.memory.fill(1);
    let remote = side.agent.load(&metadata)?;
    let mut variants = Vec::new();
    for (bytes, merge) in divisions(order) {
        let ranges: Vec<(u64, u64)> = (0..order.total / bytes)
            .map(|i| ((i * bytes) as u64, bytes as u64))
            .collect();
        let rows: Vec<Row> = ranges
            .iter()
            .map(|&(offset, bytes)| Row {
                address: address + offset,
                bytes,
                device: 0,
            })
            .collect();
        let indices: Vec<i32> = (0..i32::try_from(ranges.len())?).collect();
        let local = Rc::new(side.registration.prepare(&ranges)?);
        let remote = Rc::new(remote.prepare(Memory::Dram, &rows)?);
        variants.push(Variant {
            name: match merge {
                Merge::Neighbours => format!("{} KiB merged", bytes >> 10),
                Merge::Nothing => format!("{} KiB apart", bytes >> 10),
            },
            transfer: Transfer::write(&local, &indices, &remote, &indices, merge)?,
            seconds: Vec::new(),
        });
    }
    // The first rounds connect and warm up. The best of several medians can be the best by chance,
    // so the sender measures the chosen division again, alone.
    measure(order, &mut variants, 3)?;
    let all = gb_per_s_of_each(order, &variants);
    variants.sort_by(|a, b| a.median().total_cmp(&b.median()));
    variants.truncate(1);
    measure(order, &mut variants, 0)?;
    // The sender fills its memory with other bytes and writes once more. Equal sums then prove that
    // this last write arrived.
    side.memory.fill(2);
    let mut state = variants[0].transfer.post()?;
    while state == State::Running {
        state = variants[0].transfer.poll();
    }
    writeln!(child.stdin.as_mut().ok_or("no input")?, "sum")?;
    let arrived: u64 = line()?.parse()?;
    if state != State::Done || arrived != side.memory.sum() {
        return Err("the received bytes differ from the sent bytes".into());
    }
    drop(child.stdin.take());
    child.wait()?;
    report(order, &variants[0], &all);
    Ok(())
}

/// Posts each variant's request in turn. Measures `order.rounds` rounds, after `uncounted` rounds that it does not
/// measure.
fn measure(
    order: &Order,
    variants: &mut [Variant],
    uncounted: usize,
) -> Result<(), Box<dyn Error>> {
    for variant in &mut *variants {
        variant.seconds.clear();
    }
    for round in 0..order.rounds + uncounted {
        for variant in &mut *variants {
            std::thread::sleep(order.pause);
            let start = Instant::now();
            let mut state = variant.transfer.post()?;
            while state == State::Running {
                state = variant.transfer.poll();
            }
            if state != State::Done {
                return Err(format!("{}: {state:?}", variant.name).into());
            }
            if round >= uncounted {
                variant.seconds.push(start.elapsed().as_secs_f64());
            }
        }
    }
    for variant in variants {
        variant.seconds.sort_by(f64::total_cmp);
    }
    Ok(())
}

/// Returns the divisions to measure: one in which NIXL merges the chunks, and one for every descriptor size that could
/// be the fastest.
fn divisions(order: &Order) -> Vec<(usize, Merge)> {
    let mut sizes = vec![order.chunk, 256 << 10, 512 << 10, 1 << 20, 2 << 20];
    sizes.retain(|bytes| *bytes <= order.chunk && order.chunk.is_multiple_of(*bytes));
    sizes.sort_unstable();
    sizes.dedup();
    let mut divisions = vec![(order.chunk, Merge::Neighbours)];
    divisions.extend(sizes.into_iter().map(|bytes| (bytes, Merge::Nothing)));
    divisions
}

fn gb_per_s_of_each(
    order: &Order,
    variants: &[Variant],
) -> serde_json::Map<String, serde_json::Value> {
    let rate = |v: &Variant| gb_per_s(order.total, v.median()).into();
    variants.iter().map(|v| (v.name.clone(), rate(v))).collect()
}

fn report(order: &Order, best: &Variant, all: &serde_json::Map<String, serde_json::Value>) {
    let result = serde_json::json!({
        "total_bytes": order.total,
        "chunk_bytes": order.chunk,
        "rounds": order.rounds,
        "ucx_tls": env::var("UCX_TLS").unwrap_or_else(|_| "auto".to_owned()),
        "median_gb_per_s": gb_per_s(order.total, best.median()),
        "median_us": (best.median() * 1e7).round() / 10.0,
        "division": best.name,
        "all_gb_per_s": all,
    });
    println!("{result}");
}

fn gb_per_s(bytes: usize, seconds: f64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    let rate = bytes as f64 / seconds / 1e9;
    (rate * 1000.0).round() / 1000.0
}

fn receive(order: &Order) -> Result<(), Box<dyn Error>> {
    let side = Side::new("raw-receiver", order.total)?;
    println!("{}", side.memory.address());
    let metadata = side.agent.metadata()?;
    let text = metadata.iter().try_fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").map(|()| text)
    })?;
    println!("{text}");
    static ASKED: AtomicBool = AtomicBool::new(false);
    static ENDED: AtomicBool = AtomicBool::new(false);
    std::thread::spawn(|| {
        for _line in std::io::stdin().lines().map_while(Result::ok) {
            ASKED.store(true, Ordering::Release);
        }
        ENDED.store(true, Ordering::Release);
    });
    while !ENDED.load(Ordering::Acquire) {
        side.agent.progress()?;
        if ASKED.swap(false, Ordering::AcqRel) {
            println!("{}", side.memory.sum());
        }
        // Without this yield, the sender would wait for the CPU on a host with two cores.
        std::thread::yield_now();
    }
    Ok(())
}

/// An agent with its own memory.
struct Side {
    agent: Agent,
    registration: Rc<Registration>,
    memory: Arc<Mapping>,
}

impl Side {
    fn new(name: &str, bytes: usize) -> Result<Self, Box<dyn Error>> {
        let library = Library::load(&Search::from_env())?;
        let agent = Agent::new(library, &Config::ucx(name))?;
        let memory = Arc::new(Mapping::shared(bytes)?);
        memory.fill(0);
        let pinned = Arc::clone(&memory) as Arc<dyn Pinned>;
        let registration = Rc::new(agent.register(pinned, Memory::Dram, 0)?);
        Ok(Self {
            agent,
            registration,
            memory,
        })
    }
}

#[derive(Debug)]
struct Mapping(MmapRaw);

impl Mapping {
    /// Maps shared memory, as the sidecar does for its buffers.
    fn shared(bytes: usize) -> std::io::Result<Self> {
        let path = format!("/dev/shm/raw-write-{}", std::process::id());
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)?;
        std::fs::remove_file(&path)?;
        file.set_len(bytes as u64)?;
        Ok(Self(MmapRaw::map_raw(&file)?))
    }

    /// Fills every page with bytes that depend on their position and on `seed`.
    fn fill(&self, seed: u8) {
        let mut state = u64::from(seed);
        for at in (0..self.0.len()).step_by(8) {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            // SAFETY: within the mapping, because its length is a multiple of 8; no reference exists.
            unsafe {
                self.0
                    .as_mut_ptr()
                    .add(at)
                    .cast::<u64>()
                    .write_unaligned(state)
            };
        }
    }

    /// Returns a sum of all words that also depends on their order.
    fn sum(&self) -> u64 {
        (0..self.0.len()).step_by(8).fold(0, |sum: u64, at| {
            // SAFETY: as in `fill`; volatile, because another process writes.
            let word = unsafe { self.0.as_ptr().add(at).cast::<u64>().read_volatile() };
            (sum ^ word)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(29)
        })
    }
}

// SAFETY: an owned mapping stays at its address until it is dropped, and only raw pointers access it.
unsafe impl Pinned for Mapping {
    fn address(&self) -> usize {
        self.0.as_ptr() as usize
    }
    fn bytes(&self) -> u64 {
        self.0.len() as u64
    }
}

fn unhex(text: &str) -> Result<Vec<u8>, Box<dyn Error>> {
    (0..text.len() / 2)
        .map(|i| {
            Ok(u8::from_str_radix(
                text.get(2 * i..2 * i + 2).ok_or("no hex")?,
                16,
            )?)
        })
        .collect()
}
