//! The flag that names the engines whose KV events the proxy reads.

use std::str::FromStr;

use crate::fleet::instance::Instance;

/// The place at which an engine publishes its KV events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvEventsAt {
    /// Id of the instance; `*` for all instances without an entry of their own.
    id: String,
    /// Host of the publisher; the host of the engine's HTTP server if empty.
    host: String,
    /// Port of the first rank; the port of each further rank is one higher.
    pub(crate) port: u16,
    /// Port of the first rank at which missed events can be asked for; `None` if the engine has none.
    pub(crate) replay: Option<u16>,
    /// Number of data-parallel ranks.
    pub(crate) ranks: u16,
}

impl KvEventsAt {
    /// Returns the entry for an instance; `None` if the instance publishes no events.
    pub(crate) fn of<'a>(all: &'a [Self], instance: &Instance) -> Option<&'a Self> {
        let named = |id: &str| all.iter().find(|at| at.id == id);
        named(&instance.id).or_else(|| named("*"))
    }

    /// Returns the host of the publisher of this instance.
    pub(crate) fn host<'a>(&'a self, instance: &'a Instance) -> &'a str {
        match self.host.is_empty() {
            true => instance.http.host(),
            false => &self.host,
        }
    }
}

impl FromStr for KvEventsAt {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not ID=[HOST]:PORT[/REPLAY_PORT][xRANKS]");
        let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0);
        let (id, at) = text
            .split_once('=')
            .filter(|(id, _)| !id.is_empty())
            .ok_or_else(wrong)?;
        let (host, rest) = at.rsplit_once(':').ok_or_else(wrong)?;
        let (ports, ranks) = rest.split_once('x').unwrap_or((rest, "1"));
        let (first, replay) = match ports.split_once('/') {
            Some((first, replay)) => (first, Some(port(replay).ok_or_else(wrong)?)),
            None => (ports, None),
        };
        let ranks = ranks.parse().ok().filter(|ranks| RANKS.contains(ranks));
        let (first, ranks) = (port(first).ok_or_else(wrong)?, ranks.ok_or_else(wrong)?);
        if replay.unwrap_or(0).max(first).checked_add(ranks).is_none() {
            return Err(wrong());
        }
        Ok(Self {
            id: id.to_owned(),
            host: host.to_owned(),
            port: first,
            replay,
            ranks,
        })
    }
}

/// Numbers of data-parallel ranks behind one HTTP server.
const RANKS: std::ops::RangeInclusive<u16> = 1..=64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places() {
        let check = |text: &str, id: &str, host: &str, ports: (u16, Option<u16>, u16)| {
            let at: KvEventsAt = text.parse().unwrap();
            assert_eq!((&*at.id, &*at.host), (id, host), "{text}");
            assert_eq!((at.port, at.replay, at.ranks), ports, "{text}");
        };
        check("*=:5557", "*", "", (5557, None, 1));
        check(
            "h:1=10.0.0.1:5557/5600",
            "h:1",
            "10.0.0.1",
            (5557, Some(5600), 1),
        );
        check("p1=[::1]:5557/5600x8", "p1", "[::1]", (5557, Some(5600), 8));
        check("p1=h:5557x2", "p1", "h", (5557, None, 2));
        for wrong in [
            "",
            "p1",
            "=:1",
            "p1=1",
            "p1=:0",
            "p1=:1x0",
            "p1=:1x65",
            "p1=:65530x9",
            "p1=:1/x2",
        ] {
            assert!(wrong.parse::<KvEventsAt>().is_err(), "{wrong}");
        }
    }
}
