//! Values that are times.

use std::time::Duration;

use super::number::{integer, is_number, scaled};
use super::{Value, scalar};
use crate::config::yaml::Raw;

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
            _ => return Err(format!("not a unit: `{unit}`")),
        };
        scaled(number.trim(), scale).and_then(millis)
    }

    fn show(&self) -> String {
        self.0.as_millis().to_string()
    }
}

/// A time in seconds in LMCache's spelling; absent for `inf`.
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

const MAX_TIME: Duration = Duration::from_secs(86_400);

fn millis(n: u64) -> Result<Millis, String> {
    let time = Duration::from_millis(n);
    if time > MAX_TIME {
        return Err("more than a day".to_owned());
    }
    Ok(Millis(time))
}
