//! The flags of LMCache's example proxy.

use std::net::Ipv6Addr;

use protocol::registration::InstanceRole;

use super::Sources;
use crate::connectors::Connector;
use crate::fleet::instance::Named;

impl Sources {
    /// Returns the instances that the flags name. Hosts and ports are combined as in LMCache's example
    /// proxy. If the flags give one host, one port and a count, the host gets this number of
    /// consecutive ports, beginning with the given port. A single host is combined with each port, and
    /// a single port with each host. With several hosts and several ports, the n-th host gets the n-th
    /// port.
    pub(super) fn lmcache(&self) -> Result<Vec<Named>, String> {
        let mut all = Vec::new();
        let prefillers = pairs(
            "prefiller",
            (&self.prefiller_host, 8100),
            &self.prefiller_port,
            self.num_prefillers,
        )?;
        for (host, port) in prefillers {
            all.push(named(InstanceRole::Prefill, &host, port, &[], &[])?);
        }
        let decoders = pairs(
            "decoder",
            (&self.decoder_host, 8200),
            &self.decoder_port,
            self.num_decoders,
        )?;
        let consecutive = self.decoder_host.len() <= 1
            && self.decoder_port.len() <= 1
            && self.num_decoders.is_some_and(|count| count > 1);
        for (n, (host, port)) in (0_u16..).zip(decoders) {
            let added = if consecutive { n } else { 0 };
            let ports = |given: &[u16], usual: u16| {
                let given = if given.is_empty() { &[usual] } else { given };
                let moved = given.iter().map(|port| port.checked_add(added));
                moved.collect::<Option<Vec<_>>>()
            };
            let (Some(init), Some(alloc)) = (
                ports(&self.decoder_init_port, 8300),
                ports(&self.decoder_alloc_port, 8400),
            ) else {
                return Err("--num-decoders: the last port would be above 65535".into());
            };
            all.push(named(InstanceRole::Decode, &host, port, &init, &alloc)?);
        }
        Ok(all)
    }
}

fn named(
    role: InstanceRole,
    host: &str,
    port: u16,
    init: &[u16],
    alloc: &[u16],
) -> Result<Named, String> {
    if port == 0 {
        return Err("port 0 cannot be used: give a port from 1 to 65535".into());
    }
    let host = host
        .strip_prefix('[')
        .and_then(|at| at.strip_suffix(']'))
        .unwrap_or(host);
    let shown = match host.parse::<Ipv6Addr>() {
        Ok(address) => format!("[{address}]"),
        Err(_) if host.contains('%') => format!("[{host}]"),
        Err(_) => host.to_owned(),
    };
    Ok(Named {
        role,
        url: format!("http://{shown}:{port}"),
        id: None,
        connector: Connector::Lmcache,
        host: Some(host.to_owned()),
        init_ports: init.to_vec(),
        alloc_ports: alloc.to_vec(),
        zmq: None,
        models: Vec::new(),
    })
}

fn pairs(
    kind: &str,
    (hosts, usual_port): (&[String], u16),
    ports: &[u16],
    count: Option<u16>,
) -> Result<Vec<(String, u16)>, String> {
    if hosts.is_empty() && ports.is_empty() && count.is_none() {
        return Ok(Vec::new());
    }
    let localhost = ["localhost".to_owned()];
    let hosts = if hosts.is_empty() { &localhost } else { hosts };
    let ports = if ports.is_empty() {
        &[usual_port]
    } else {
        ports
    };
    match (hosts, ports) {
        ([host], [port]) => {
            let port = |n| port.checked_add(n).map(|port| (host.clone(), port));
            let all: Option<Vec<_>> = (0..count.unwrap_or(1).max(1)).map(port).collect();
            all.ok_or_else(|| format!("--num-{kind}s: the last port would be above 65535"))
        }
        ([host], ports) => Ok(ports.iter().map(|port| (host.clone(), *port)).collect()),
        (hosts, [port]) => Ok(hosts.iter().map(|host| (host.clone(), *port)).collect()),
        (hosts, ports) if hosts.len() == ports.len() => {
            Ok(hosts.iter().cloned().zip(ports.iter().copied()).collect())
        }
        (hosts, ports) => Err(format!(
            "{} of --{kind}-host and {} of --{kind}-port: give one host, one port, or as many ports as hosts",
            hosts.len(),
            ports.len()
        )),
    }
}
