//! The identity of this host. Two processes with the same identity can watch each other.

use std::sync::OnceLock;

/// Returns the boot id and the PID namespace. Two processes with equal values can see each other's process
/// ids.
pub(crate) fn identity() -> String {
    static IDENTITY: OnceLock<String> = OnceLock::new();
    IDENTITY
        .get_or_init(|| {
            let boot = read_boot();
            let namespace = std::fs::read_link("/proc/self/ns/pid");
            match (boot, namespace) {
                (Ok(boot), Ok(namespace)) => format!("{boot}/{}", namespace.display()),
                // A random identity differs from every other identity, so that this process never watches
                // a process of another host by mistake.
                _ => format!("unknown-{:016x}", rand::random::<u64>()),
            }
        })
        .clone()
}

/// Returns the boot id of this host; a random text if the boot id is not known.
pub(crate) fn boot() -> String {
    read_boot().unwrap_or_else(|_| format!("unknown-{:016x}", rand::random::<u64>()))
}

fn read_boot() -> std::io::Result<String> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(boot.trim().to_owned())
}
