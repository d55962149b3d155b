//! Checks the proxy's address, and the address at which the proxy calls back.

use super::{computed, key, value};
use crate::config::keys::{Lmcache, Sidecar};
use crate::config::layers::{Layers, Source};
use crate::config::mooncake::Mooncake;
use crate::config::value::{HostPort, Role, Url, is_wildcard};
use crate::config::{Proxy, ProxyAddress};

pub(super) fn proxy(
    layers: &mut Layers,
    lmcache: &Lmcache,
    sidecar: &Sidecar,
    mooncake: &Mooncake,
    role: Role,
    admin: &HostPort,
    fetches: bool,
) -> Option<Proxy> {
    let theirs = lmcache_proxy(layers, lmcache, sidecar.proxy.is_some());
    let address = match (&sidecar.proxy, theirs) {
        (Some(ours), theirs) => {
            if let Some(theirs) = theirs.filter(|t| *t != ours.value) {
                layers.warnings.push(format!(
                    "pd_proxy_host and pd_proxy_port name {theirs}: ignored, because sidecar.proxy is {} ({})",
                    ours.value, ours.source
                ));
            }
            Some(ours.value.clone())
        }
        (None, Some(theirs)) => {
            let source = Source::Key("pd_proxy_host, pd_proxy_port".to_owned());
            layers.computed("sidecar.proxy", theirs.to_string(), &source);
            Some(theirs)
        }
        (None, None) => None,
    };
    // The proxy sends requests to the engine's URL, so a registration without this URL would be useless.
    let engine_url = computed(layers, "engine_url", sidecar.engine_url.as_ref(), || {
        let port = if role == Role::Sender { 8100 } else { 8200 };
        Url(format!("http://127.0.0.1:{port}"))
    });
    let skip = value(&lmcache.pd_skip_proxy_notification).unwrap_or(false);
    let period = value(&sidecar.register_ms)?.0;
    // The sidecar asks a metadata server for the proxy only if no key names the proxy.
    if let (None, Some(metadata), false) = (&address, &mooncake.metadata, skip) {
        let address = ProxyAddress::AskedFor(metadata.clone());
        let source = Source::Key("metadata_server".to_owned());
        layers.computed("sidecar.proxy", address.to_string(), &source);
        return Some(Proxy {
            address,
            engine_url: engine_url.0,
            period,
            may_be_lmcaches: false,
        });
    }
    let Some(address) = address.filter(|_| !skip) else {
        // With a fetch port, routers need to know nothing about the sidecar.
        if !fetches {
            layers.warnings.push(
                "no proxy is configured, so this sidecar registers nowhere: the program that routes requests \
                 must know the sidecar's ports and wait for the prefill leg"
                    .to_owned(),
            );
        }
        return None;
    };
    // The mistake is reported at the key from which the address comes.
    if address.port == 0 || is_wildcard(&address.host) {
        if let Some(given) = &sidecar.proxy {
            layers.wrong(
                "sidecar.proxy",
                given,
                "port 0 and wildcard hosts are not addresses to connect to",
                "write the proxy's host and port",
            );
        } else if let Some(given) = &lmcache.pd_proxy_port {
            layers.wrong(
                "pd_proxy_port",
                given,
                "port 0 and wildcard hosts are not addresses to connect to",
                "write the proxy's host and port",
            );
        }
    }
    // If the proxy is on another machine, its call-back cannot reach a loopback port. Without this warning,
    // the sidecar would start but never become ready, and the user would not know why.
    if !address.is_loopback() && admin.is_loopback() {
        layers.warnings.push(format!(
            "the proxy {address} is on another machine and cannot reach the admin server at {admin}, so this \
             sidecar would never be ready; set sidecar.admin to an address that the proxy reaches"
        ));
    }
    Some(Proxy {
        address: ProxyAddress::At(address),
        engine_url: engine_url.0,
        period,
        may_be_lmcaches: sidecar.proxy.is_none(),
    })
}

fn lmcache_proxy(layers: &mut Layers, lmcache: &Lmcache, ours: bool) -> Option<HostPort> {
    match (&lmcache.pd_proxy_host, &lmcache.pd_proxy_port) {
        (Some(host), Some(port)) => Some(HostPort {
            host: host.value.0.clone(),
            port: port.value.0,
        }),
        (Some(_), None) if !ours => {
            layers.missing(
                key(Lmcache::KEYS, "pd_proxy_port"),
                ", and required because pd_proxy_host is set",
            );
            None
        }
        (None, Some(_)) if !ours => {
            layers.missing(
                key(Lmcache::KEYS, "pd_proxy_host"),
                ", and required because pd_proxy_port is set",
            );
            None
        }
        _ => None,
    }
}

pub(super) fn admin_host(
    layers: &mut Layers,
    sidecar: &Sidecar,
    admin: &HostPort,
    called: bool,
) -> String {
    if !is_wildcard(&admin.host) {
        return admin.host.clone();
    }
    match (&sidecar.advertise_host, &sidecar.admin) {
        (Some(host), _) => return host.value.0.clone(),
        (None, Some(given)) if called => layers.wrong(
            "sidecar.admin",
            given,
            "the proxy cannot call back a wildcard address",
            "write the address of one interface, or set sidecar.advertise_host",
        ),
        _ => {}
    }
    admin.host.clone()
}
