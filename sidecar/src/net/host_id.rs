//! Which host this is, as far as watching a process goes.

use std::sync::OnceLock;

/// Boot id and PID namespace: equal for two processes that can see each other's process ids.
pub(crate) fn identity() -> String {
    static IDENTITY: OnceLock<String> = OnceLock::new();
    IDENTITY
        .get_or_init(|| {
            let boot = read_boot();
            let namespace = std::fs::read_link("/proc/self/ns/pid");
            match (boot, namespace) {
                (Ok(boot), Ok(namespace)) => format!("{boot}/{}", namespace.display()),
                // An identity that no other process has: nobody is watched by mistake.
                _ => format!("unknown-{:016x}", rand::random::<u64>()),
            }
        })
        .clone()
}

/// Which start of this host's kernel; nobody else has it if it is not known.
pub(crate) fn boot() -> String {
    read_boot().unwrap_or_else(|_| format!("unknown-{:016x}", rand::random::<u64>()))
}

fn read_boot() -> std::io::Result<String> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(boot.trim().to_owned())
}
