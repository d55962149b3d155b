//! Checks whether NIXL can use the RDMA devices of this host, and says what is missing.
//!
//! UCX itself only reports that a network device is not available. This module compares what the kernel shows
//! ([`devices`]) with the provider libraries of the libibverbs that NIXL loads ([`verbs`]).
//!
//! NIXL's wheel brings a libibverbs that knows Mellanox cards only. If a device needs another provider and the system
//! has it, the sidecar starts itself again with the system's libibverbs in the place of the wheel's ([`replacement`]).

use std::path::Path;

pub(crate) mod devices;
pub(crate) mod replacement;
mod verbs;

use devices::Device;
use replacement::{LIBRARY_PATH, Replacement};
use verbs::Verbs;

/// The settings of the environment that decide which RDMA devices UCX may use.
#[derive(Clone, Debug, Default)]
pub(crate) struct Settings {
    /// The value of `UCX_TLS`; empty if it is not set.
    pub(crate) tls: String,
    /// The value of `UCX_NET_DEVICES`; empty if it is not set.
    pub(crate) net_devices: String,
    /// The value of `LD_LIBRARY_PATH`; empty if it is not set.
    pub(crate) library_path: String,
}

impl Settings {
    /// Reads the settings of this process.
    pub(crate) fn of_process() -> Self {
        let of = |name| std::env::var(name).unwrap_or_default();
        Self {
            tls: of(super::ucx::TLS),
            net_devices: of(super::ucx::DEVICES),
            library_path: of(LIBRARY_PATH),
        }
    }
}

/// The RDMA devices of this host as NIXL sees them.
#[derive(Clone, Debug)]
pub(crate) struct View {
    settings: Settings,
    /// All devices that the kernel shows.
    devices: Vec<Device>,
    /// True if this process may open the devices.
    has_device_files: bool,
    /// The libibverbs of NIXL's wheel; `None` if NIXL uses the system's.
    wheel: Option<Verbs>,
    system: Option<Verbs>,
}

impl View {
    /// Looks at the devices and libraries below `root`, which is `/` or a test's own folder. `nixl` is the NIXL library
    /// that this process will load.
    pub(crate) fn new(root: &Path, nixl: &Path, settings: Settings) -> Self {
        let files = devices::names(&root.join("dev/infiniband"));
        Self {
            devices: devices::all(root),
            has_device_files: files.iter().any(|name| name.starts_with("uverbs")),
            wheel: Verbs::of_wheel(root, nixl, &settings.library_path),
            system: Verbs::of_system(root, &settings.library_path),
            settings,
        }
    }

    /// Returns the replacement of the wheel's libibverbs if NIXL needs it: only the system has the provider of a device
    /// that UCX may use. `None` if there is nothing to gain, or if the replacement is in effect already.
    pub(crate) fn replacement(&self) -> Option<Replacement> {
        let (Some(wheel), Some(system)) = (&self.wheel, self.fitting_system()) else {
            return None;
        };
        let gains = |device: &Device| !wheel.has(&device.provider) && system.has(&device.provider);
        self.permitted().into_iter().find(|device| gains(device))?;
        Some(Replacement {
            name: wheel.library.file_name()?.to_owned(),
            library: system.library.clone(),
        })
    }

    /// Returns true if NIXL can use one of the devices.
    pub(crate) fn is_usable(&self) -> bool {
        self.permitted()
            .iter()
            .any(|device| self.has_provider(device))
    }

    /// Returns the devices that UCX may use and NIXL cannot use: neither NIXL's libibverbs nor the system's, with which
    /// the sidecar would start again, has the provider.
    pub(crate) fn without_any_provider(&self) -> Vec<&Device> {
        let system = |device: &Device| {
            self.fitting_system()
                .is_some_and(|system| system.has(&device.provider))
        };
        let mut devices = self.permitted();
        devices.retain(|device| !self.has_provider(device) && !system(device));
        devices
    }

    /// Returns a text for each reason why NIXL cannot use a device that it is to use: what is missing, and what to do.
    pub(crate) fn complaints(&self) -> Vec<String> {
        let Settings {
            tls, net_devices, ..
        } = &self.settings;
        let mut texts = Vec::new();
        if !permits(tls) {
            return texts;
        }
        if self.devices.is_empty() {
            if asks(tls) {
                texts.push(format!(
                    "UCX_TLS={tls} asks for RDMA, and the kernel shows no RDMA device in /sys/class/infiniband: load \
                     the driver of the card, or SoftRoCE for a test (modprobe rdma_rxe, then rdma link add rxe0 type rxe \
                     netdev INTERFACE)"
                ));
            }
            return texts;
        }
        let all: Vec<_> = self.devices.iter().map(ToString::to_string).collect();
        let all = all.join(", ");
        for name in self.unknown_devices() {
            texts.push(format!(
                "UCX_NET_DEVICES={net_devices} names {name}, and the kernel has no such RDMA port; it has {all}"
            ));
        }
        if !self.has_device_files {
            texts.push(format!(
                "the kernel has the RDMA devices {all}, but this process sees no /dev/infiniband/uverbs*: load the \
                 module ib_uverbs, and pass /dev/infiniband into the container"
            ));
        }
        for device in self.permitted() {
            if !self.has_provider(device) {
                texts.push(self.without_provider(device));
            }
            for port in device.ports.iter().filter(|port| port.state == "DOWN") {
                texts.push(format!(
                    "port {} of the RDMA device {} is down: check its cable and its network interface",
                    port.number, device.name
                ));
            }
        }
        texts
    }

    fn without_provider(&self, device: &Device) -> String {
        let provider = &device.provider;
        let file = format!("lib{provider}-rdmav*.so");
        let cure = format!(
            "install the package with {file} (Debian and Ubuntu: ibverbs-providers; Red Hat and SUSE: libibverbs; some \
             cards: only their vendor's package) and restart"
        );
        let lacks = match (&self.wheel, &self.system) {
            (Some(wheel), Some(system)) if system.has(provider) => {
                let (wheel, system_library) = (wheel.library.display(), system.library.display());
                let why = match self.fitting_system() {
                    Some(_) => "is not in its place: the first lines of this process say why",
                    None => "is too old to take its place: install a newer rdma-core",
                };
                return format!(
                    "NIXL cannot use the RDMA device {device}: the libibverbs of NIXL's wheel ({wheel}) has no provider \
                     for it, and the system's libibverbs ({system_library}), which has one, {why}"
                );
            }
            (Some(wheel), _) => format!(
                "the libibverbs of NIXL's wheel ({}) has no provider for it, and neither has this system",
                wheel.library.display()
            ),
            (None, Some(system)) => {
                format!("{} has no provider for it", system.library.display())
            }
            (None, None) => "this system has no libibverbs.so.1".to_owned(),
        };
        format!("NIXL cannot use the RDMA device {device}: {lacks}: {cure}")
    }

    /// Returns true if the libibverbs that NIXL uses has the device's provider. If this module does not find that
    /// libibverbs, it assumes so: a system may have it in a folder of its own.
    fn has_provider(&self, device: &Device) -> bool {
        let used = self.wheel.as_ref().or(self.system.as_ref());
        used.is_none_or(|verbs| verbs.has(&device.provider))
    }

    /// Returns the system's libibverbs if it can take the place of the wheel's: it has all functions of the wheel's.
    fn fitting_system(&self) -> Option<&Verbs> {
        let minor = |verbs: &Option<Verbs>| verbs.as_ref().and_then(|verbs| verbs.minor);
        match (minor(&self.wheel), minor(&self.system)) {
            (Some(wheel), Some(system)) if system < wheel => None,
            _ => self.system.as_ref(),
        }
    }

    /// Returns the devices that UCX may use.
    fn permitted(&self) -> Vec<&Device> {
        let list = self.listed();
        let is_listed = |device: &&Device| {
            list.as_ref().is_none_or(|names| {
                let has = |name: &str| names.contains(&name);
                has(&device.name) || device.ucx_names().any(|name| has(&name))
            })
        };
        let permits = permits(&self.settings.tls);
        self.devices
            .iter()
            .filter(is_listed)
            .filter(|_| permits)
            .collect()
    }

    /// Returns the RDMA ports in `UCX_NET_DEVICES` that the kernel does not have.
    fn unknown_devices(&self) -> Vec<&str> {
        let known: Vec<_> = self.devices.iter().flat_map(Device::ucx_names).collect();
        let named = self.listed().unwrap_or_default();
        // A name without a port is a network interface.
        let is_unknown = |name: &&str| name.contains(':') && !known.iter().any(|port| port == name);
        named.into_iter().filter(is_unknown).collect()
    }

    /// Returns the names in `UCX_NET_DEVICES`; `None` if the value is not a list of plain names, so that every device
    /// may be used.
    fn listed(&self) -> Option<Vec<&str>> {
        let value = self.settings.net_devices.trim();
        if value.is_empty() || value == "all" || value.contains(['^', '*', '?', '[']) {
            return None;
        }
        Some(value.split(',').map(str::trim).collect())
    }
}

/// Returns true if UCX may use RDMA under this value of `UCX_TLS`.
fn permits(tls: &str) -> bool {
    match tls.trim().strip_prefix('^') {
        Some(excluded) => !excluded.split(',').any(|name| name.trim() == "ib"),
        None => tls.trim().is_empty() || tls.split(',').any(|n| n.trim() == "all") || asks(tls),
    }
}

/// Returns true if this value of `UCX_TLS` is a list with a transport that needs RDMA.
fn asks(tls: &str) -> bool {
    let needs_rdma = |name: &str| {
        let family = name.trim().split(['_', ':']).next().unwrap_or_default();
        matches!(family, "ib" | "rc" | "ud" | "dc" | "srd")
    };
    !tls.trim().starts_with('^') && tls.split(',').any(needs_rdma)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::devices::tests::add;
    use super::verbs::tests::{WHEEL, touch};
    use super::*;

    const SYSTEM: &[&str] = &[
        "usr/lib/x86_64-linux-gnu/libibverbs.so.1",
        "usr/lib/x86_64-linux-gnu/libibverbs/librxe-rdmav34.so",
    ];

    /// Returns a host with a Mellanox card, a SoftRoCE device, and NIXL's wheel.
    fn host() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        touch(root.path(), WHEEL);
        touch(root.path(), &["dev/infiniband/uverbs0"]);
        add(root.path(), "mlx5_0", Some("mlx5_core"), "ACTIVE");
        add(root.path(), "rxe0", None, "ACTIVE");
        root
    }

    fn settings(tls: &str, net_devices: &str) -> Settings {
        Settings {
            tls: tls.to_owned(),
            net_devices: net_devices.to_owned(),
            ..Settings::default()
        }
    }

    fn view(root: &tempfile::TempDir, settings: Settings) -> View {
        View::new(root.path(), &root.path().join(WHEEL[0]), settings)
    }

    #[test]
    fn a_missing_provider_is_named_with_device_library_and_cure() {
        let root = host();
        let seen = view(&root, settings("rc_verbs,self", "rxe0:1"));
        assert!(!seen.is_usable());
        assert_eq!(seen.replacement(), None, "nothing can replace it");
        let texts = seen.complaints();
        assert_eq!(texts.len(), 1, "{texts:?}");
        for part in [
            "rxe0 (driver rxe, port 1 ACTIVE)",
            "libibverbs-1de1263b.so",
            "librxe-rdmav*.so",
            "ibverbs-providers",
        ] {
            assert!(texts[0].contains(part), "{texts:?}");
        }
        // The card's provider is in the wheel.
        let seen = view(&root, settings("rc", "mlx5_0:1"));
        assert!(seen.is_usable());
        assert_eq!(seen.complaints(), [""; 0]);
    }

    #[test]
    fn the_systems_library_replaces_the_wheels_if_only_it_has_the_provider() {
        let root = host();
        touch(root.path(), SYSTEM);
        let check = |tls: &str, net_devices: &str, expect: Option<&Replacement>| {
            let got = view(&root, settings(tls, net_devices)).replacement();
            assert_eq!(got.as_ref(), expect, "{tls} {net_devices}");
        };
        let wanted = Replacement {
            name: "libibverbs-1de1263b.so.1.14.48.0".into(),
            library: root.path().join(SYSTEM[0]),
        };
        for tls in ["", "^tcp", "all", "ib,sm,self,cuda", "self,rc_verbs:aux"] {
            check(tls, "", Some(&wanted));
        }
        check("rc_verbs", "mlx5_0:1", None);
        check("rc_verbs", "mlx5_0:1,rxe0:1", Some(&wanted));
        for tls in ["tcp", "sm,self", "^ib"] {
            check(tls, "", None);
        }
        // Without the restart NIXL cannot use the device.
        let seen = view(&root, settings("rc", "rxe0:1"));
        assert!(!seen.is_usable());
        let texts = seen.complaints();
        assert!(texts[0].contains("is not in its place"), "{texts:?}");
        // The restarted process has nothing more to do.
        wanted.make(&root.path().join("links")).unwrap();
        let restarted = Settings {
            library_path: "/usr/local/lib:/links".to_owned(),
            ..settings("rc", "rxe0:1")
        };
        let seen = view(&root, restarted);
        assert_eq!(seen.replacement(), None);
        assert!(seen.is_usable());
        assert_eq!(seen.complaints(), [""; 0]);
    }

    /// A library that lacks a function of the wheel's would keep UCX from loading its part for RDMA.
    #[test]
    fn an_older_system_library_does_not_replace_the_wheels() {
        let root = host();
        touch(root.path(), &SYSTEM[1..]);
        let folder = root.path().join("usr/lib/x86_64-linux-gnu");
        for (version, fits) in [
            ("1.8.28.0", false),
            ("1.14.39.0", true),
            ("1.15.55.0", true),
        ] {
            let file = format!("libibverbs.so.{version}");
            fs::write(folder.join(&file), "").unwrap();
            symlink(&file, folder.join("libibverbs.so.1")).unwrap();
            let seen = view(&root, settings("rc", "rxe0:1"));
            assert_eq!(seen.replacement().is_some(), fits, "{version}");
            assert_eq!(seen.without_any_provider().is_empty(), fits, "{version}");
            let texts = seen.complaints();
            assert_eq!(texts[0].contains("too old"), !fits, "{texts:?}");
            fs::remove_file(folder.join("libibverbs.so.1")).unwrap();
        }
    }

    #[test]
    fn a_system_without_the_provider_is_named_if_nixl_uses_it() {
        let root = host();
        touch(root.path(), &SYSTEM[..1]);
        let built_here = root.path().join("opt/nixl/libnixl_capi.so");
        let seen = View::new(root.path(), &built_here, settings("rc", "rxe0:1"));
        let texts = seen.complaints();
        assert!(
            texts[0].contains("usr/lib/x86_64-linux-gnu/libibverbs.so.1"),
            "{texts:?}"
        );
        touch(root.path(), SYSTEM);
        let seen = View::new(root.path(), &built_here, settings("rc", "rxe0:1"));
        assert_eq!(seen.complaints(), [""; 0]);
        assert!(seen.is_usable());
    }

    #[test]
    fn devices_that_are_not_there_down_or_hidden_are_named() {
        let empty = tempfile::tempdir().unwrap();
        let complain = |root: &tempfile::TempDir, tls: &str, net_devices: &str| {
            view(root, settings(tls, net_devices)).complaints()
        };
        for tls in ["", "^tcp", "tcp,self", "all"] {
            assert_eq!(
                complain(&empty, tls, ""),
                [""; 0],
                "{tls}: RDMA is not asked for"
            );
        }
        assert!(complain(&empty, "ib,sm,self,cuda", "")[0].contains("no RDMA device"));
        let root = host();
        touch(root.path(), SYSTEM);
        let texts = complain(&root, "rc", "mlx5_0:1,mlx5_7:1,eth0");
        assert_eq!(texts.len(), 1, "{texts:?}");
        assert!(texts[0].contains("names mlx5_7:1"), "{texts:?}");
        add(root.path(), "mlx5_1", Some("mlx5_core"), "DOWN");
        let texts = complain(&root, "rc", "mlx5_1:1");
        assert!(
            texts[0].contains("port 1 of the RDMA device mlx5_1 is down"),
            "{texts:?}"
        );
        fs::remove_file(root.path().join("dev/infiniband/uverbs0")).unwrap();
        let texts = complain(&root, "rc", "mlx5_0:1");
        assert!(texts[0].contains("/dev/infiniband/uverbs*"), "{texts:?}");
    }
}
