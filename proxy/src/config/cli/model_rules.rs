//! The flags that give single models another mode or another policy.

use std::collections::BTreeMap;

use clap::{Args, ValueEnum};

use crate::routing::mode::Mode;
use crate::routing::models::Rules;
use crate::routing::policy::Policy;

/// Modes and policies of single models.
#[derive(Clone, Debug, Default, Args)]
pub struct ModelRules {
    /// Modes of single models, separated by commas. NAME is the model's first name in the engine's
    /// `/v1/models`.
    #[arg(long, env = "PD_PROXY_MODEL_MODE", value_name = "NAME=MODE", value_delimiter = ',',
          value_parser = pair::<Mode>)]
    pub model_mode: Vec<(String, Mode)>,

    /// Prefill policies of single models, separated by commas.
    #[arg(long, env = "PD_PROXY_MODEL_PREFILL_POLICY", value_name = "NAME=POLICY",
          value_delimiter = ',', value_parser = pair::<Policy>)]
    pub model_prefill_policy: Vec<(String, Policy)>,

    /// Decode policies of single models, separated by commas.
    #[arg(long, env = "PD_PROXY_MODEL_DECODE_POLICY", value_name = "NAME=POLICY",
          value_delimiter = ',', value_parser = pair::<Policy>)]
    pub model_decode_policy: Vec<(String, Policy)>,
}

impl ModelRules {
    /// Returns the rules of each model that a flag names. `usual` has the rules that no flag changes.
    pub(crate) fn over(&self, usual: Rules) -> BTreeMap<String, Rules> {
        let mut all: BTreeMap<String, Rules> = BTreeMap::new();
        for (name, mode) in &self.model_mode {
            all.entry(name.clone()).or_insert(usual).mode = *mode;
        }
        for (name, policy) in &self.model_prefill_policy {
            all.entry(name.clone()).or_insert(usual).prefill = *policy;
        }
        for (name, policy) in &self.model_decode_policy {
            all.entry(name.clone()).or_insert(usual).decode = *policy;
        }
        all
    }
}

/// Parses `NAME=VALUE`. The name may contain `=`.
fn pair<T: ValueEnum>(text: &str) -> Result<(String, T), String> {
    let (name, value) = text
        .rsplit_once('=')
        .filter(|(name, _)| !name.is_empty())
        .ok_or("is not NAME=VALUE")?;
    let known = |value: &T| value.to_possible_value().map(|v| v.get_name().to_owned());
    let names: Vec<_> = T::value_variants().iter().filter_map(known).collect();
    let value = T::from_str(value, false)
        .map_err(|_| format!("{value:?} is none of {}", names.join(", ")))?;
    Ok((name.to_owned(), value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_of_single_models() {
        let usual = Rules {
            mode: Mode::Pd,
            prefill: Policy::RoundRobin,
            decode: Policy::RoundRobin,
        };
        let rules = ModelRules {
            model_mode: vec![pair("org/a=1=ppd").unwrap()],
            model_prefill_policy: vec![pair("b=prefix").unwrap()],
            model_decode_policy: vec![pair("b=least-tokens").unwrap()],
        };
        let (mode, prefill, decode) = (Mode::Ppd, Policy::Prefix, Policy::LeastTokens);
        let expect = [
            ("org/a=1".to_owned(), Rules { mode, ..usual }),
            (
                "b".to_owned(),
                Rules {
                    prefill,
                    decode,
                    ..usual
                },
            ),
        ];
        assert_eq!(rules.over(usual), expect.into());
        for wrong in ["a", "=pd", "a=", "a=pdd"] {
            assert!(pair::<Mode>(wrong).is_err(), "{wrong}");
        }
    }
}
