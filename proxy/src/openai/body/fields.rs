//! The fields of a JSON object, without their meaning.

use std::fmt;

use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use super::kinds::known;

/// The fields of a body, in their order, as runs: each known field is one run, and neighbouring unknown
/// fields share one run.
pub(super) struct Fields<'a>(pub(super) Vec<Run<'a>>);

/// A known field, or neighbouring unknown fields. Unknown fields share one run, so that a body of a
/// million fields needs no more memory than its bytes.
pub(super) struct Run<'a> {
    /// Name of the field; empty for unknown fields.
    pub(super) name: &'static str,
    /// Value of the last field of the run.
    pub(super) last: &'a RawValue,
}

/// Name of a field; empty if the field is unknown.
struct Name(&'static str);

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Fields<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut runs: Vec<Run<'de>> = Vec::with_capacity(USUAL_FIELDS);
                while let Some((Name(name), last)) = map.next_entry()? {
                    let before = runs.last_mut();
                    if let Some(run) = before.filter(|run| (name, run.name) == ("", "")) {
                        run.last = last;
                        continue;
                    }
                    if runs.len() == MAX_RUNS {
                        return Err(A::Error::custom("it repeats its fields too often"));
                    }
                    runs.push(Run { name, last });
                }
                Ok(Fields(runs))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = Name;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a field's name")
            }

            fn visit_str<E>(self, name: &str) -> Result<Name, E> {
                Ok(Name(known(name).map_or("", |(name, _)| name)))
            }
        }
        deserializer.deserialize_str(Text)
    }
}

/// Initial capacity of the list: most requests have fewer fields.
const USUAL_FIELDS: usize = 16;

/// Maximum number of runs of a body. Fewer than a hundred fields are known, so only a body that repeats
/// fields very often has more runs.
const MAX_RUNS: usize = 1024;
