//! A proxy with scripted engines and sidecars around it, in one process.

#![allow(unreachable_pub, reason = "the program of the tests has no users")]

pub mod client;
pub mod engine;
pub mod journal;
pub mod sidecar;

use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use proxy::Config;
use proxy::{End, Proxy, Stop};
use serde_json::Value;
use tokio::task::JoinHandle;

use client::Client;
use engine::Engine;
use journal::Journal;
use sidecar::{Role, Sidecar};

/// The longest wait in a test: only a step that hangs takes so long.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A proxy under test, with its client and journal.
pub struct Rig {
    pub journal: Arc<Journal>,
    pub client: Client,
    pub registration: String,
    pub stop: Stop,
    run: Option<JoinHandle<End>>,
}

impl Rig {
    /// Starts a proxy on free ports, with these flags.
    pub async fn start(flags: &[&str]) -> Self {
        let ports = [
            "pd-proxy",
            "--listen",
            "127.0.0.1:0",
            "--registration",
            "127.0.0.1:0",
        ];
        let config = Config::parse_from([&ports[..], flags].concat());
        let proxy = Proxy::bind(config).await.expect("free ports");
        let client = Client::new(format!("http://{}", proxy.listen()));
        let registration = format!("tcp://{}", proxy.registration());
        let stop = Stop::default();
        let run = Some(tokio::spawn(proxy.run(stop.clone())));
        Self {
            journal: Arc::default(),
            client,
            registration,
            stop,
            run,
        }
    }

    /// Returns the address of the registration port, without the scheme.
    pub fn registration_address(&self) -> &str {
        self.registration.strip_prefix("tcp://").unwrap()
    }

    /// Starts an engine that writes into this rig's journal.
    pub async fn engine(&self, name: &str) -> Engine {
        Engine::start(name, Arc::clone(&self.journal)).await
    }

    /// Starts an instance that registers at the proxy. Does not wait until the proxy lists the instance, so
    /// it also serves tests in which the client cannot read the proxy's `/instances`.
    pub async fn instance_unseen(&self, name: &str, role: Role) -> (Engine, Sidecar) {
        let engine = self.engine(name).await;
        let sidecar = Sidecar::start(name, role, &engine.url, &self.registration).await;
        (engine, sidecar)
    }

    /// Starts an engine and its sidecar, and waits until the instance is ready.
    pub async fn instance(&self, name: &str, role: Role) -> (Engine, Sidecar) {
        let engine = self.engine(name).await;
        let sidecar = Sidecar::start(name, role, &engine.url, &self.registration).await;
        self.until_state(name, "ready").await;
        (engine, sidecar)
    }

    /// Starts a prefill instance `p` and a decode instance `d`.
    pub async fn pair(&self) -> Pair {
        let (p, p_sidecar) = self.instance("p", Role::Prefill).await;
        let (d, d_sidecar) = self.instance("d", Role::Decode).await;
        Pair {
            p,
            d,
            p_sidecar,
            d_sidecar,
        }
    }

    /// Waits until `/instances` shows this instance in this state (`gone`: not at all).
    pub async fn until_state(&self, id: &str, state: &str) {
        self.until("/instances", |instances| {
            let shown = instances.as_array().unwrap().iter().find(|i| i["id"] == id);
            shown.map_or("gone", |i| i["standing"]["state"].as_str().unwrap()) == state
        })
        .await;
    }

    /// Waits until a JSON page satisfies a condition, and returns it.
    pub async fn until(&self, path: &str, holds: impl Fn(&Value) -> bool) -> Value {
        let mut last = Value::Null;
        let asked = async {
            loop {
                last = self.client.get(path).await.json();
                if holds(&last) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let in_time = tokio::time::timeout(PATIENCE, asked).await.is_ok();
        assert!(in_time, "{path} stays {last}");
        last
    }

    /// Waits until the only request so far has ended, and returns its record.
    pub async fn record(&self) -> Value {
        let all = self
            .until("/requests", |all| !all.as_array().unwrap().is_empty())
            .await;
        assert_eq!(all.as_array().unwrap().len(), 1, "{all}");
        all[0].clone()
    }

    /// Returns the value of a sample in `/metrics`; 0 if the sample does not exist.
    pub async fn metric(&self, sample: &str) -> f64 {
        let text = self.client.get("/metrics").await.text();
        text.lines()
            .find_map(|line| line.strip_prefix(sample)?.strip_prefix(' ')?.parse().ok())
            .unwrap_or(0.0)
    }

    /// Waits until a sample in `/metrics` has reached a value.
    pub async fn until_metric(&self, sample: &str, least: f64) {
        let reached = async {
            while self.metric(sample).await < least {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let in_time = tokio::time::timeout(PATIENCE, reached).await.is_ok();
        assert!(in_time, "{sample} stays below {least}");
    }

    /// Drains the proxy and waits for its end.
    pub async fn end(mut self) -> End {
        self.stop.drain.cancel();
        self.ended().await
    }

    /// Waits for the end of a proxy that was stopped by other means.
    pub async fn ended(&mut self) -> End {
        let run = self.run.take().expect("it ends once");
        tokio::time::timeout(PATIENCE, run)
            .await
            .expect("it ends")
            .expect("no panic")
    }
}

/// The two instances that most tests use.
pub struct Pair {
    pub p: Engine,
    pub d: Engine,
    pub p_sidecar: Sidecar,
    pub d_sidecar: Sidecar,
}
