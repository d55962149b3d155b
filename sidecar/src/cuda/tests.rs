//! Without a GPU: refusals that say what to do. With one: memory, copies, events, in this process.

use std::io::Write as _;
use std::str::FromStr;

use super::*;
use crate::memory::Buffer;

/// The first GPU, or `None` after saying loudly that the test is skipped.
fn gpu() -> Option<std::sync::Arc<Device>> {
    match Device::open(&Which::Ordinal(0)) {
        Ok(device) => Some(device),
        Err(error) if std::env::var_os("PD_REQUIRE_CUDA").is_some_and(|v| v == "1") => {
            panic!("{error}")
        }
        Err(error) => {
            // Not by eprintln, which the test harness swallows when the test passes.
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
