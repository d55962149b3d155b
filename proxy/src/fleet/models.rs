//! The names of the models that an instance serves.

use std::sync::Arc;

use serde::{Deserialize, Serialize, Serializer};

/// The names of the models that an instance serves: names of its model, and names of its adapters. Empty if the
/// names are not known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Models {
    /// The names; the first name stands for the model.
    names: Arc<[Box<str>]>,
    /// Number of names of the model itself. The names of adapters follow.
    models: usize,
    /// True if the configuration gives the names. The instance's own list is then not read.
    is_configured: bool,
}

/// The answer to `GET /v1/models`.
#[derive(Deserialize)]
struct List {
    data: Vec<Card>,
}

/// One entry of the list.
#[derive(Deserialize)]
struct Card {
    id: String,
    /// The model of an adapter; `None` for a model.
    #[serde(default)]
    parent: Option<String>,
}

impl Models {
    /// Returns the names that the configuration gives.
    pub fn configured(names: &[String]) -> Self {
        Self {
            names: bounded(names.iter().map(String::as_str)),
            models: names.len(),
            is_configured: !names.is_empty(),
        }
    }

    /// Reads the body of an engine's answer to `GET /v1/models`. Returns `None` if the body is not such a list, or
    /// if the list is empty.
    pub(crate) fn read(body: &[u8]) -> Option<Self> {
        let mut list: List = serde_json::from_slice(body).ok()?;
        // The name of the model comes before the names of its adapters. The sort keeps the engine's order otherwise.
        list.data.sort_by_key(|card| card.parent.is_some());
        let is_model = |card: &&Card| card.parent.is_none();
        let models = bounded(
            list.data
                .iter()
                .filter(is_model)
                .map(|card| card.id.as_str()),
        )
        .len();
        let names = bounded(list.data.iter().map(|card| card.id.as_str()));
        (!names.is_empty()).then_some(Self {
            names,
            models,
            is_configured: false,
        })
    }

    /// Returns true if the names are known.
    pub fn is_known(&self) -> bool {
        !self.names.is_empty()
    }

    /// Returns true if the configuration gives the names.
    pub fn is_configured(&self) -> bool {
        self.is_configured
    }

    /// Returns the name that stands for the model; `None` if the names are not known.
    pub fn base(&self) -> Option<&str> {
        self.names.first().map(AsRef::as_ref)
    }

    /// Returns true if the instance is known to serve a model or an adapter of this name.
    pub fn serves(&self, name: &str) -> bool {
        self.names.iter().any(|known| **known == *name)
    }

    /// Returns true if the engine's list says that this name is an adapter's.
    pub(crate) fn is_adapter(&self, name: &str) -> bool {
        let adapters = self.names.iter().skip(self.models);
        adapters.into_iter().any(|known| **known == *name)
    }

    /// Returns all names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(AsRef::as_ref)
    }
}

impl Serialize for Models {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.names())
    }
}

/// Returns the usable names, at most [`MAX_NAMES`].
fn bounded<'a>(names: impl Iterator<Item = &'a str>) -> Arc<[Box<str>]> {
    let is_usable = |name: &&str| !name.is_empty() && name.len() <= MAX_NAME_BYTES;
    let names = names.filter(is_usable).take(MAX_NAMES);
    names.map(Box::from).collect()
}

/// Maximum number of names of one instance. An engine with more adapters keeps only the first names, and requests for
/// the other adapters are routed like requests for unknown models.
const MAX_NAMES: usize = 1024;

/// The longest name in bytes. Names appear in the labels of metrics.
const MAX_NAME_BYTES: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_an_engine() {
        let check = |body: &str, expect: &[&str]| {
            let models = Models::read(body.as_bytes()).unwrap_or_default();
            assert_eq!(models.names().collect::<Vec<_>>(), expect, "{body}");
        };
        check(r#"{"data": [{"id": "m", "root": "x"}]}"#, &["m"]);
        check(
            r#"{"data": [{"id": "a", "parent": "m"}, {"id": "m", "parent": null}, {"id": "n"}]}"#,
            &["m", "n", "a"],
        );
        check(r#"{"data": [{"id": ""}, {"id": "m"}]}"#, &["m"]);
        check(r#"{"data": []}"#, &[]);
        check(r#"{"error": "no"}"#, &[]);
        check("<html>", &[]);
        let many: Vec<_> = (0..2000).map(|n| format!(r#"{{"id": "m{n}"}}"#)).collect();
        let many = format!(r#"{{"data": [{}]}}"#, many.join(","));
        let lora = br#"{"data": [{"id": "a", "parent": "m"}, {"id": "m"}]}"#;
        let lora = Models::read(lora).unwrap();
        assert!(lora.is_adapter("a") && !lora.is_adapter("m"));
        let read = Models::read(many.as_bytes()).unwrap();
        assert_eq!(read.names().count(), MAX_NAMES);
        assert_eq!(read.base(), Some("m0"));
        let long = format!(r#"{{"data": [{{"id": "{}"}}]}}"#, "x".repeat(257));
        assert_eq!(Models::read(long.as_bytes()), None);
    }
}
