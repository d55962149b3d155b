//! The flags of the remote store.

use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use clap::Args;
use store::remote::{Address, Credentials, Settings};

/// Flags of the remote store.
#[derive(Debug, Args)]
pub(super) struct RemoteFlags {
    /// A distributed store below memory and disk: redis://HOST:PORT/DATABASE, redis-cluster://HOST:PORT,HOST:PORT (with
    /// TLS: rediss://, rediss-cluster://), or s3://BUCKET. Valkey counts as Redis. Values are put there soon after they
    /// come, and are read from there if memory and disk lack them.
    // A text, because clap repeats a value that it cannot parse, and it may contain a password.
    #[arg(
        long,
        value_name = "URL",
        env = "PD_STORE_REMOTE",
        hide_env_values = true
    )]
    remote: Option<String>,
    /// URL of an S3 server other than Amazon's, such as http://10.1.0.9:9000. With https://, the server's certificate
    /// must be signed by a root of this system, or of the file in SSL_CERT_FILE.
    #[arg(
        long,
        value_name = "URL",
        requires = "remote",
        env = "PD_STORE_REMOTE_ENDPOINT",
        hide_env_values = true
    )]
    remote_endpoint: Option<String>,
    /// Region of the S3 bucket. Without it: AWS_REGION, or us-east-1.
    #[arg(
        long,
        value_name = "NAME",
        requires = "remote",
        env = "PD_STORE_REMOTE_REGION"
    )]
    remote_region: Option<String>,
    /// File with lines such as `password = ...`: username, password, aws_access_key_id, aws_secret_access_key,
    /// aws_session_token. Only this process's user may be able to read it. It is read at the start. Without it, S3 takes
    /// Amazon's environment variables and roles.
    #[arg(
        long,
        value_name = "FILE",
        requires = "remote",
        env = "PD_STORE_REMOTE_CREDENTIALS"
    )]
    remote_credentials: Option<PathBuf>,
    /// The beginning of all names in the remote store.
    #[arg(
        long,
        value_name = "NAME",
        default_value = "pd-store",
        env = "PD_STORE_REMOTE_PREFIX"
    )]
    remote_prefix: String,
    /// Longest time for a read from the remote store. What is not there by then counts as missing. A write may take ten
    /// times as long.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = humantime::parse_duration, env = "PD_STORE_REMOTE_TIMEOUT")]
    remote_timeout: Duration,
    /// Number of reads from the remote store at the same time. Each holds one value.
    #[arg(long, value_name = "NUMBER", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..), env = "PD_STORE_REMOTE_REQUESTS")]
    remote_requests: u16,
    /// Bytes of values that may wait to be put into the remote store. Newer values beyond it are not put.
    #[arg(
        long,
        value_name = "BYTES",
        default_value = "256MiB",
        env = "PD_STORE_REMOTE_QUEUE"
    )]
    remote_queue: ByteSize,
}

impl RemoteFlags {
    /// Returns the settings; `None` without a remote store.
    pub(super) fn settings(self, max_value: usize) -> Result<Option<Settings>, String> {
        let Some(address) = self.remote else {
            return Ok(None);
        };
        let address: Address = address
            .parse()
            .map_err(|mistake| format!("--remote: {mistake}"))?;
        let is_s3 = matches!(address, Address::S3 { .. });
        for (flag, given) in [
            ("--remote-endpoint", self.remote_endpoint.is_some()),
            ("--remote-region", self.remote_region.is_some()),
        ] {
            if given && !is_s3 {
                return Err(format!(
                    "{flag} is for s3:// only, and --remote is {address}"
                ));
            }
        }
        let credentials = match &self.remote_credentials {
            Some(file) => Credentials::load(file)
                .map_err(|mistake| format!("--remote-credentials {mistake}"))?,
            None => Credentials::default(),
        };
        let (wrong, cure) = match is_s3 {
            true => (
                credentials.password.is_some() || credentials.username.is_some(),
                "aws_access_key_id and aws_secret_access_key",
            ),
            false => (credentials.access_key_id.is_some(), "password"),
        };
        if wrong {
            return Err(format!(
                "--remote-credentials: the file is for another kind of remote store; {address} needs {cure}"
            ));
        }
        let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '/');
        let prefix = self.remote_prefix;
        if prefix.is_empty()
            || !prefix.chars().all(known)
            || prefix
                .split('/')
                .any(|part| matches!(part, "" | "." | ".."))
        {
            return Err(format!(
                "--remote-prefix {prefix:?} must be letters, digits, dots, hyphens and underscores, with / between folders"
            ));
        }
        if self.remote_timeout.is_zero() || self.remote_timeout > MOST_TIMEOUT {
            return Err(format!(
                "--remote-timeout {:?} must be above 0 and at most {MOST_TIMEOUT:?}",
                self.remote_timeout
            ));
        }
        let queue = usize::try_from(self.remote_queue.as_u64()).unwrap_or(usize::MAX);
        if queue / 2 < max_value {
            return Err(format!(
                "--remote-queue {} must be at least two times --max-value ({max_value})",
                self.remote_queue
            ));
        }
        Ok(Some(Settings {
            address,
            credentials,
            endpoint: self.remote_endpoint,
            region: self.remote_region,
            prefix,
            timeout: self.remote_timeout,
            requests: self.remote_requests.into(),
            queue,
            max_value,
        }))
    }
}

/// A client of the store gives up long before.
const MOST_TIMEOUT: Duration = Duration::from_secs(60);
