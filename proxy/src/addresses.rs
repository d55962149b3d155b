//! Where to listen, in the words of LMCache's example proxy, so that its launch line works as it stands.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};

use clap::Args;

/// Hosts and ports apart, hosts by name. Without environment variables: Kubernetes sets `PD_PROXY_PORT`
/// to a URL in every pod that can see a service `pd-proxy`.
#[derive(Clone, Debug, Default, Args)]
pub struct Addresses {
    /// As in LMCache's example proxy: the host of --listen.
    #[arg(long, value_name = "HOST", conflicts_with = "listen")]
    pub host: Option<String>,

    /// Its port.
    #[arg(long, value_name = "PORT", conflicts_with = "listen")]
    pub port: Option<u16>,

    /// As in LMCache's example proxy: the host of --registration.
    #[arg(long, value_name = "HOST", conflicts_with = "registration")]
    pub proxy_host: Option<String>,

    /// Its port.
    #[arg(long, value_name = "PORT", conflicts_with = "registration")]
    pub proxy_port: Option<u16>,
}

impl Addresses {
    /// Puts what is given in the place of what is in the two addresses.
    ///
    /// # Errors
    /// Every host that is not known here.
    pub fn replace(
        &self,
        listen: &mut SocketAddr,
        registration: &mut SocketAddr,
    ) -> Result<(), Vec<String>> {
        let mut problems = Vec::new();
        let given = [
            ("--host", &self.host, self.port, listen),
            (
                "--proxy-host",
                &self.proxy_host,
                self.proxy_port,
                registration,
            ),
        ];
        for (flag, host, port, address) in given {
            if let Some(port) = port {
                address.set_port(port);
            }
            match host.as_deref().map(resolve).transpose() {
                Ok(Some(ip)) => address.set_ip(ip),
                Ok(None) => {}
                Err(why) => problems.push(format!("{flag}: {why}")),
            }
        }
        if problems.is_empty() {
            Ok(())
        } else {
            Err(problems)
        }
    }
}

/// The first address of version 4, if it has any: `localhost` is 127.0.0.1 for everybody else, too.
fn resolve(host: &str) -> Result<IpAddr, String> {
    let found: Vec<_> = (host, 0)
        .to_socket_addrs()
        .map_err(|e| format!("{host} has no address: {e}"))?
        .collect();
    let first = found.iter().find(|at| at.is_ipv4()).or(found.first());
    first
        .map(SocketAddr::ip)
        .ok_or_else(|| format!("{host} has no address"))
}
