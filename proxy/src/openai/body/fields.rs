//! The fields of a JSON object, without what they mean.

use std::fmt;

use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use super::kinds::known;

/// Known fields, each by itself, and runs of others, in order.
pub(super) struct Fields<'a>(pub(super) Vec<Run<'a>>);

/// A known field, or all that follow each other without one between them: what nobody asks for is not
/// kept apart, so that a body of a million fields takes no more room than its bytes.
pub(super) struct Run<'a> {
    /// Empty if they are not known.
    pub(super) name: &'static str,
    /// The value of the last one.
    pub(super) last: &'a RawValue,
}

/// A field's name, if it is known.
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

/// Most requests have fewer.
const USUAL_FIELDS: usize = 16;

/// Fewer than a hundred fields are known: only one that is repeated again and again makes so many runs.
const MAX_RUNS: usize = 1024;
