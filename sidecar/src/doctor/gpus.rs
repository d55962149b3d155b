//! GPUs, and which GPU reaches the memory of which other GPU.

use super::finding::{Results, kinds};
use super::subject::Subject;
use crate::memory::cuda::{self, Uuid, Which};

kinds! {
    UNAVAILABLE = Error "gpu-unavailable":
        "pd_buffer_device puts the buffers into GPU memory, and the sidecar does not start without a GPU";
        "start the container with the GPU (docker: --gpus all), or set pd_buffer_device to cpu";
    MISSING = Error "gpu-missing":
        "the buffer of each rank must be on the GPU of its engine's rank";
        "check pd_buffer_device and CUDA_VISIBLE_DEVICES: engine and sidecar must see the same GPU";
    NO_PEER_ACCESS = Warning "gpu-peer-access":
        "without access to each other's memory, two GPUs of one host copy through host memory";
        "use GPUs that NVLink or one PCIe switch connects (nvidia-smi topo -m); in virtual machines let the hypervisor \
         allow peer access";
    HOST_BUFFER = Warning "buffer-in-host-memory":
        "an engine on a GPU copies its KV over the bus into a buffer in host memory, which takes longer than the transfer";
        "set pd_buffer_device: cuda, if the engine beside this sidecar runs on a GPU";
}

/// Lists the GPUs that this process sees, and compares them with the configuration.
pub(super) fn look(subject: &Subject<'_>, results: &mut Results) {
    let all = match cuda::all() {
        Ok(all) => all,
        Err(error) => {
            results.fact("gpus", "none that this process can use");
            if subject.wants_gpu() {
                results.add(&UNAVAILABLE, error.to_string());
            }
            return;
        }
    };
    let named = (0..)
        .zip(&all)
        .map(|(i, uuid): (u32, _)| format!("cuda:{i} {uuid}"));
    let named: Vec<String> = named.collect();
    results.fact("gpus", named.join(", "));
    let Some(config) = subject.config else {
        peers(&all, results);
        return;
    };
    for which in config.devices.iter().flatten() {
        let is_there = match which {
            Which::Ordinal(ordinal) => (*ordinal as usize) < all.len(),
            Which::Uuid(uuid) => all.contains(uuid),
        };
        if !is_there {
            let seen = format!(
                "pd_buffer_device names {which}; this process sees {}",
                named.join(", ")
            );
            results.add(&MISSING, seen);
        }
    }
    if subject.wants_gpu() {
        peers(&all, results);
    } else if !all.is_empty() {
        let seen = format!(
            "pd_buffer_device is cpu, and this host has {} GPUs",
            all.len()
        );
        results.add(&HOST_BUFFER, seen);
    }
}

/// Checks each pair of the first GPUs.
fn peers(all: &[Uuid], results: &mut Results) {
    let count = u32::try_from(all.len().min(MAX_GPUS)).unwrap_or_default();
    let mut apart = Vec::new();
    for from in 0..count {
        for to in (0..count).filter(|to| *to != from) {
            match cuda::reaches(from, to) {
                Ok(true) => {}
                Ok(false) => apart.push(format!("cuda:{from} to cuda:{to}")),
                Err(error) => apart.push(format!("cuda:{from} to cuda:{to} ({error})")),
            }
        }
    }
    if count > 1 && apart.is_empty() {
        results.fact("gpus", "each GPU reaches the memory of each other GPU");
    }
    if !apart.is_empty() {
        results.add(
            &NO_PEER_ACCESS,
            format!("no access from {}", apart.join(", ")),
        );
    }
}

/// Largest number of GPUs whose pairs are checked.
const MAX_GPUS: usize = 16;
