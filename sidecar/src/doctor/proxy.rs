//! The proxy's registration port.

use super::finding::{Results, kinds};
use super::reach::{self, Reach};
use super::subject::Subject;
use crate::config::ProxyAddress;

kinds! {
    UNREACHABLE = Error "proxy-unreachable":
        "the sidecar registers at this port, and the proxy sends no requests to an engine that is not registered";
        "start the proxy, correct sidecar.proxy (or pd_proxy_host and pd_proxy_port), or open the port in the firewall";
    WRONG_PORT = Error "proxy-wrong-port":
        "registrations go to the proxy's registration port, and the port for clients takes none";
        "name the port of pd-proxy's --registration (7500 by default), not the port of --listen";
}

/// Connects to the registration port.
pub(super) fn look(subject: &Subject<'_>, results: &mut Results) {
    let Some(config) = subject.config else { return };
    let Some(proxy) = &config.proxy else {
        results.fact("proxy", "none configured");
        return;
    };
    let ProxyAddress::At(address) = &proxy.address else {
        results.fact("proxy", format!("found through {}", proxy.address));
        return;
    };
    results.fact("proxy", format!("registration at {address}"));
    match reach::connect(address) {
        // With keys, the proxy waits for the TLS handshake and sends nothing first.
        Reach::Open(_) if config.identity.is_some() => {}
        Reach::Open(stream) => {
            if !reach::greets(stream) {
                results.add(
                    &WRONG_PORT,
                    format!("{address} accepts connections, but does not speak ZeroMQ"),
                );
            }
        }
        Reach::Refused => results.add(&UNREACHABLE, format!("no process listens at {address}")),
        Reach::Silent => {
            let seen = format!("{address} does not answer within {:?}", reach::BOUND);
            results.add(&UNREACHABLE, seen);
        }
        Reach::Nowhere(cause) => results.add(&UNREACHABLE, cause),
    }
}
