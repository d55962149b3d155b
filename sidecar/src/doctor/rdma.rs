//! RDMA devices, as far as the kernel's files show them.

use super::finding::{Results, kinds};
use super::subject::{Host, Subject};
use crate::transport::environment::rdma_view;
use crate::transport::rdma::Settings;
use crate::transport::rdma::devices::{Device, all};
use crate::transport::rdma::replacement::LIBRARY_PATH;
use crate::transport::ucx::{DEVICES, TLS};

kinds! {
    NO_DEVICE_FILE = Error "rdma-device-file":
        "the kernel shows the RDMA device, but without its file UCX cannot open it and moves KV through sockets";
        "give the container /dev/infiniband (docker: --device /dev/infiniband; Kubernetes: the RDMA device plugin), and \
         let this user open its files";
    PORT_DOWN = Warning "rdma-port-down":
        "UCX cannot send over this port, and takes another port or sockets";
        "check the cable, the switch and `ibstat`, or leave the port out of UCX_NET_DEVICES";
    NO_PROVIDER = Error "rdma-provider":
        "libibverbs drives each kind of device by a provider library. NIXL's wheel has only the provider of mlx5, so UCX \
         does not see this device";
        "install the package with the provider (Debian and Ubuntu: ibverbs-providers). The sidecar then uses the system's \
         libibverbs by itself (docs/rdma.md)";
    NO_GPUDIRECT = Warning "gpudirect":
        "without nvidia-peermem or dma-buf the network device cannot read GPU memory, and UCX copies through host memory";
        "modprobe nvidia-peermem, or use NVIDIA's open kernel modules with Linux 5.12 or newer";
}

/// Checks each RDMA device.
pub(super) fn look(subject: &Subject<'_>, results: &mut Results) {
    let host = subject.host;
    let devices = devices(host);
    if devices.is_empty() {
        results.fact(FACT, "no RDMA device");
        return;
    }
    let shown: Vec<_> = devices.iter().map(ToString::to_string).collect();
    let shown = shown.join(", ");
    if !subject.may_use_ucx() {
        results.fact(FACT, format!("{shown}: not used by this transport"));
        return;
    }
    results.fact(FACT, &*shown);
    let files = host.list("/dev/infiniband");
    let opens = |file: &String| {
        let path = host.path(&format!("/dev/infiniband/{file}"));
        std::fs::File::options()
            .read(true)
            .write(true)
            .open(path)
            .is_ok()
    };
    if !files
        .iter()
        .any(|file| file.starts_with("uverbs") && opens(file))
    {
        let seen = format!(
            "the kernel shows {shown}, but this process can open no file /dev/infiniband/uverbs*"
        );
        results.add(&NO_DEVICE_FILE, seen);
    }
    for device in &devices {
        for port in &device.ports {
            if !port.state.is_empty() && port.state != "ACTIVE" {
                let seen = format!("{}:{} is {}", device.name, port.number, port.state);
                results.add(&PORT_DOWN, seen);
            }
        }
    }
    let variable = |name| subject.variable(name).unwrap_or_default().to_owned();
    let settings = Settings {
        tls: variable(TLS),
        net_devices: variable(DEVICES),
        library_path: variable(LIBRARY_PATH),
    };
    for device in rdma_view(&host.path("/"), settings).without_any_provider() {
        let seen = format!(
            "{device} needs the provider library lib{}-rdmav*.so, which is not found",
            device.provider
        );
        results.add(&NO_PROVIDER, seen);
    }
    let driver = host.read("/proc/driver/nvidia/version");
    if let Some(driver) = driver.filter(|_| host.list("/sys/module/nvidia_peermem").is_empty())
        && !driver.contains("Open Kernel Module")
    {
        results.add(
            &NO_GPUDIRECT,
            "this host has GPUs and RDMA devices, but no module nvidia_peermem and no open kernel module",
        );
    }
}

/// Returns the RDMA devices of a host.
pub(super) fn devices(host: &Host) -> Vec<Device> {
    all(&host.path("/"))
}

/// The heading of this area's facts.
const FACT: &str = "RDMA";

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    use super::*;

    /// Makes a device with one port; `driver` is the name of its kernel driver.
    fn device(root: &Path, name: &str, driver: &str, state: &str) {
        let folder = root.join("sys/class/infiniband").join(name);
        fs::create_dir_all(folder.join("ports/1")).unwrap();
        fs::create_dir_all(folder.join("device")).unwrap();
        fs::write(folder.join("ports/1/state"), state).unwrap();
        symlink(format!("../drivers/{driver}"), folder.join("device/driver")).unwrap();
    }

    fn codes(root: &Path, env: &[(String, String)]) -> Vec<&'static str> {
        let host = Host::below(root);
        let mut results = Results::default();
        look(&Subject::of(&host, env), &mut results);
        results.codes()
    }

    #[test]
    fn a_device_needs_its_file_its_provider_and_an_active_port() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        assert!(codes(root, &[]).is_empty());
        device(root, "mlx5_0", "mlx5_core", "4: ACTIVE\n");
        assert_eq!(codes(root, &[]), ["rdma-device-file"]);
        fs::create_dir_all(root.join("dev/infiniband")).unwrap();
        fs::write(root.join("dev/infiniband/uverbs0"), "").unwrap();
        assert!(codes(root, &[]).is_empty());
        device(root, "erdma_0", "erdma", "1: DOWN\n");
        fs::create_dir_all(root.join("usr/lib/x86_64-linux-gnu")).unwrap();
        fs::write(root.join("usr/lib/x86_64-linux-gnu/libibverbs.so.1"), "").unwrap();
        fs::write(root.join("usr/lib/x86_64-linux-gnu/libmlx5-rdmav34.so"), "").unwrap();
        assert_eq!(codes(root, &[]), ["rdma-port-down", "rdma-provider"]);
        fs::create_dir_all(root.join("libs")).unwrap();
        fs::write(root.join("libs/liberdma-rdmav34.so"), "").unwrap();
        let env = [("LD_LIBRARY_PATH".to_owned(), "/none:/libs".to_owned())];
        assert_eq!(codes(root, &env), ["rdma-port-down"]);
    }

    #[test]
    fn gpus_beside_rdma_need_a_way_into_their_memory() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        device(root, "mlx5_0", "mlx5_core", "4: ACTIVE\n");
        fs::create_dir_all(root.join("dev/infiniband")).unwrap();
        fs::write(root.join("dev/infiniband/uverbs0"), "").unwrap();
        fs::create_dir_all(root.join("proc/driver/nvidia")).unwrap();
        let version = |text| fs::write(root.join("proc/driver/nvidia/version"), text).unwrap();
        version("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.1");
        assert_eq!(codes(root, &[]), ["gpudirect"]);
        version("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.1");
        assert!(codes(root, &[]).is_empty());
        version("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.1");
        fs::create_dir_all(root.join("sys/module/nvidia_peermem/parameters")).unwrap();
        assert!(codes(root, &[]).is_empty());
    }
}
