//! The ports and addresses that the configuration binds.

use std::io::ErrorKind;
use std::net::TcpListener;
use std::ops::RangeInclusive;

use common::socket_owner;

use super::finding::{Results, kinds};
use super::subject::{Host, Subject};
use crate::config::Config;

kinds! {
    TAKEN = Error "port-taken":
        "the sidecar cannot bind the port, and ends at its start";
        "end the other process, or choose another port; two sidecars of a host need different ports";
    ADDRESS = Error "address-absent":
        "the sidecar binds its ports to this address, which no network interface of this host (or container) has";
        "write an address of this host (`ip address`), or 0.0.0.0 with sidecar.advertise_host";
    FORBIDDEN = Error "port-forbidden":
        "only root may bind low ports";
        "choose a port from 1024 on";
    EPHEMERAL = Warning "port-ephemeral":
        "the kernel gives ports of this range to outgoing connections, so at a restart the port may be taken";
        "choose a port outside the range, or add it to net.ipv4.ip_local_reserved_ports";
}

/// Tries to bind each port, if no sidecar of this configuration runs.
pub(super) fn look(subject: &Subject<'_>, results: &mut Results) {
    let Some(config) = subject.config else { return };
    let ports = ports(config);
    let named = ports
        .iter()
        .map(|port| format!("{} {}", port.name, port.number));
    results.fact("ports", named.collect::<Vec<_>>().join(", "));
    let mut absent = Vec::new();
    for port in &ports {
        if !subject.is_running {
            bind(port, &mut absent, results);
        }
        if let Some(range) = ephemeral(subject.host, port.number) {
            let seen = format!(
                "the {} port {} is in the range {}-{}",
                port.name,
                port.number,
                range.start(),
                range.end()
            );
            results.add(&EPHEMERAL, seen);
        }
    }
}

/// A port that the sidecar binds.
#[derive(Debug)]
struct Port<'a> {
    /// The channel, as in `check-config`.
    name: &'static str,
    host: &'a str,
    number: u16,
}

/// Returns the ports of a configuration, except those that the kernel chooses.
fn ports(config: &Config) -> Vec<Port<'_>> {
    let mut ports = Vec::new();
    if let Some(listen) = &config.listen {
        for rank in &listen.ranks {
            let of_rank = [
                ("init", rank.init),
                ("alloc", rank.alloc),
                ("query", rank.query.unwrap_or(0)),
                ("data", rank.tcp),
            ];
            ports.extend(of_rank.map(|(name, number)| Port {
                name,
                host: &listen.host,
                number,
            }));
        }
    }
    if let Some(fetch) = config.fetch.as_ref().filter(|fetch| fetch.port != 0) {
        let ranks = u16::try_from(config.ranks).unwrap_or(u16::MAX);
        ports.extend((0..ranks).map(|rank| Port {
            name: "fetch",
            host: &fetch.host,
            number: fetch.port.saturating_add(rank),
        }));
    }
    ports.push(Port {
        name: "admin",
        host: &config.admin.host,
        number: config.admin.port,
    });
    ports.retain(|port| port.number != 0);
    ports
}

/// Binds a port for a moment. `absent` has the addresses that are already reported.
fn bind<'a>(port: &Port<'a>, absent: &mut Vec<&'a str>, results: &mut Results) {
    let Err(error) = TcpListener::bind((port.host, port.number)) else {
        return;
    };
    let (name, host, number) = (port.name, port.host, port.number);
    match error.kind() {
        ErrorKind::AddrInUse => {
            let holder = socket_owner::holder(number);
            let holder = holder.unwrap_or_else(|| "an unknown process".to_owned());
            results.add(
                &TAKEN,
                format!("the {name} port {host}:{number} is taken by {holder}"),
            );
        }
        ErrorKind::PermissionDenied => {
            let seen = format!("this user may not bind the {name} port {host}:{number}");
            results.add(&FORBIDDEN, seen);
        }
        _ if absent.contains(&host) => {}
        _ => {
            absent.push(host);
            results.add(
                &ADDRESS,
                format!("{host}, for the {name} port {number}: {error}"),
            );
        }
    }
}

/// Returns the range of the ports of outgoing connections, if the port is in it and not reserved.
fn ephemeral(host: &Host, port: u16) -> Option<RangeInclusive<u16>> {
    let text = host.read("/proc/sys/net/ipv4/ip_local_port_range")?;
    let mut numbers = text.split_ascii_whitespace().map(str::parse);
    let range = numbers.next()?.ok()?..=numbers.next()?.ok()?;
    let reserved = host
        .read("/proc/sys/net/ipv4/ip_local_reserved_ports")
        .unwrap_or_default();
    let is_reserved = reserved.split(',').any(|part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let ends = (first.trim().parse::<u16>(), last.trim().parse::<u16>());
        matches!(ends, (Ok(first), Ok(last)) if (first..=last).contains(&port))
    });
    (range.contains(&port) && !is_reserved).then_some(range)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reserved_port_is_not_ephemeral() {
        let folder = tempfile::tempdir().unwrap();
        let ipv4 = folder.path().join("proc/sys/net/ipv4");
        std::fs::create_dir_all(&ipv4).unwrap();
        std::fs::write(ipv4.join("ip_local_port_range"), "32768\t60999\n").unwrap();
        std::fs::write(ipv4.join("ip_local_reserved_ports"), "40000,50000-50002\n").unwrap();
        let host = Host::below(folder.path());
        for (port, expect) in [
            (7300, false),
            (32_768, true),
            (40_000, false),
            (50_001, false),
            (50_003, true),
        ] {
            assert_eq!(ephemeral(&host, port).is_some(), expect, "{port}");
        }
    }
}
