//! The KV description of an engine, and the check that KV can go from one instance to another.

use protocol::registration::Register;
use protocol::{Layout, VERSION};
use serde::{Deserialize, Serialize};

/// The description that a sidecar gives of itself and of its engine's KV. All properties except the release
/// decide whether two instances can be a pair. A property that is not given cannot prevent a pair.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kv {
    /// Version of the protocol; 0 if not given.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub version: u32,
    /// Number of ranks into which KV is divided; 0 if not given.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub ranks: u32,
    /// The shape of a chunk; `None` if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layout: Option<Layout>,
    /// The reason for which the engine moves no KV; empty if it moves KV.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub unmoved: String,
    /// Release of the sidecar, so that operators can watch a rolling upgrade; empty if not given.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub release: String,
}

impl Kv {
    /// Returns the KV description in a registration.
    pub fn of(register: &Register) -> Self {
        Self {
            version: register.v,
            ranks: register.ranks,
            layout: register.layout.clone(),
            unmoved: register.unmoved.chars().take(MAX_REASON_CHARS).collect(),
            release: register.release.chars().take(MAX_RELEASE_CHARS).collect(),
        }
    }

    /// Returns true if no known property prevents a transfer from an instance with this description to a
    /// decode instance with the description `decode`.
    pub fn fits(&self, decode: &Self) -> bool {
        self.unmoved.is_empty()
            && decode.unmoved.is_empty()
            && same(self.version, decode.version)
            && same(self.ranks, decode.ranks)
            && match (&self.layout, &decode.layout) {
                (Some(ours), Some(theirs)) => ours == theirs,
                _ => true,
            }
    }

    /// Returns the difference that prevents the transfer, with its cure; `None` if no difference prevents
    /// it.
    pub fn misfit(&self, decode: &Self) -> Option<String> {
        for (side, kv) in [("prefill", self), ("decode", decode)] {
            if !kv.unmoved.is_empty() {
                let why = kv.unmoved.escape_debug();
                return Some(format!("the {side} engine moves no KV: {why}"));
            }
        }
        if !same(self.version, decode.version) {
            return Some(differs("version", self.version, decode.version));
        }
        if !same(self.ranks, decode.ranks) {
            return Some(differs("ranks", self.ranks, decode.ranks));
        }
        let (ours, theirs) = (self.layout.as_ref()?, decode.layout.as_ref()?);
        let (field, ours, theirs) = ours.difference(theirs)?;
        Some(differs(field, ours.escape_debug(), theirs.escape_debug()))
    }
}

/// Returns the text that names a difference and its cure.
fn differs(field: &str, prefill: impl std::fmt::Display, decode: impl std::fmt::Display) -> String {
    let cure = match field {
        "version" => "run the same release of the sidecar on both sides".to_owned(),
        "ranks" => "set `ranks` of both connectors, and the number of ports, to the larger \
                    tensor-parallel size"
            .to_owned(),
        "model" => "set `model_name` of both connectors alike".to_owned(),
        "chunk_tokens" => "set `chunk_size` of both connectors alike".to_owned(),
        "dtype" | "quantization" => {
            "start both engines with the same --dtype and --kv-cache-dtype".to_owned()
        }
        "groups" => "start both engines with the same model and the same vLLM options, and run the same release of \
                     the connector on both sides"
            .to_owned(),
        _ => "start both engines with the same model, and with the same draft model or with none"
            .to_owned(),
    };
    format!("{field} is {prefill} on the prefill side and {decode} on the decode side: {cure}")
}

fn same(ours: u32, theirs: u32) -> bool {
    ours == theirs || ours == 0 || theirs == 0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// Maximum number of characters of an engine's reason that `/instances` and logs show.
const MAX_REASON_CHARS: usize = 500;
/// Maximum number of characters of a release that `/instances` shows.
const MAX_RELEASE_CHARS: usize = 64;

const _: () = assert!(VERSION > 0, "0 stands for a version that is not said");

#[cfg(test)]
pub(crate) mod tests;
