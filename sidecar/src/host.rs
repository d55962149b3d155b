//! Which host this is, as far as watching a process goes.

use std::sync::OnceLock;

/// Boot id and PID namespace: equal for two processes that can see each other's process ids.
pub(crate) fn identity() -> String {
    static IDENTITY: OnceLock<String> = OnceLock::new();
    IDENTITY
        .get_or_init(|| {
            let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
            let namespace = std::fs::read_link("/proc/self/ns/pid");
            match (boot, namespace) {
                (Ok(boot), Ok(namespace)) => format!("{}/{}", boot.trim(), namespace.display()),
                // An identity that no other process has: nobody is watched by mistake.
                _ => format!("unknown-{:016x}", rand::random::<u64>()),
            }
        })
        .clone()
}
