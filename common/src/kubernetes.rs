//! Environment variables that Kubernetes sets in each pod to describe services. Some of these variables have the same
//! names as our settings.

use std::net::SocketAddr;

/// Returns a note for the log if Kubernetes set this variable to describe a service; the program must then ignore the
/// variable. Returns `None` for all other variables.
///
/// For every service of its namespace, a pod gets `SERVICE_PORT=tcp://10.0.0.1:7500` and variables derived from it. If
/// the name of a service begins with our prefix, the variable can have the same name as a setting.
pub fn note(name: &str, value: &str) -> Option<String> {
    describes_service(name, value).then(|| {
        format!(
            "environment {name}={value}: ignored, because it describes a Kubernetes service (enableServiceLinks: \
             false in the pod's spec prevents such variables)"
        )
    })
}

fn describes_service(name: &str, value: &str) -> bool {
    let url = value.split_once("://").is_some_and(|(scheme, at)| {
        ["tcp", "udp", "sctp"].contains(&scheme) && at.parse::<SocketAddr>().is_ok()
    });
    let derived = name.split_once("_PORT_").is_some_and(|(_, rest)| {
        let mut words = rest.split('_');
        let number = words.next().is_some_and(|word| word.parse::<u16>().is_ok());
        number
            && words
                .next()
                .is_some_and(|word| ["TCP", "UDP", "SCTP"].contains(&word))
    });
    let service = name.ends_with("_SERVICE_HOST")
        || name.ends_with("_SERVICE_PORT")
        || name.contains("_SERVICE_PORT_");
    name.ends_with("_PORT") && url || derived || service
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_of_services_are_recognised() {
        let check = |name: &str, value: &str, noted: bool| {
            let note = note(name, value);
            assert_eq!(note.is_some(), noted, "{name}={value}");
            let start = format!("environment {name}={value}: ignored, ");
            assert!(note.is_none_or(|note| note.starts_with(&start)));
        };
        check("PD_PROXY_PORT", "tcp://10.0.0.1:7500", true);
        check("PD_PROXY_PORT", "udp://[fd00::1]:7500", true);
        check("PD_PROXY_PORT_7500_TCP", "tcp://10.0.0.1:7500", true);
        check("PD_PROXY_PORT_7500_TCP_ADDR", "10.0.0.1", true);
        check("PD_PROXY_SERVICE_HOST", "10.0.0.1", true);
        check("PD_PROXY_SERVICE_PORT_HTTP", "8000", true);
        // These are our settings.
        check("PD_PROXY_LISTEN", "10.0.0.1:8000", false);
        check("LMCACHE_PD_PROXY_PORT", "7500", false);
        check("LMCACHE_PD_PEER_INIT_PORT", "7300,7301", false);
    }
}
