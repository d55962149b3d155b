//! The addresses at which the proxy listens.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};

use clap::Args;
use clap::builder::BoolishValueParser;

/// The proxy's addresses, and the permission to use addresses other than loopback.
#[derive(Clone, Debug, Args)]
pub struct Addresses {
    /// Address of the OpenAI-compatible HTTP server.
    #[arg(
        long,
        env = "PD_PROXY_LISTEN",
        default_value = "127.0.0.1:8000",
        value_name = "HOST:PORT",
        value_parser = address
    )]
    listen: SocketAddr,

    /// Address of the registration port: sidecars connect to it (ZeroMQ PUSH).
    #[arg(
        long,
        env = "PD_PROXY_REGISTRATION",
        default_value = "127.0.0.1:7500",
        value_name = "HOST:PORT",
        value_parser = address
    )]
    registration: SocketAddr,

    // The flags `--host`, `--port`, `--proxy-host` and `--proxy-port` have no environment variables:
    // Kubernetes sets `PD_PROXY_PORT` to a URL in every pod that can see a service `pd-proxy`.
    /// Host of `--listen`, under the name that LMCache's example proxy uses.
    #[arg(long, value_name = "HOST", value_parser = host)]
    host: Option<IpAddr>,

    /// Port of `--listen`.
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,

    /// Host of `--registration`.
    #[arg(long, value_name = "HOST", value_parser = host)]
    proxy_host: Option<IpAddr>,

    /// Port of `--registration`.
    #[arg(long, value_name = "PORT")]
    proxy_port: Option<u16>,

    /// Address at which vLLM's P2P NCCL instances register (ZeroMQ ROUTER, usually port 30001). Without this
    /// address, the proxy opens no such port.
    #[arg(
        long,
        env = "PD_PROXY_P2P_REGISTRATION",
        value_name = "HOST:PORT",
        value_parser = address
    )]
    pub p2p_registration: Option<SocketAddr>,

    /// Permits addresses other than loopback for ports whose peers need no key: `--listen` without `--api-key`,
    /// `--registration` without `--auth require`, and `--p2p-registration`. Every process that reaches such a port can send
    /// requests, or register an instance, which then gets requests.
    #[arg(long, env = "PD_PROXY_INSECURE", value_parser = BoolishValueParser::new())]
    pub insecure: bool,
}

impl Addresses {
    /// Returns the address of the HTTP server: `--listen`, with its host and port replaced by `--host` and
    /// `--port`.
    pub fn listen(&self) -> SocketAddr {
        moved(self.listen, self.host, self.port)
    }

    /// Returns the address of the registration port: `--registration`, with its host and port replaced by
    /// `--proxy-host` and `--proxy-port`.
    pub fn registration(&self) -> SocketAddr {
        moved(self.registration, self.proxy_host, self.proxy_port)
    }

    /// Returns all problems of the addresses, so that a user can correct all of them at once; empty if there
    /// is no problem.
    pub(crate) fn problems(&self, closed: Closed) -> Vec<String> {
        let mut problems = Vec::new();
        let (listen, registration) = (self.listen(), self.registration());
        let p2p = self.p2p_registration.map(|at| {
            let cure = "the P2P NCCL instances there prove no key";
            ("--p2p-registration", at, false, cure)
        });
        let ports = [
            (
                "--listen",
                listen,
                closed.clients,
                "set --api-key or --api-key-file for its clients",
            ),
            (
                "--registration",
                registration,
                closed.sidecars,
                "set --auth require with --key-file and --roster",
            ),
        ];
        for (flag, address, closed, cure) in ports.into_iter().chain(p2p) {
            if !address.ip().is_loopback() && !closed && !self.insecure {
                problems.push(format!(
                    "{flag} {address} is not a loopback address, and peers need no key there: {cure}; or give a \
                     loopback address, for example 127.0.0.1:{}, or add --insecure if the network itself keeps \
                     strangers out",
                    address.port()
                ));
            }
        }
        if listen == registration && listen.port() != 0 {
            problems.push(format!(
                "--listen and --registration are both {listen}: give them different ports"
            ));
        }
        problems
    }
}

/// The ports whose peers need a key.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Closed {
    /// True if clients need a key.
    pub(crate) clients: bool,
    /// True if sidecars need a key.
    pub(crate) sidecars: bool,
}

/// Returns `address` with the host and the port replaced, if they are given.
fn moved(address: SocketAddr, host: Option<IpAddr>, port: Option<u16>) -> SocketAddr {
    SocketAddr::new(host.unwrap_or(address.ip()), port.unwrap_or(address.port()))
}

/// Parses `IP:PORT` or `NAME:PORT`.
fn address(text: &str) -> Result<SocketAddr, String> {
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    if let Some((host, port)) = text.rsplit_once(':') {
        if host.contains(':') && !host.starts_with('[') {
            return Err(
                "is IPv6 without brackets, so the port is not clear: write [ADDRESS]:PORT".into(),
            );
        }
        let bare = host.strip_prefix('[').and_then(|at| at.strip_suffix(']'));
        // Rust's parser refuses an address with a zone (fe80::1%eth0); the resolver accepts it.
        if let (Some(host), Ok(port)) = (bare, port.parse::<u16>())
            && let Some(found) = first((host, port).to_socket_addrs().ok())
        {
            return Ok(found);
        }
    }
    first(text.to_socket_addrs().ok()).ok_or_else(|| {
        "is neither IP:PORT nor NAME:PORT with a name that this host can resolve".into()
    })
}

/// Parses an IP address, with or without brackets, or resolves a name.
fn host(text: &str) -> Result<IpAddr, String> {
    let bare = text.strip_prefix('[').and_then(|at| at.strip_suffix(']'));
    let found = first((bare.unwrap_or(text), 0).to_socket_addrs().ok());
    Ok(found
        .ok_or("is neither an IP address nor a name that this host can resolve")?
        .ip())
}

/// Returns a name's first IPv4 address, or its first address if none is IPv4. Other programs use the IPv4
/// address when they connect to the name.
fn first(found: Option<impl Iterator<Item = SocketAddr>>) -> Option<SocketAddr> {
    let all: Vec<_> = found?.collect();
    all.iter()
        .find(|one| one.is_ipv4())
        .or(all.first())
        .copied()
}

#[cfg(test)]
mod tests;
