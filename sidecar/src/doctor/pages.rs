//! The pages of running sidecars and proxies, as far as the doctor reads them.

use std::time::{Duration, SystemTime};

use common::http_get::{self, Page};
use serde::Deserialize;

use super::reach;

/// A program at a base URL.
#[derive(Debug)]
pub(super) struct Running {
    /// The base URL.
    pub(super) url: String,
    /// The difference between its clock and this host's clock; `None` if the answer has no date.
    pub(super) skew: Option<Duration>,
    pub(super) kind: Program,
}

/// The kind of a program, with the page that it shows.
#[derive(Debug)]
pub(super) enum Program {
    Sidecar(Box<Status>),
    Proxy(Vec<Instance>),
}

/// `/status` of a sidecar.
#[derive(Debug, Deserialize)]
pub(super) struct Status {
    pub(super) id: String,
    pub(super) role: String,
    pub(super) version: String,
    pub(super) reasons: Vec<String>,
    #[serde(default)]
    pub(super) unmoved: Option<String>,
    pub(super) ranks: Vec<Rank>,
    pub(super) links: Vec<Link>,
    pub(super) proxy: Option<ProxyPage>,
}

/// One role of one rank.
#[derive(Debug, Deserialize)]
pub(super) struct Rank {
    pub(super) side: String,
    pub(super) rank: u32,
    pub(super) quarantined: u32,
}

/// One link of a sender.
#[derive(Debug, Deserialize)]
pub(super) struct Link {
    pub(super) peer: String,
    pub(super) transport: String,
    pub(super) why: String,
    pub(super) measured_gb_per_s: Option<f64>,
}

/// The proxy as a sidecar knows it.
#[derive(Debug, Deserialize)]
pub(super) struct ProxyPage {
    pub(super) address: String,
    pub(super) calls_back: bool,
    pub(super) acknowledged_ms_ago: Option<u64>,
}

/// One element of the proxy's `/instances`.
#[derive(Debug, Deserialize)]
pub(super) struct Instance {
    pub(super) id: String,
    pub(super) role: String,
    pub(super) standing: Standing,
    #[serde(default)]
    pub(super) unfit: Option<serde_json::Value>,
    #[serde(default)]
    pub(super) release: String,
}

/// The readiness of an instance.
#[derive(Debug, Deserialize)]
pub(super) struct Standing {
    pub(super) state: String,
    #[serde(default)]
    pub(super) reason: String,
}

/// Reads the page of a sidecar or of a proxy.
///
/// # Errors
/// No program answers, or its answer is of no known form.
pub(super) fn read(url: &str) -> Result<Running, String> {
    let base = url.trim_end_matches('/');
    let began = SystemTime::now();
    let get = |path: &str| {
        let address = format!("{base}{path}");
        let page = reach::block(http_get::get(&address, reach::BOUND))?;
        page.map_err(|error| error.to_string())
    };
    let running = |page: &Page, kind| Running {
        url: base.to_owned(),
        skew: skew(&page.date, began, SystemTime::now()),
        kind,
    };
    let status = get("/status")?;
    if status.status == 200 {
        let parsed = serde_json::from_slice(&status.body);
        let parsed =
            parsed.map_err(|error| format!("{base}/status is not a sidecar's: {error}"))?;
        return Ok(running(&status, Program::Sidecar(parsed)));
    }
    let instances = get("/instances")?;
    if instances.status == 200 {
        let parsed = serde_json::from_slice(&instances.body);
        let parsed =
            parsed.map_err(|error| format!("{base}/instances is not a proxy's: {error}"))?;
        return Ok(running(&instances, Program::Proxy(parsed)));
    }
    let text = String::from_utf8_lossy(&status.body);
    let text: String = text.trim().chars().take(MAX_SHOWN).collect();
    Err(format!(
        "{base}/status answers {}: {}",
        status.status,
        text.escape_debug()
    ))
}

/// Returns the difference of two clocks: the time between the date of an answer and the time of the exchange, which lasted
/// from `began` to `ended`. A busy host may take seconds for an exchange. A date has seconds, so a difference below two
/// seconds shows nothing.
fn skew(date: &str, began: SystemTime, ended: SystemTime) -> Option<Duration> {
    let there = httpdate::parse_http_date(date).ok()?;
    let behind = began.duration_since(there);
    let ahead = there.duration_since(ended);
    Some(ahead.or(behind).unwrap_or_default())
}

/// Largest number of characters of a foreign answer that are shown.
const MAX_SHOWN: usize = 200;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_skew_has_no_sign() {
        let at = |time| httpdate::parse_http_date(&format!("Mon, 30 Nov 2026 {time} GMT")).unwrap();
        let (began, ended) = (at("12:00:10"), at("12:00:15"));
        for (time, seconds) in [
            ("12:00:00", 10),
            ("12:00:12", 0),
            ("12:00:15", 0),
            ("12:00:25", 10),
        ] {
            let date = format!("Mon, 30 Nov 2026 {time} GMT");
            let found = skew(&date, began, ended);
            assert_eq!(found, Some(Duration::from_secs(seconds)), "{time}");
        }
        assert_eq!(skew("yesterday", began, ended), None);
    }
}
