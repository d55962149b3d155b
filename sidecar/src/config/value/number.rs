//! Whole numbers, ports and sizes.

use super::{Value, items, scalar};
use crate::config::yaml::Raw;

/// A whole number that is not less than `MIN`.
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

/// One TCP port per rank. A single port is a list with one port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ports(pub(crate) Vec<u16>);

impl Value for Ports {
    const WANT: &'static str = "a list of ports, one per rank: [7300, 7301] or 7300";

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
            _ => return Err(format!("not a unit: `{unit}`")),
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

/// Largest number of ranks that one sidecar serves.
pub(crate) const MAX_RANKS: usize = 64;

pub(super) fn is_number(text: &str) -> bool {
    text.starts_with("0x") || text.starts_with("0o") || text.replace('_', "").parse::<f64>().is_ok()
}

/// Reads a whole number in every spelling that a YAML reader accepts.
pub(super) fn integer(raw: &Raw, notes: &mut Vec<String>) -> Result<u64, String> {
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
        // YAML 1.1, which LMCache uses, reads a number with a leading 0 as octal; YAML 1.2 reads it as
        // decimal.
        let n = radix(bare, 8).map_err(|_| "a leading 0 makes it octal in YAML 1.1".to_owned())?;
        notes.push(format!(
            "`{text}` is octal in YAML 1.1, which LMCache reads, so the value is {n}; write {n} or 0o{n:o}"
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

pub(super) fn scaled(number: &str, scale: u64) -> Result<u64, String> {
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
    // Beyond 2^53 an f64 cannot hold every whole number. No buffer or time is larger than 2^53.
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
