//! Instances that are named by flags, by a file or by the environment.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use protocol::registration::InstanceRole;
use serde::Deserialize;

use crate::connectors::Connector;
use crate::fleet::instance::{Instance, Named, Source, Unusable};

mod lmcache;

/// Instances that do not register. All ways to name these instances can be combined.
#[derive(Clone, Debug, Default, Args)]
pub struct Sources {
    /// Prefill instances that do not register, separated by commas.
    #[arg(
        long,
        env = "PREFILL_ENDPOINTS",
        value_name = "URL",
        value_delimiter = ','
    )]
    pub prefill: Vec<String>,

    /// Decode instances that do not register, separated by commas.
    #[arg(
        long,
        env = "DECODE_ENDPOINTS",
        value_name = "URL",
        value_delimiter = ','
    )]
    pub decode: Vec<String>,

    /// Connector of the instances of --prefill and --decode.
    #[arg(long, env = "PD_PROXY_CONNECTOR", default_value = "nixl")]
    pub connector: Connector,

    /// YAML file with a list `instances`; docs/proxy/registration.md describes it.
    #[arg(long, env = "PD_PROXY_INSTANCES", value_name = "FILE")]
    pub instances: Option<PathBuf>,

    /// File with lines `PREFILL_ENDPOINTS=...` and `DECODE_ENDPOINTS=...`. Flags and the environment take
    /// precedence over the file.
    #[arg(long, env = "PD_PROXY_ENV_FILE", value_name = "FILE")]
    pub env_file: Option<PathBuf>,

    /// Hosts of prefillers, as in LMCache's example proxy.
    #[arg(
        long,
        env = "PD_PROXY_PREFILLER_HOST",
        value_name = "HOST",
        value_delimiter = ','
    )]
    pub prefiller_host: Vec<String>,

    /// Ports of these hosts: one port for all hosts, or one port for each host.
    #[arg(
        long,
        env = "PD_PROXY_PREFILLER_PORT",
        value_name = "PORT",
        value_delimiter = ','
    )]
    pub prefiller_port: Vec<u16>,

    /// With one host and one port: number of prefillers on consecutive ports.
    #[arg(long, env = "PD_PROXY_NUM_PREFILLERS", value_name = "N")]
    pub num_prefillers: Option<u16>,

    /// Hosts of decoders, as in LMCache's example proxy.
    #[arg(
        long,
        env = "PD_PROXY_DECODER_HOST",
        value_name = "HOST",
        value_delimiter = ','
    )]
    pub decoder_host: Vec<String>,

    /// Ports of these hosts: one port for all hosts, or one port for each host.
    #[arg(
        long,
        env = "PD_PROXY_DECODER_PORT",
        value_name = "PORT",
        value_delimiter = ','
    )]
    pub decoder_port: Vec<u16>,

    /// Init ports of a decoder, one for each rank. With --num-decoders, decoder n (from 0) adds n to each
    /// port.
    #[arg(
        long,
        env = "PD_PROXY_DECODER_INIT_PORT",
        value_name = "PORT",
        value_delimiter = ','
    )]
    pub decoder_init_port: Vec<u16>,

    /// Alloc ports of a decoder, one for each rank. With --num-decoders, decoder n (from 0) adds n to each
    /// port.
    #[arg(
        long,
        env = "PD_PROXY_DECODER_ALLOC_PORT",
        value_name = "PORT",
        value_delimiter = ','
    )]
    pub decoder_alloc_port: Vec<u16>,

    /// With one host and one port: number of decoders on consecutive ports.
    #[arg(long, env = "PD_PROXY_NUM_DECODERS", value_name = "N")]
    pub num_decoders: Option<u16>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    instances: Vec<Named>,
}

impl Sources {
    /// Returns all configured instances, or all problems at once.
    ///
    /// # Errors
    /// An entry cannot be used. The error has a text for each such entry.
    pub fn named(&self) -> Result<Vec<Instance>, Vec<String>> {
        let mut problems = Vec::new();
        let mut named = self.file().unwrap_or_else(|problem| {
            problems.push(problem);
            Vec::new()
        });
        let lines = self.env_lines().unwrap_or_else(|problem| {
            problems.push(problem);
            BTreeMap::new()
        });
        for (flag, variable, role) in [
            (&self.prefill, VARIABLES[0], InstanceRole::Prefill),
            (&self.decode, VARIABLES[1], InstanceRole::Decode),
        ] {
            let urls = match flag.is_empty() {
                true => lines.get(variable).cloned().unwrap_or_default(),
                false => flag.clone(),
            };
            // An empty variable, or a comma at the end, adds an empty text, which names no instance.
            let urls = urls.iter().filter(|url| !url.trim().is_empty());
            named.extend(urls.map(|url| self.plain(role, url)));
        }
        match self.lmcache() {
            Ok(all) => named.extend(all),
            Err(problem) => problems.push(problem),
        }
        let mut instances: Vec<Instance> = Vec::new();
        for one in &named {
            match Instance::named(one, Source::Configured) {
                Ok(instance) if instances.iter().any(|other| other.id == instance.id) => {
                    problems.push(format!("instance {:?} is named twice", instance.id));
                }
                Ok(instance) => instances.push(instance),
                Err(error) => problems.push(about(one, &error)),
            }
        }
        if problems.is_empty() {
            Ok(instances)
        } else {
            Err(problems)
        }
    }

    fn plain(&self, role: InstanceRole, url: &str) -> Named {
        Named {
            role,
            url: url.to_owned(),
            id: None,
            connector: self.connector,
            host: None,
            init_ports: Vec::new(),
            alloc_ports: Vec::new(),
            zmq: None,
            models: Vec::new(),
        }
    }

    fn file(&self) -> Result<Vec<Named>, String> {
        let Some(path) = &self.instances else {
            return Ok(Vec::new());
        };
        let shown = path.display();
        let text =
            std::fs::read_to_string(path).map_err(|e| format!("--instances {shown}: {e}"))?;
        let file: File =
            serde_saphyr::from_str(&text).map_err(|e| format!("--instances {shown}: {e}"))?;
        Ok(file.instances)
    }

    fn env_lines(&self) -> Result<BTreeMap<String, Vec<String>>, String> {
        let Some(path) = &self.env_file else {
            return Ok(BTreeMap::new());
        };
        let shown = path.display();
        let text = std::fs::read_to_string(path).map_err(|e| format!("--env-file {shown}: {e}"))?;
        let all: BTreeMap<_, _> = text.lines().filter_map(assignment).collect();
        let is_there = |variable: &&str| all.contains_key(*variable);
        if !VARIABLES.iter().any(is_there) {
            return Err(format!(
                "--env-file {shown}: the file sets neither {}",
                VARIABLES.join(" nor ")
            ));
        }
        Ok(all)
    }
}

/// Reads a line `NAME=a,b`, which may have `export` in front, quotes around the value and a comment after it.
/// Returns `None` for any other line.
fn assignment(line: &str) -> Option<(String, Vec<String>)> {
    let line = line.trim();
    let line = line.strip_prefix("export ").unwrap_or(line);
    let (name, value) = line.split_once('=').filter(|_| !line.starts_with('#'))?;
    let value = value.trim();
    let quoted = |mark| value.strip_prefix(mark)?.split_once(mark);
    let quoted = quoted('"').or_else(|| quoted('\''));
    let value = quoted.map_or_else(
        || value.split(" #").next().unwrap_or_default(),
        |(value, _)| value,
    );
    let words = value
        .split(',')
        .map(str::trim)
        .filter(|word| !word.is_empty());
    Some((name.trim().to_owned(), words.map(str::to_owned).collect()))
}

/// The variables that the proxy reads from `--env-file`.
const VARIABLES: [&str; 2] = ["PREFILL_ENDPOINTS", "DECODE_ENDPOINTS"];

fn about(named: &Named, error: &Unusable) -> String {
    format!("instance {}: {error}", named.url)
}

#[cfg(test)]
mod tests;
