//! Lists the RDMA devices that the kernel shows, with the provider library that each of them needs.

use std::fmt;
use std::fs;
use std::path::Path;

/// An RDMA device of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    /// The name, as `UCX_NET_DEVICES` uses it before the colon.
    pub(crate) name: String,
    /// The ports, sorted by number.
    pub(crate) ports: Vec<Port>,
    /// The kernel's driver, or the best guess.
    pub(crate) driver: String,
    /// The name of the provider of libibverbs: `rxe` for `librxe-rdmav34.so`.
    pub(crate) provider: String,
}

/// A port of an RDMA device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Port {
    /// The number; the first port is 1.
    pub(crate) number: String,
    /// The kernel's word for the state of the link, for example `ACTIVE` or `DOWN`; empty if it is unknown.
    pub(crate) state: String,
}

impl Device {
    /// Returns the ports in the form of `UCX_NET_DEVICES`.
    pub(crate) fn ucx_names(&self) -> impl Iterator<Item = String> {
        let name = |port: &Port| format!("{}:{}", self.name, port.number);
        self.ports.iter().map(name)
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (driver {}", self.name, self.driver)?;
        for Port { number, state } in &self.ports {
            let state = if state.is_empty() { "unknown" } else { state };
            write!(f, ", port {number} {state}")?;
        }
        f.write_str(")")
    }
}

/// Returns the devices below `root`, sorted by name. `root` is `/`, or a test's own folder.
pub(crate) fn all(root: &Path) -> Vec<Device> {
    let class = root.join("sys/class/infiniband");
    let device = |name: String| {
        let folder = class.join(&name);
        let port = |number: String| {
            // The file has a number and a word: `4: ACTIVE`.
            let text = read(&folder.join("ports").join(&number).join("state"));
            let state = text
                .rsplit(':')
                .next()
                .unwrap_or_default()
                .trim()
                .to_owned();
            Port { number, state }
        };
        let ports = names(&folder.join("ports")).into_iter().map(port).collect();
        let driver = driver(&folder, &name);
        let provider = provider(&driver).to_owned();
        Device {
            name,
            ports,
            driver,
            provider,
        }
    };
    names(&class).into_iter().map(device).collect()
}

/// Returns the driver of a device.
fn driver(folder: &Path, name: &str) -> String {
    // SoftRoCE names its network interface in the file `parent`, which no other driver has. Its link `device`, if there
    // is one, points to the card of that interface and so to another driver.
    if folder.join("parent").exists() {
        return "rxe".to_owned();
    }
    let link = fs::read_link(folder.join("device/driver"));
    let driver = link.ok().and_then(|link| {
        let name = link.file_name()?.to_str()?;
        Some(name.to_owned())
    });
    // A device without a card has only its name, which usually begins with the driver's.
    driver.unwrap_or_else(|| {
        let end = name.trim_end_matches(|c: char| c.is_ascii_digit() || c == '_');
        end.to_owned()
    })
}

/// Returns the provider for a kernel driver. Most providers have their driver's name.
fn provider(driver: &str) -> &str {
    let known = PROVIDERS
        .iter()
        .find(|(drivers, _)| drivers.contains(&driver));
    known.map_or(driver, |(_, provider)| provider)
}

/// The providers that have another name than the driver of the card. Such a driver often serves the card's Ethernet
/// side, and a second driver, which the link `device` does not show, serves RDMA.
const PROVIDERS: &[(&[&str], &str)] = &[
    (&["mlx5_core", "mlx5_ib"], "mlx5"),
    (&["mlx4_core", "mlx4_ib"], "mlx4"),
    (&["bnxt_en"], "bnxt_re"),
    (&["ice", "i40e", "i40iw", "idpf"], "irdma"),
    (&["qede"], "qedr"),
    (&["hns3", "hns_roce", "hns_roce_hw_v2"], "hns"),
    (&["hfi1"], "hfi1verbs"),
    (&["ib_qib", "qib"], "ipathverbs"),
    (&["be2net"], "ocrdma"),
    (&["ib_mthca"], "mthca"),
    (&["mana_ib"], "mana"),
    (&["ionic_rdma"], "ionic"),
];

/// Returns the sorted names of a folder's entries; empty if the folder cannot be read.
pub(super) fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

/// Returns the text of a file; empty if the file cannot be read.
fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

#[cfg(test)]
pub(super) mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// Makes a device as the kernel shows it. `driver` is the driver of its card; `None` means SoftRoCE.
    pub(in super::super) fn add(root: &Path, name: &str, driver: Option<&str>, state: &str) {
        let folder = root.join("sys/class/infiniband").join(name);
        fs::create_dir_all(folder.join("ports/1")).unwrap();
        fs::write(folder.join("ports/1/state"), format!("4: {state}\n")).unwrap();
        match driver {
            Some(driver) => {
                fs::create_dir(folder.join("device")).unwrap();
                symlink(
                    format!("../../../../bus/pci/drivers/{driver}"),
                    folder.join("device/driver"),
                )
                .unwrap();
            }
            None => fs::write(folder.join("parent"), "eth0\n").unwrap(),
        }
    }

    #[test]
    fn each_device_needs_the_provider_of_its_driver() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(all(root.path()), []);
        let cards = [
            ("bnxt_re0", "bnxt_en", "bnxt_re"),
            ("efa_0", "efa", "efa"),
            ("erdma_0", "erdma", "erdma"),
            ("irdma0", "ice", "irdma"),
            ("mlx5_0", "mlx5_core", "mlx5"),
            ("new0", "new_driver", "new_driver"),
        ];
        for (name, driver, _) in cards {
            add(root.path(), name, Some(driver), "ACTIVE");
        }
        let found = all(root.path());
        assert_eq!(found.len(), cards.len());
        for (device, (name, driver, provider)) in found.iter().zip(cards) {
            assert_eq!(
                (&*device.name, &*device.driver, &*device.provider),
                (name, driver, provider)
            );
        }
    }

    /// A SoftRoCE device over a card has that card's link `device`.
    #[test]
    fn softroce_over_a_card_needs_its_own_provider() {
        let root = tempfile::tempdir().unwrap();
        add(root.path(), "rxe0", Some("mlx5_core"), "DOWN");
        let folder = root.path().join("sys/class/infiniband/rxe0");
        fs::write(folder.join("parent"), "eth0\n").unwrap();
        fs::create_dir_all(folder.join("ports/2")).unwrap();
        add(root.path(), "siw_0", None, "ACTIVE");
        fs::remove_file(root.path().join("sys/class/infiniband/siw_0/parent")).unwrap();
        let found = all(root.path());
        assert_eq!(found[0].provider, "rxe");
        assert_eq!(
            found[0].to_string(),
            "rxe0 (driver rxe, port 1 DOWN, port 2 unknown)"
        );
        assert_eq!(
            found[0].ucx_names().collect::<Vec<_>>(),
            ["rxe0:1", "rxe0:2"]
        );
        assert_eq!(found[1].provider, "siw");
    }
}
