//! The flags, and the checks of their values before the proxy starts.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use clap::{CommandFactory, FromArgMatches, Parser};
use hyper_util::client::legacy::connect::HttpConnector;

use crate::config::addresses::{Addresses, Closed};
use crate::config::announce::metadata;
use crate::config::keys::{AuthMode, Command, Keys};
use crate::fleet::base_url::BaseUrl;
use crate::fleet::load::Breaker;
use crate::fleet::registry::ANSWER_VALID;
use crate::fleet::sources::Sources;
use crate::openai::keys::Access;
use crate::routing::mode::Mode;
use crate::routing::models::Rules;
use crate::routing::policy::Policy;
use crate::upstream::tls::TlsFiles;

mod choices;
mod kv_events;
mod model_rules;

pub use choices::LogFormat;
pub(crate) use choices::{DecodeLegAt, FirstTokenFrom};
pub(crate) use kv_events::KvEventsAt;
pub(crate) use model_rules::ModelRules;

/// OpenAI-compatible proxy for disaggregated prefill and decode.
///
/// Clients use the proxy like one vLLM server. Sidecars register at its registration port. For each
/// request one instance computes the prompt (prefill), the sidecars push the KV of the prompt to another
/// instance, and this instance streams the answer (decode). If no transfer is possible, the decode
/// instance computes the whole request.
#[derive(Clone, Debug, Parser)]
#[command(name = "pd-proxy", version, after_long_help = AFTER_HELP, max_term_width = 100,
          args_conflicts_with_subcommands = true)]
pub struct Config {
    /// Addresses of the ports.
    #[command(flatten)]
    pub addresses: Addresses,

    /// A task other than to run the proxy.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// The key of this process, and the sidecars that may register.
    #[command(flatten)]
    pub keys: Keys,

    /// Maximum number of requests in flight; further requests get 429.
    #[arg(long, env = "PD_PROXY_MAX_IN_FLIGHT", default_value_t = 1024, value_name = "N",
          value_parser = at_least_one)]
    pub max_in_flight: usize,

    /// Maximum number of client connections. For a further connection, the proxy closes the connection that
    /// has been idle for longest. If all connections are busy with requests, further /v1/ requests get 429;
    /// /health, /ready, /metrics and the admin endpoints still answer.
    #[arg(long, env = "PD_PROXY_MAX_CONNECTIONS", default_value_t = 4096, value_name = "N",
          value_parser = at_least_one)]
    pub max_connections: usize,

    /// Largest request body in bytes; a larger body gets 413.
    #[arg(long, env = "PD_PROXY_MAX_BODY_BYTES", default_value_t = 16 * 1024 * 1024,
          value_name = "BYTES", value_parser = at_least_one)]
    pub max_body_bytes: usize,

    /// Maximum number of bytes of all request bodies that are being received. Beyond this number,
    /// the slowest uploads get 429.
    #[arg(long, env = "PD_PROXY_MAX_UPLOAD_BYTES", default_value_t = 256 * 1024 * 1024,
          value_name = "BYTES", value_parser = at_least_one)]
    pub max_upload_bytes: usize,

    /// Maximum number of registered instances.
    #[arg(long, env = "PD_PROXY_MAX_INSTANCES", default_value_t = 256, value_name = "N",
          value_parser = at_least_one)]
    pub max_instances: usize,

    /// Instances that do not register themselves.
    #[command(flatten)]
    pub sources: Sources,

    /// Keys of clients, and the instances that the proxy may talk to.
    #[command(flatten)]
    pub access: Access,

    /// Base URLs of an etcd through which several proxies share their instances, separated by commas.
    #[arg(long, env = "PD_PROXY_ETCD", value_name = "URL", value_delimiter = ',')]
    pub etcd: Vec<String>,

    /// Prefix of the keys in etcd: proxies with the same prefix share their instances.
    #[arg(
        long,
        env = "PD_PROXY_ETCD_PREFIX",
        default_value = "/pd-proxy",
        value_name = "KEY"
    )]
    pub etcd_prefix: String,

    /// Mooncake's configuration file. The proxy writes its registration address to the metadata server that
    /// the file names, so that sidecars with the same file find this proxy.
    #[arg(long, env = "PD_PROXY_MOONCAKE", value_name = "FILE")]
    pub mooncake: Option<PathBuf>,

    /// Base URL of an OpenTelemetry collector (OTLP over HTTP, for example http://collector:4318),
    /// which gets a trace of each request.
    #[arg(long, env = "PD_PROXY_OTLP", value_name = "URL")]
    pub otlp: Option<String>,

    /// TLS towards clients and engines.
    #[command(flatten)]
    pub tls: TlsFiles,

    /// Policy that chooses the prefill instance of a request.
    #[arg(long, env = "PD_PROXY_PREFILL_POLICY", default_value = "round-robin")]
    pub prefill_policy: Policy,

    /// Policy that chooses the decode instance of a request.
    #[arg(long, env = "PD_PROXY_DECODE_POLICY", default_value = "round-robin")]
    pub decode_policy: Policy,

    /// Modes, and policies of both sides, of single models.
    #[command(flatten)]
    pub model_rules: ModelRules,

    /// Engines that publish KV events (vLLM's --kv-events-config), separated by commas: the instance's id or *
    /// for all others, the ports of the first rank, and the number of data-parallel ranks. The host is the
    /// engine's if absent.
    #[arg(
        long,
        env = "PD_PROXY_KV_EVENTS",
        value_name = "ID=[HOST]:PORT[/REPLAY_PORT][xRANKS]",
        value_delimiter = ','
    )]
    pub kv_events: Vec<KvEventsAt>,

    /// Rule that decides which requests get a prefill leg; `POST /mode/...` changes the mode.
    #[arg(long, env = "PD_PROXY_MODE", default_value = "pd")]
    pub mode: Mode,

    /// Time at which a decode leg between sidecars is sent: when the prefill engine has begun, together with
    /// the prefill leg, or after the answer to the prefill leg.
    #[arg(long, env = "PD_PROXY_DECODE_LEG", default_value = "begun")]
    pub decode_leg: DecodeLegAt,

    /// Engine that gives the first token of a stream between sidecars: the decode engine, or the prefill
    /// engine. The prefill engine has the token sooner, but the decode leg then waits for the prefill leg's
    /// answer.
    #[arg(long, env = "PD_PROXY_FIRST_TOKEN", default_value = "decode")]
    pub first_token: FirstTokenFrom,

    /// Maximum number of prefill instances tried for one request. After that, the decode instance computes
    /// the prompt.
    #[arg(long, env = "PD_PROXY_PREFILL_ATTEMPTS", default_value_t = 2, value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..=16))]
    pub prefill_attempts: u32,

    /// Failures in a row after which an instance gets no requests for a while. A 5xx of an engine counts only
    /// if another instance then answers the same request.
    #[arg(long, env = "PD_PROXY_BREAKER_FAILURES", default_value_t = 5, value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub breaker_failures: u32,

    /// Time for which an instance that keeps failing gets no requests. After that, one request probes the
    /// instance.
    #[arg(long, env = "PD_PROXY_BREAKER_PAUSE", default_value = "5s", value_name = "TIME",
          value_parser = duration)]
    pub breaker_pause: Duration,

    /// Maximum number of decode instances tried for one request. After the client has got the first bytes of
    /// an answer, no other instance is tried.
    #[arg(long, env = "PD_PROXY_DECODE_ATTEMPTS", default_value_t = 2, value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..=16))]
    pub decode_attempts: u32,

    /// Longest time to connect to an instance.
    #[arg(long, env = "PD_PROXY_CONNECT_TIMEOUT", default_value = "2s", value_name = "TIME",
          value_parser = duration)]
    pub connect_timeout: Duration,

    /// Longest wait for the prefill instance to begin or to answer. After that, the decode instance computes
    /// the prompt.
    #[arg(long, env = "PD_PROXY_PREFILL_TIMEOUT", default_value = "60s", value_name = "TIME",
          value_parser = duration)]
    pub prefill_timeout: Duration,

    /// Longest time for which a decode instance may show no sign of work (send no data in any of its answers)
    /// while a request waits for its first event. After that, another instance takes over if there is one.
    /// Long prompts, and answers that are not streamed, get more time. The proxy also breaks off an answer if
    /// the engine has sent no data of the answer for this time and the engine's /health has failed for as
    /// long.
    #[arg(long, env = "PD_PROXY_STALL_TIMEOUT", default_value = "20s", value_name = "TIME",
          value_parser = duration)]
    pub stall_timeout: Duration,

    /// Longest wait for the first event of a stream.
    #[arg(long, env = "PD_PROXY_FIRST_BYTE_TIMEOUT", default_value = "10m", value_name = "TIME",
          value_parser = duration)]
    pub first_byte_timeout: Duration,

    /// Longest wait for an answer that is not streamed. The engine computes the whole answer in this time.
    #[arg(long, env = "PD_PROXY_ANSWER_TIMEOUT", default_value = "4h", value_name = "TIME",
          value_parser = duration)]
    pub answer_timeout: Duration,

    /// Longest time without data within an answer. An engine sends no data while it generates a tool call.
    #[arg(long, env = "PD_PROXY_IDLE_TIMEOUT", default_value = "10m", value_name = "TIME",
          value_parser = duration)]
    pub idle_timeout: Duration,

    /// Longest time for a client to send a request's head. Also the longest time in which a client may send
    /// less than 1 KiB of a body, or read nothing of its answer.
    #[arg(long, env = "PD_PROXY_CLIENT_TIMEOUT", default_value = "30s", value_name = "TIME",
          value_parser = duration)]
    pub client_timeout: Duration,

    /// Time between two call-backs to a registered sidecar. A call-back acknowledges the registration and
    /// checks the sidecar's health. At most 10s, because an answer is valid for 15 s.
    #[arg(long, env = "PD_PROXY_CALL_BACK_EVERY", default_value = "5s", value_name = "TIME",
          value_parser = duration)]
    pub call_back_every: Duration,

    /// Longest time for requests in flight to finish after SIGTERM or SIGINT.
    #[arg(long, env = "PD_PROXY_DRAIN_TIMEOUT", default_value = "30s", value_name = "TIME",
          value_parser = duration)]
    pub drain_timeout: Duration,

    /// Filter of the log, for example `info` or `warn,proxy=debug`.
    #[arg(
        long,
        env = "PD_PROXY_LOG",
        default_value = "info",
        value_name = "FILTER"
    )]
    pub log: String,

    /// Format of the log, which goes to standard error.
    #[arg(long, env = "PD_PROXY_LOG_FORMAT", default_value = "text")]
    pub log_format: LogFormat,
}

impl Config {
    /// Reads the arguments and the environment of this process. Returns the configuration, and a note for
    /// each variable that is ignored. Kubernetes describes each service of a namespace by variables like
    /// `SERVICE_PORT=tcp://10.0.0.1:7500`, and with some service names such a variable looks like the
    /// variable of a flag.
    ///
    /// # Errors
    /// A flag or variable is wrong, or the user has asked for help or the version.
    pub fn of_process() -> Result<(Self, Vec<String>), clap::Error> {
        let mut notes = Vec::new();
        let command = Self::command().mut_args(|argument| {
            let variable = argument.get_env().and_then(|name| name.to_str());
            let note = variable
                .and_then(|name| common::kubernetes::note(name, &std::env::var(name).ok()?));
            let Some(note) = note else {
                return argument;
            };
            notes.push(note);
            argument.env(None::<&'static str>)
        });
        let config = Self::from_arg_matches(&command.try_get_matches()?)?;
        Ok((config, notes))
    }

    /// Returns the mode and the policies of models without rules of their own.
    pub(crate) fn rules(&self) -> Rules {
        Rules {
            mode: self.mode,
            prefill: self.prefill_policy,
            decode: self.decode_policy,
        }
    }

    /// Returns the mode and the policies of single models, by name.
    pub(crate) fn model_rules(&self) -> BTreeMap<String, Rules> {
        self.model_rules.over(self.rules())
    }

    /// Returns the settings of the circuit breaker.
    pub fn breaker(&self) -> Breaker {
        Breaker {
            failures: self.breaker_failures,
            pause: self.breaker_pause,
            stall: self.stall_timeout,
        }
    }

    /// Returns the limit of memory for bodies that are being received, in bytes. The limit is at least
    /// `--max-body-bytes`, because otherwise the largest permitted body would never fit.
    pub fn upload_bytes(&self) -> usize {
        self.max_upload_bytes.max(self.max_body_bytes)
    }

    /// Returns all problems of the flags and of the files that they name, so that a user can correct all of
    /// them at once. Empty if there is none.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = self.access.problems();
        problems.extend(self.sources.named().err().unwrap_or_default());
        problems.extend(self.keys.identity().err().unwrap_or_default());
        problems.extend(self.tls.acceptor().err().map(|e| e.to_string()));
        let connector = self.tls.connector(HttpConnector::new());
        problems.extend(connector.err().map(|e| e.to_string()));
        if let Some(file) = &self.mooncake {
            problems.extend(metadata(file).err());
            let registration = self.addresses.registration();
            if registration.ip().is_unspecified() {
                problems.push(format!(
                    "--mooncake: sidecars cannot connect to {registration}: give an address of this host in --registration"
                ));
            }
        }
        let etcd = self.etcd.iter().map(|url| ("--etcd", url));
        for (flag, url) in etcd.chain(self.otlp.iter().map(|url| ("--otlp", url))) {
            if let Err(error) = BaseUrl::parse(flag, url) {
                problems.push(error.to_string());
            }
        }
        if self.call_back_every > LONGEST_CALL_BACK_EVERY {
            problems.push(format!(
                "--call-back-every {:?}: at most {LONGEST_CALL_BACK_EVERY:?}, because an instance counts as ready for \
                 {ANSWER_VALID:?} after a call-back, which itself may take 4s",
                self.call_back_every
            ));
        }
        let closed = Closed {
            clients: self.access.asks_clients(),
            sidecars: self.keys.auth == AuthMode::Require,
        };
        problems.extend(self.addresses.problems(closed));
        problems
    }
}

/// Upper limit of `--call-back-every`. A call-back takes at most 2 s for the sidecar and 2 s for the engine;
/// a longer interval would leave no time before the last answer expires.
const LONGEST_CALL_BACK_EVERY: Duration = Duration::from_secs(10);

/// Parses a duration above zero and up to a day.
fn duration(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(Duration::ZERO) => Err("must be above zero".into()),
        Ok(time) if time > LONGEST => Err("is longer than a day".into()),
        Ok(time) => Ok(time),
        Err(e) => Err(format!("{e}; write 500ms, 5s or 2m")),
    }
}

/// Parses a number from 1 to [`LARGEST`].
fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".into()),
        Ok(number) if number > LARGEST => Err(format!("is above {LARGEST}")),
        Ok(number) => Ok(number),
        Err(_) => Err("is not a whole number".into()),
    }
}

/// Upper limit of each duration: a longer deadline would have no practical effect.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// Upper limit of each count: far above every useful value, and small enough for a semaphore on every
/// platform.
const LARGEST: usize = 1 << 28;

const AFTER_HELP: &str = "\
Every flag can also be set in the environment, for example PD_PROXY_LISTEN; a flag wins over the environment.

Try it:
  pd-proxy --listen 127.0.0.1:8000 --registration 127.0.0.1:7500
  curl -s localhost:8000/instances          the instances, and why one is not ready
  curl -s localhost:8000/v1/completions -H 'content-type: application/json' \\
       -d '{\"model\": \"m\", \"prompt\": \"Hello\", \"max_tokens\": 8, \"stream\": true}'
  curl -s localhost:8000/requests           the last 256 requests: pair, times, bytes moved
  curl -s localhost:8000/ready              200 if a decode instance is ready
  curl -s localhost:8000/metrics            Prometheus

Exit codes: 0 stopped after draining, 1 stopped with requests cut off, 64 a flag or a file that it names is
wrong, 69 an address could not be bound, 70 the registration port failed while the proxy was running.
SIGTERM and SIGINT drain the proxy; a second signal stops it at once.";

#[cfg(test)]
mod tests;
