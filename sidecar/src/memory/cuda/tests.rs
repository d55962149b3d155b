//! Tests CUDA's refusals without a GPU, and memory, copies and events with a GPU.

use std::io::{BufRead, BufReader, Write as _};
use std::process::{Child, Command, Stdio};
use std::str::FromStr;
use std::sync::Arc;

use super::*;
use crate::memory::{Buffer, Rows};
use crate::transport::Readiness;
use crate::transport::readiness::Signal;

/// Opens the first GPU, or returns `None` after a message that the test is skipped.
fn gpu() -> Option<Arc<Device>> {
    match Device::open(&Which::Ordinal(0)) {
        Ok(device) => Some(device),
        Err(error) if std::env::var_os("PD_REQUIRE_CUDA").is_some_and(|v| v == "1") => {
            panic!("{error}")
        }
        Err(error) => {
            // eprintln would not help: the test harness hides its output when the test passes.
            let text = format!("SKIP (set PD_REQUIRE_CUDA=1 to fail instead): {error}\n");
            std::io::stderr().write_all(text.as_bytes()).unwrap();
            None
        }
    }
}

#[test]
fn uuids_are_read_in_both_spellings() {
    let text = "GPU-6f5e1a2b-0c3d-4e5f-8a9b-c0d1e2f30415";
    let uuid = Uuid::from_str(text).unwrap();
    assert_eq!(uuid.to_string(), text);
    assert_eq!(Uuid::from_str(&text[4..]), Ok(uuid));
    for bad in ["", "GPU-", "GPU-12", "MIG-6f5e1a2b", "cuda:0"] {
        assert_eq!(Uuid::from_str(bad), Err(()), "{bad}");
    }
}

#[test]
fn a_host_without_a_driver_says_so_and_lives() {
    if is_present() {
        return;
    }
    let error = Buffer::on_gpu(&Which::Ordinal(0), 1 << 20).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("libcuda") || text.contains("CUDA"), "{text}");
}

#[test]
fn a_gpu_that_is_not_there_and_memory_that_is_not_free() {
    let Some(device) = gpu() else { return };
    let text = Device::open(&Which::Ordinal(99)).unwrap_err().to_string();
    assert!(
        text.contains("cuda:99") && text.contains(&device.uuid().to_string()),
        "{text}"
    );
    let error = DeviceMemory::take(device, 1 << 50).unwrap_err();
    assert!(
        matches!(error, CudaError::Short { free, .. } if free > 0),
        "{error}"
    );
}

#[test]
fn pieces_at_equal_distances_go_in_and_out() {
    let Some(device) = gpu() else { return };
    let which = Which::Uuid(device.uuid());
    let (gpu, host) = (
        Buffer::on_gpu(&which, 1 << 20).unwrap(),
        Buffer::memfd("rows", 1 << 20).unwrap(),
    );
    let rows = Rows {
        offset: 5,
        step: 4096,
        width: 16,
    };
    let block: Vec<u8> = (0..250_u8).flat_map(|i| [i; 16]).collect();
    for buffer in [&gpu, &host] {
        buffer.fill_random(0, 1 << 20, 3).unwrap();
        buffer.copy_in_rows(rows, &block).unwrap();
        let mut found = vec![0; block.len()];
        buffer.copy_out_rows(rows, &mut found).unwrap();
        assert_eq!(found, block);
        let beyond = Rows { step: 5000, ..rows };
        assert!(buffer.copy_in_rows(beyond, &block).is_err());
    }
    let sum = |buffer: &Buffer| buffer.sum(0, 1 << 20).unwrap();
    assert_eq!(sum(&gpu), sum(&host), "nothing between them was touched");
}

#[test]
fn bytes_go_in_across_and_out_again() {
    let Some(device) = gpu() else { return };
    const MIB: u64 = 1 << 20;
    let buffer = Buffer::on_gpu(&Which::Uuid(device.uuid()), 9 * MIB).unwrap();
    let memory = buffer.cuda().unwrap();
    let mut blank = vec![1; 100];
    buffer.copy_out(9 * MIB - 100, &mut blank).unwrap();
    assert_eq!(blank, [0; 100], "fresh memory is cleared");
    buffer.fill_random(3, 5 * MIB, 1).unwrap();
    let imported = Imported::open(&device, memory.handle(), memory.bytes()).unwrap();
    let stream = Stream::new(&device).unwrap();
    let event = Event::new(&device).unwrap();
    stream.push(memory, 3, &imported, 6 * MIB, 2 * MIB).unwrap();
    stream.record(&event).unwrap();
    stream.wait().unwrap();
    assert_eq!(event.state(), Ok(State::Fired));
    let sum = |at, len| buffer.sum(at, len).unwrap();
    assert_eq!(sum(3, 2 * MIB), sum(6 * MIB, 2 * MIB));
    assert!(stream.push(memory, 8 * MIB, &imported, 0, 2 * MIB).is_err());
    let strided = Strided {
        from: 0,
        to: 3 * MIB,
        width: 1000,
        count: 2,
    };
    stream.push_rows(memory, &imported, strided, MIB).unwrap();
    stream.wait().unwrap();
    for at in [0, MIB] {
        assert_eq!(sum(at, 1000), sum(3 * MIB + at, 1000));
    }
    let beyond = Strided {
        count: 7,
        ..strided
    };
    assert!(stream.push_rows(memory, &imported, beyond, MIB).is_err());
    let mut stage = Stage::new(&device, 4096).unwrap();
    stage.fetch(memory, 3, 4096).unwrap();
    stage.put(memory, 0, 4096).unwrap();
    assert_eq!(sum(0, 4096), {
        let mut copy = vec![0; 4096];
        copy.copy_from_slice(stage.block());
        xxhash_rust::xxh3::xxh3_64(&copy)
    });
    assert!(stage.fetch(memory, 0, 4097).is_err());
}

/// Another process, which a test kills while its GPU work runs. An engine may end in the same way.
struct Engine {
    child: Child,
    memory: Handle,
    event: Handle,
}

/// The size of the other process's memory; a copy of half of it takes a millisecond.
const ENGINE_BYTES: u64 = 4 << 30;

impl Engine {
    fn start() -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "cuda::tests::engine", "--ignored", "--nocapture"])
            .env(CHILD, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut answer = |word: &str| loop {
            let line = lines.next().expect("the engine has died").unwrap();
            if let Some((_, hex)) = line.split_once(word) {
                let byte = |i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap();
                return std::array::from_fn(byte);
            }
        };
        let (memory, event) = (answer("@memory "), answer("@event "));
        Self {
            child,
            memory,
            event,
        }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // The test may have killed the process already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// An environment variable that only the other process has.
const CHILD: &str = "PD_CUDA_TEST_ENGINE";

/// Runs in the other process: queues a few seconds of copies and an event after them, then waits for the end
/// of its input.
#[test]
#[ignore = "the other half of a test"]
fn engine() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let device = Device::open(&Which::Ordinal(0)).unwrap();
    let memory = DeviceMemory::take(Arc::clone(&device), ENGINE_BYTES).unwrap();
    memory.write(0, b"filled by the engine").unwrap();
    let stream = Stream::new(&device).unwrap();
    let (event, handle) = Event::shared(&device).unwrap();
    for _ in 0..3000 {
        let half = ENGINE_BYTES / 2;
        stream.push(&memory, 0, &memory, half, half).unwrap();
    }
    stream.record(&event).unwrap();
    let hex = |handle: &Handle| handle.map(|byte| format!("{byte:02x}")).concat();
    println!("@memory {}", hex(memory.handle()));
    println!("@event {}", hex(&handle));
    std::io::stdout().flush().unwrap();
    for line in std::io::stdin().lines() {
        line.unwrap();
    }
    stream.wait().unwrap();
}

#[test]
fn an_engine_that_is_killed_takes_nothing_with_it() {
    let Some(device) = gpu() else { return };
    let mut engine = Engine::start();
    let event = Event::open(&device, &engine.event).unwrap();
    let memory = Imported::open(&device, &engine.memory, ENGINE_BYTES).unwrap();
    assert_eq!(event.state(), Ok(State::Pending), "its copies take seconds");
    engine.kill();
    // CUDA does not promise what an event of a dead process reports, so the sidecar must not trust such an
    // event.
    let states: Vec<_> = (0..20)
        .map(|_| {
            std::thread::sleep(std::time::Duration::from_millis(100));
            event.state()
        })
        .collect();
    let text = format!(
        "after the kill the event is {:?} ... {:?}\n",
        states[0], states[19]
    );
    std::io::stderr().write_all(text.as_bytes()).unwrap();
    event.orphan();
    assert!(matches!(event.readiness(), Readiness::Never(_)));
    let mut stage = Stage::new(&device, 20).unwrap();
    stage.fetch(&memory, 0, 20).unwrap();
    assert_eq!(stage.block(), b"filled by the engine");
    drop((event, memory));
    let again = DeviceMemory::take(device, ENGINE_BYTES).unwrap();
    again.write(0, b"and on it goes").unwrap();
}
