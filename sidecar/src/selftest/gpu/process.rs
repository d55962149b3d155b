//! A sidecar process of the self-test, started from this binary.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::super::report::{LinkRow, Pushed};
use super::super::{CONSENT_VARIABLE, LOOPBACK};

/// A running sidecar process. Dropping it kills the process.
#[derive(Debug)]
pub(super) struct Sidecar {
    child: Child,
    role: &'static str,
    pub(super) socket: PathBuf,
    admin: u16,
    log: PathBuf,
}

impl Sidecar {
    pub(super) fn start(
        directory: &Path,
        role: &'static str,
        more: impl FnOnce(&mut Vec<String>),
    ) -> anyhow::Result<Self> {
        let admin = free_port()?;
        let socket = directory.join(format!("{role}.sock"));
        let log = directory.join(format!("{role}.log"));
        let mut args = vec![
            "--role".to_owned(),
            role.to_owned(),
            "--id".to_owned(),
            format!("selftest-{role}"),
            "--socket".to_owned(),
            socket.display().to_string(),
            "--admin".to_owned(),
            format!("{LOOPBACK}:{admin}"),
        ];
        more(&mut args);
        let output = File::create(&log)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(&args).stdin(Stdio::null());
        // The environment's keys are for a deployment and must not change the test.
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            let consent = text == CONSENT_VARIABLE;
            if text.starts_with("LMCACHE_") || text.starts_with("PD_SIDECAR_") && !consent {
                command.env_remove(&name);
            }
        }
        command.stdout(output.try_clone()?).stderr(output);
        Ok(Self {
            child: command.spawn()?,
            role,
            socket,
            admin,
            log,
        })
    }

    /// Waits until the process's socket accepts engines.
    pub(super) async fn ready(mut self) -> anyhow::Result<Self> {
        let deadline = Instant::now() + START;
        loop {
            if tokio::net::UnixStream::connect(&self.socket).await.is_ok() {
                return Ok(self);
            }
            if let Some(status) = self.child.try_wait()? {
                anyhow::bail!(
                    "the {} ended at its start ({status}):\n{}",
                    self.role,
                    self.tail()
                );
            }
            anyhow::ensure!(
                Instant::now() < deadline,
                "the {} did not start within {START:?}:\n{}",
                self.role,
                self.tail()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Returns the successful requests.
    pub(super) async fn pushed(&self) -> anyhow::Result<Vec<Pushed>> {
        #[derive(Deserialize)]
        struct Row {
            reason: Option<String>,
            #[serde(flatten)]
            pushed: Pushed,
        }
        let rows: Vec<Row> = self.ask("/requests").await?;
        let done = rows.into_iter().filter(|row| row.reason.is_none());
        Ok(done.map(|row| row.pushed).collect())
    }

    /// Returns the process's first link from `/status`; empty if there is none.
    pub(super) async fn link(&self) -> anyhow::Result<LinkRow> {
        #[derive(Deserialize)]
        struct Status {
            links: Vec<LinkRow>,
        }
        let status: Status = self.ask("/status").await?;
        let mut links = status.links.into_iter();
        Ok(links.next().unwrap_or_default())
    }

    async fn ask<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        let mut stream = TcpStream::connect((LOOPBACK, self.admin)).await?;
        let request =
            format!("GET {path} HTTP/1.1\r\nhost: {LOOPBACK}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        let body = answer.split_once("\r\n\r\n").map(|(_, body)| body);
        let body = body.ok_or_else(|| anyhow::anyhow!("{path}: no answer"))?;
        Ok(serde_json::from_str(body)?)
    }

    /// Returns the last lines of the process's log.
    pub(super) fn tail(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let from = lines.len().saturating_sub(TAIL_LINES);
        format!("{}: {}", self.role, lines[from..].join("\n"))
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        // The process may already have ended, which makes `kill` fail.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Returns a port that is free now. Another process may still bind the port first.
pub(super) fn free_port() -> std::io::Result<u16> {
    let listener = TcpListener::bind((LOOPBACK, 0))?;
    Ok(listener.local_addr()?.port())
}

/// Longest time for the start. CUDA and NIXL need some seconds each on a host with many GPUs.
const START: Duration = Duration::from_secs(60);
const TAIL_LINES: usize = 15;
