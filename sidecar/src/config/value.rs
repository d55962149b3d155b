//! The types of configuration values: each reads every spelling that means it, and says what
//! would be right.

use std::fmt;
use std::time::Duration;

use super::yaml::Raw;

/// A type of value.
pub(crate) trait Value: Sized + Clone + fmt::Debug {
    /// What would be right, to end "write …".
    const WANT: &'static str;

    /// Reads a value; `notes` takes what a user should hear about a spelling that is accepted.
    ///
    /// # Errors
    /// What is wrong with it, in a few words.
    fn read(raw: &Raw, notes: &mut Vec<String>) -> Result<Self, String>;

    /// The one spelling that reports show.
    fn show(&self) -> String;
}

/// `true` or `false`.
impl Value for bool {
    const WANT: &'static str = "true or false";

    fn read(raw: &Raw, _: &mut Vec<String>) -> Result<Self, String> {
        match scalar(raw)?.to_ascii_lowercase().as_str() {
            "true" | "yes" | "on" | "y" | "1" => Ok(true),
            "false" | "no" | "off" | "n" | "0" => Ok(false),
            _ => Err("not a truth value".to_owned()),
        }
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

/// Any text that is not empty.
impl Value for String {
    const WANT: &'static str = "a text";

    fn read(raw: &Raw, _: &mut Vec<String>) -> Result<Self, String> {
        match scalar(raw)?.trim() {
            "" => Err("empty".to_owned()),
            text => Ok(text.to_owned()),
        }
    }

    fn show(&self) -> String {
        self.clone()
    }
}

/// A whole number from `MIN` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Count<const MIN: u64>(pub(crate) u32);

impl<const MIN: u64> Value for Count<MIN> {
    const WANT: &'static str = if MIN == 0 {
        "a whole number from 0 to 4294967295"
    } else {
        "a whole number from 1 to 4294967295"
    };

    fn read(raw: &Raw, notes: &mut Vec<String>) -> Result<Self, String> {
        let n = integer(raw, notes)?;
        if n < MIN {
            return Err(format!("less than {MIN}"));
        }
        u32::try_from(n)
            .map(Self)
            .map_err(|_| "too large".to_owned())
    }

    fn show(&self) -> String {
        self.0.to_string()
    }
}

/// A TCP port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Port(pub(crate) u16);

impl Value for Port {
    const WANT: &'static str = "a port from 0 to 65535";

    fn read(raw: &Raw, notes: &mut Vec<String>) -> Result<Self, String> {
        port(integer(raw, notes)?, 0).map(Self)
    }

    fn show(&self) -> String {
        self.0.to_string()
    }
}

/// One TCP port a rank; a single port is a list of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ports(pub(crate) Vec<u16>);

impl Value for Ports {
    const WANT: &'static str = "a list of ports, one a rank: [7300, 7301] or 7300";

    fn read(raw: &Raw, notes: &mut Vec<String>) -> Result<Self, String> {
        let ports: Result<Vec<_>, _> = items(raw)?
            .iter()
            .map(|item| port(integer(item, notes)?, 1))
            .collect();
        match ports? {
            ports if ports.is_empty() => Err("empty".to_owned()),
            ports if ports.len() > MAX_RANKS => Err(format!("more than {MAX_RANKS} ranks")),
            ports => Ok(Self(ports)),
        }
    }

    fn show(&self) -> String {
        let ports: Vec<_> = self.0.iter().map(u16::to_string).collect();
        format!("[{}]", ports.join(", "))
    }
}

/// A list of words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Words(pub(crate) Vec<String>);

impl Value for Words {
    const WANT: &'static str = "a list of names: [UCX]";

    fn read(raw: &Raw, _: &mut Vec<String>) -> Result<Self, String> {
        let words: Result<Vec<_>, _> = items(raw)?
            .iter()
            .map(|item| scalar(item).map(|s| s.trim().to_owned()))
            .collect();
        match words? {
            words if words.iter().any(String::is_empty) => Err("an empty name".to_owned()),
            words => Ok(Self(words)),
        }
    }

    fn show(&self) -> String {
        format!("[{}]", self.0.join(", "))
    }
}

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bytes(pub(crate) u64);

impl Value for Bytes {
    const WANT: &'static str = "bytes (1073741824) or a size with a unit (1GiB, 1024MiB, 1.5GB)";

    fn read(raw: &Raw, notes: &mut Vec<String>) -> Result<Self, String> {
        let text = scalar(raw)?.trim();
        let split = text
            .find(|c: char| c.is_ascii_alphabetic())
            .filter(|_| !is_number(text))
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let scale: u64 = match unit.to_ascii_lowercase().as_str() {
            "" => return integer(raw, notes).map(Self),
            "b" => 1,
            "kib" | "ki" => 1 << 10,
            "mib" | "mi" => 1 << 20,
            "gib" | "gi" => 1 << 30,
            "tib" | "ti" => 1 << 40,
            "kb" => 1_000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "tb" => 1_000_000_000_000,
            "k" | "m" | "g" | "t" => {
                return Err(format!("`{unit}` may mean {unit}iB or {unit}B"));
            }
            _ => return Err(format!("no unit `{unit}`")),
        };
        scaled(number.trim(), scale).map(Self)
    }

    fn show(&self) -> String {
        for (unit, scale) in [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)] {
            if self.0 >= scale && self.0.is_multiple_of(scale) {
                return format!("{} ({} {unit})", self.0, self.0 / scale);
            }
        }
        self.0.to_string()
    }
}

/// A time, as a number of milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Millis(pub(crate) Duration);

impl Value for Millis {
    const WANT: &'static str =
        "milliseconds (1000) or a time with a unit (1s, 250ms, 2m), at most 24h";

    fn read(raw: &Raw, notes: &mut Vec<String>) -> Result<Self, String> {
        let text = scalar(raw)?.trim();
        let split = text
            .find(|c: char| c.is_ascii_alphabetic())
            .filter(|_| !is_number(text))
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let scale = match unit {
            "" => return integer(raw, notes).and_then(millis),
            "ms" => 1,
            "s" => 1_000,
            "m" | "min" => 60_000,
            "h" => 3_600_000,
            _ => return Err(format!("no unit `{unit}`")),
        };
        scaled(number.trim(), scale).and_then(millis)
    }

    fn show(&self) -> String {
        self.0.as_millis().to_string()
    }
}

/// A time in seconds as LMCache spells it; `inf` is none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Seconds(pub(crate) Option<Duration>);

impl Value for Seconds {
    const WANT: &'static str = "seconds (5.0) or inf";

    fn read(raw: &Raw, _: &mut Vec<String>) -> Result<Self, String> {
        let text = scalar(raw)?.trim().to_ascii_lowercase().replace('_', "");
        if matches!(text.as_str(), "inf" | ".inf" | "+inf" | "infinity") {
            return Ok(Self(None));
        }
        let seconds: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
        match Duration::try_from_secs_f64(seconds) {
            Ok(time) if time <= MAX_TIME => Ok(Self(Some(time))),
            _ => Err("not a time from 0 to 86400 s".to_owned()),
        }
    }

    fn show(&self) -> String {
        match self.0 {
            Some(time) => time.as_secs_f64().to_string(),
            None => "inf".to_owned(),
        }
    }
}

/// A host name or address without a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Host(pub(crate) String);

impl Value for Host {
    const WANT: &'static str = "a host name or an address without a port: 10.0.0.2";

    fn read(raw: &Raw, _: &mut Vec<String>) -> Result<Self, String> {
        host(scalar(raw)?.trim()).map(Self)
    }

    fn show(&self) -> String {
        self.0.clone()
    }
}

/// A host and a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostPort {
    /// Host name or address, without brackets.
    pub(crate) host: String,
    /// Port; 0 where one is bound means any free one.
    pub(crate) port: u16,
}

impl HostPort {
    /// Whether only this machine reaches the host.
    pub(crate) fn is_loopback(&self) -> bool {
        is_loopback(&self.host)
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl Value for HostPort {
    const WANT: &'static str = "host:port: 127.0.0.1:7500 or [::1]:7500";

    fn read(raw: &Raw, _: &mut Vec<String>) -> Result<Self, String> {
        let text = scalar(raw)?.trim();
        let text = text.strip_prefix("tcp://").unwrap_or(text);
        let (host_text, port_text) = text.rsplit_once(':').ok_or("no port")?;
        let bare = match host_text
            .strip_prefix('[')
            .and_then(|h| h.strip_suffix(']'))
        {
            Some(inner) => inner,
            None if host_text.contains(':') => return Err("IPv6 without brackets".to_owned()),
            None => host_text,
        };
        Ok(Self {
            host: host(bare)?,
            port: port_text
                .parse()
                .map_err(|_| format!("`{port_text}` is no port"))?,
        })
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

/// A base URL of an HTTP server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Url(pub(crate) String);

impl Value for Url {
    const WANT: &'static str = "a base URL: http://127.0.0.1:8100";

    fn read(raw: &Raw, _: &mut Vec<String>) -> Result<Self, String> {
        let text = scalar(raw)?.trim().trim_end_matches('/');
        let rest = text
            .strip_prefix("http://")
            .or_else(|| text.strip_prefix("https://"))
            .ok_or("neither http:// nor https://")?;
        if rest.is_empty() || rest.contains(|c: char| c.is_whitespace() || "?#@".contains(c)) {
            return Err("no base URL".to_owned());
        }
        Ok(Self(text.to_owned()))
    }

    fn show(&self) -> String {
        self.0.clone()
    }
}

/// A value that is kept as it is, whatever it is: of keys that are ignored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Any(pub(crate) String);

impl Value for Any {
    const WANT: &'static str = "anything";

    fn read(raw: &Raw, _: &mut Vec<String>) -> Result<Self, String> {
        Ok(Self(raw.show()))
    }

    fn show(&self) -> String {
        self.0.clone()
    }
}

/// Declares an enum of words that is a [`Value`].
macro_rules! words {
    ($(#[$doc:meta])* $name:ident, $want:literal, { $($(#[$vdoc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub(crate) enum $name { $($(#[$vdoc])* $variant,)* }

        impl $name {
            /// The word in configurations, logs and metrics.
            pub(crate) fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }

        impl Value for $name {
            const WANT: &'static str = $want;

            fn read(raw: &Raw, _: &mut Vec<String>) -> Result<Self, String> {
                match scalar(raw)?.trim().to_ascii_lowercase().as_str() {
                    $($text => Ok(Self::$variant),)*
                    _ => Err("none of the possible words".to_owned()),
                }
            }

            fn show(&self) -> String {
                self.as_str().to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

words! {
    /// Which side of transfers this sidecar is.
    Role, "sender, receiver or both", {
        /// Beside a prefill engine.
        Sender = "sender",
        /// Beside a decode engine.
        Receiver = "receiver",
        /// Beside an engine that takes either leg.
        Both = "both",
    }
}

words! {
    /// Which wires may be used.
    Wire, "auto, nixl or tcp", {
        /// The best that both sides have.
        Auto = "auto",
        /// NIXL or nothing.
        Nixl = "nixl",
        /// The built-in TCP transport or nothing.
        Tcp = "tcp",
    }
}

words! {
    /// How log lines look.
    LogFormat, "text or json", {
        /// For people.
        Text = "text",
        /// One JSON object a line.
        Json = "json",
    }
}

words! {
    /// Where the buffers are.
    Device, "cpu", {
        /// Host memory.
        Cpu = "cpu",
        /// GPU memory, which this version cannot do.
        Cuda = "cuda",
    }
}

/// Whether only this machine reaches `host`. A name other than `localhost` is taken for a public one.
pub(crate) fn is_loopback(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost")
        || host
            .parse::<std::net::IpAddr>()
            .is_ok_and(|ip| ip.is_loopback())
}

/// Whether `host` means every interface, so that nobody can connect to it.
pub(crate) fn is_wildcard(host: &str) -> bool {
    host == "*"
        || host
            .parse::<std::net::IpAddr>()
            .is_ok_and(|ip| ip.is_unspecified())
}

/// Most ranks that one sidecar serves.
pub(crate) const MAX_RANKS: usize = 64;

const MAX_TIME: Duration = Duration::from_secs(86_400);

fn scalar(raw: &Raw) -> Result<&str, String> {
    match raw {
        Raw::Scalar { text, .. } => Ok(text),
        Raw::List(_) => Err("a list".to_owned()),
        Raw::Map(_) => Err("a mapping".to_owned()),
        Raw::Null => Err("nothing".to_owned()),
    }
}

/// A list, or one scalar; text with commas is a list (environment variables have no other).
fn items(raw: &Raw) -> Result<Vec<Raw>, String> {
    match raw {
        Raw::List(nodes) => Ok(nodes.iter().map(|n| n.raw.clone()).collect()),
        Raw::Scalar { text, plain } => Ok(text
            .trim()
            .trim_start_matches('[')
            .trim_end_matches(']')
            .split(',')
            .map(|part| Raw::Scalar {
                text: part.trim().to_owned(),
                plain: *plain,
            })
            .collect()),
        Raw::Map(_) => Err("a mapping".to_owned()),
        Raw::Null => Err("nothing".to_owned()),
    }
}

fn is_number(text: &str) -> bool {
    text.starts_with("0x") || text.starts_with("0o") || text.replace('_', "").parse::<f64>().is_ok()
}

/// A whole number in every spelling that some YAML reader takes for one.
fn integer(raw: &Raw, notes: &mut Vec<String>) -> Result<u64, String> {
    let plain = matches!(raw, Raw::Scalar { plain: true, .. });
    let text = scalar(raw)?.trim();
    let bare = text.replace('_', "");
    let bare = bare.strip_prefix('+').unwrap_or(&bare);
    let radix = |digits: &str, radix| {
        u64::from_str_radix(digits, radix).map_err(|_| "not a whole number".to_owned())
    };
    if let Some(hex) = bare.strip_prefix("0x") {
        return radix(hex, 16);
    }
    if let Some(octal) = bare.strip_prefix("0o") {
        return radix(octal, 8);
    }
    if bare.starts_with('-') {
        return Err("negative".to_owned());
    }
    if plain && bare.len() > 1 && bare.starts_with('0') && bare.bytes().all(|b| b.is_ascii_digit())
    {
        // YAML 1.1, which LMCache reads, takes it for octal; YAML 1.2 for decimal.
        let n = radix(bare, 8).map_err(|_| "a leading 0 makes it octal in YAML 1.1".to_owned())?;
        notes.push(format!(
            "`{text}` is octal in YAML 1.1, as LMCache reads it: taken as {n}; write {n} or 0o{n:o}"
        ));
        return Ok(n);
    }
    if !bare.is_empty() && bare.bytes().all(|b| b.is_ascii_digit()) {
        return bare.parse().map_err(|_| "too large".to_owned());
    }
    if bare
        .bytes()
        .all(|b| b.is_ascii_digit() || b"eE+.".contains(&b))
    {
        return scaled_float(bare, 1);
    }
    Err("not a whole number".to_owned())
}

fn scaled(number: &str, scale: u64) -> Result<u64, String> {
    let bare = number.replace('_', "");
    match bare.parse::<u64>() {
        Ok(n) => n.checked_mul(scale).ok_or_else(|| "too large".to_owned()),
        Err(_) => scaled_float(&bare, scale),
    }
}

fn scaled_float(number: &str, scale: u64) -> Result<u64, String> {
    let value: f64 = number.parse().map_err(|_| "not a number".to_owned())?;
    #[expect(
        clippy::cast_precision_loss,
        reason = "scales are powers that f64 holds"
    )]
    let value = value * scale as f64;
    // 2^53: beyond it f64 has no unit digit, and no buffer or time here comes near.
    if value.is_finite() && value.fract() == 0.0 && (0.0..=9_007_199_254_740_992.0).contains(&value)
    {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "checked above"
        )]
        return Ok(value as u64);
    }
    Err("not a whole number".to_owned())
}

fn port(n: u64, least: u64) -> Result<u16, String> {
    match u16::try_from(n) {
        Ok(port) if n >= least => Ok(port),
        _ => Err("no port".to_owned()),
    }
}

fn millis(n: u64) -> Result<Millis, String> {
    let time = Duration::from_millis(n);
    if time > MAX_TIME {
        return Err("more than a day".to_owned());
    }
    Ok(Millis(time))
}

fn host(text: &str) -> Result<String, String> {
    let inner = text
        .strip_prefix('[')
        .and_then(|h| h.strip_suffix(']'))
        .unwrap_or(text);
    if inner.parse::<std::net::IpAddr>().is_ok() || inner == "*" {
        return Ok(inner.to_owned());
    }
    let name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    match inner {
        "" => Err("empty".to_owned()),
        _ if inner.contains("://") => Err("a URL".to_owned()),
        _ if inner.contains(':') => Err("with a port".to_owned()),
        _ if inner.len() <= 253 && inner.chars().all(name) => Ok(inner.to_owned()),
        _ => Err("not a host name".to_owned()),
    }
}

#[cfg(test)]
mod tests;
