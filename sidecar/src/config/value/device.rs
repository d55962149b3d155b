//! The memory of the buffers: host memory or a GPU.

use super::{Value, items, scalar};
use crate::config::yaml::Raw;
use crate::memory::cuda::Which;

/// The memory of one rank's buffer, as given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Device {
    /// Host memory.
    Cpu,
    /// The GPU with the rank's number, as in LMCache.
    Cuda,
    /// A GPU given by number or UUID.
    Gpu(Which),
}

/// One device per rank, or one device for all ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Devices(pub(crate) Vec<Device>);

impl Value for Devices {
    const WANT: &'static str = "cpu, cuda (rank N on GPU N), cuda:N, cuda:GPU-UUID, or a list of them, one per rank: [cuda:0, cuda:1]";

    fn read(raw: &Raw, _: &mut Vec<String>) -> Result<Self, String> {
        let devices: Vec<Device> = items(raw)?.iter().map(device).collect::<Result<_, _>>()?;
        if devices.is_empty() {
            return Err("an empty list".to_owned());
        }
        Ok(Self(devices))
    }

    fn show(&self) -> String {
        match &self.0[..] {
            [one] => show(one),
            all => {
                let all: Vec<String> = all.iter().map(show).collect();
                format!("[{}]", all.join(", "))
            }
        }
    }
}

fn device(raw: &Raw) -> Result<Device, String> {
    let text = scalar(raw)?.trim();
    if text.eq_ignore_ascii_case("cpu") {
        return Ok(Device::Cpu);
    }
    if text.eq_ignore_ascii_case("cuda") {
        return Ok(Device::Cuda);
    }
    let Some(("cuda", gpu)) = text.split_once(':') else {
        return Err("not a kind of memory for buffers".to_owned());
    };
    if let Ok(ordinal) = gpu.parse() {
        return Ok(Device::Gpu(Which::Ordinal(ordinal)));
    }
    let uuid = gpu.parse();
    uuid.map(|uuid| Device::Gpu(Which::Uuid(uuid)))
        .map_err(|()| "neither a GPU's number nor its UUID".to_owned())
}

fn show(device: &Device) -> String {
    match device {
        Device::Cpu => "cpu".to_owned(),
        Device::Cuda => "cuda".to_owned(),
        Device::Gpu(which @ Which::Ordinal(_)) => which.to_string(),
        Device::Gpu(Which::Uuid(uuid)) => format!("cuda:{uuid}"),
    }
}
