//! Metrics, traces and records of requests.

pub(crate) mod labels;
pub(crate) mod metrics;
pub(crate) mod outcome;
pub(crate) mod prefill_times;
pub(crate) mod record;
pub(crate) mod trace;
