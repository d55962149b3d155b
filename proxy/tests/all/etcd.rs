//! Tests of several proxies that share a real etcd. `PD_TEST_ETCD` names the etcd binary, which `make etcd`
//! fetches.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use proxy::Config;
use serde_json::json;

use crate::ports::free_port;
use crate::support::Rig;
use crate::support::sidecar::{Role, Sidecar};

/// An etcd with its own data, which ends with the test.
struct Etcd {
    binary: String,
    folder: tempfile::TempDir,
    ports: [u16; 2],
    child: Child,
}

impl Etcd {
    /// Starts etcd. Prints a note and returns `None` if there is no binary.
    fn start() -> Option<Self> {
        let named = std::env::var("PD_TEST_ETCD").unwrap_or_default();
        let Some(binary) = Some(named).filter(|path| !path.is_empty()) else {
            eprintln!("SKIPPED: PD_TEST_ETCD names no etcd; `make etcd` fetches one");
            return None;
        };
        let folder = tempfile::tempdir().unwrap();
        let ports = [free_port(), free_port()];
        let child = spawn(&binary, &folder, ports);
        Some(Self {
            binary,
            folder,
            ports,
            child,
        })
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports[0])
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn restart(&mut self) {
        self.child = spawn(&self.binary, &self.folder, self.ports);
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

fn spawn(binary: &str, folder: &tempfile::TempDir, [client, peer]: [u16; 2]) -> Child {
    let (client, peer) = (
        format!("http://127.0.0.1:{client}"),
        format!("http://127.0.0.1:{peer}"),
    );
    Command::new(binary)
        .args([
            "--name",
            "one",
            "--data-dir",
            folder.path().to_str().unwrap(),
        ])
        .args([
            "--listen-client-urls",
            &client,
            "--advertise-client-urls",
            &client,
        ])
        .args([
            "--listen-peer-urls",
            &peer,
            "--initial-advertise-peer-urls",
            &peer,
        ])
        .args(["--initial-cluster", &format!("one={peer}")])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

async fn until_shared(rig: &Rig) {
    let sample = "pd_proxy_shared_registry_total{result=\"ok\"}";
    rig.until_metric(sample, rig.metric(sample).await + 1.0)
        .await;
}

#[tokio::test]
async fn one_proxy_dies_and_the_other_serves_on() {
    let Some(mut etcd) = Etcd::start() else {
        return;
    };
    let url = etcd.url();
    let flags = ["--etcd", url.as_str(), "--call-back-every", "200ms"];
    let first = Rig::start(&flags).await;
    let second = Rig::start(&flags).await;
    // The sidecars register only at the first proxy.
    let pair = first.pair().await;
    second.until_state("p", "ready").await;
    second.until_state("d", "ready").await;
    let shown = second.client.get("/instances").await.json();
    assert_eq!(
        (&shown[0]["source"], &shown[1]["source"]),
        (&json!("shared"), &json!("shared"))
    );
    let body = json!({"model": "m", "prompt": "hello", "max_tokens": 8});
    assert_eq!(
        second.client.post("/v1/completions", &body).await.status,
        200
    );
    assert_eq!((pair.p.seen().len(), pair.d.seen().len()), (1, 1));

    // The first proxy revokes its lease as it ends, so that its keys do not remain until the lease expires.
    first.end().await;
    until_shared(&second).await;
    until_shared(&second).await;
    assert_eq!(
        second.client.post("/v1/completions", &body).await.status,
        200
    );

    // A third proxy learns of the instances from the second proxy alone.
    let third = Rig::start(&flags).await;
    third.until_state("d", "ready").await;

    // Without etcd all proxies continue. When etcd is back, the proxies share their instances again.
    etcd.kill();
    second
        .until_metric("pd_proxy_shared_registry_total{result=\"failed\"}", 1.0)
        .await;
    for rig in [&second, &third] {
        assert_eq!(rig.client.post("/v1/completions", &body).await.status, 200);
    }
    etcd.restart();
    until_shared(&second).await;

    // An instance that has gone disappears from every proxy.
    drop((pair.d, pair.d_sidecar));
    second.until_state("d", "gone").await;
    third.until_state("d", "gone").await;
}

#[tokio::test]
async fn one_proxy_is_killed_and_the_other_serves_on() {
    let Some(etcd) = Etcd::start() else {
        return;
    };
    let url = etcd.url();
    let flags = ["--etcd", url.as_str(), "--call-back-every", "200ms"];
    let registration = format!("127.0.0.1:{}", free_port());
    let mut killed = Command::new(env!("CARGO_BIN_EXE_pd-proxy"))
        .args(["--listen", "127.0.0.1:0", "--registration", &registration])
        .args(flags)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let rig = Rig::start(&flags).await;
    // The sidecars know only the proxy that is killed.
    let (p, d) = (rig.engine("p").await, rig.engine("d").await);
    let at = format!("tcp://{registration}");
    let _p = Sidecar::start("p", Role::Prefill, &p.url, &at).await;
    let _d = Sidecar::start("d", Role::Decode, &d.url, &at).await;
    for id in ["p", "d"] {
        rig.until_state(id, "ready").await;
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
    let body = json!({"model": "m", "prompt": "hello", "max_tokens": 8});
    let until = std::time::Instant::now() + Duration::from_secs(13);
    // Continue until the lease of the killed proxy (10 s) has expired, because etcd deletes its keys then.
    while std::time::Instant::now() < until {
        let answer = rig.client.post("/v1/completions", &body).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert_eq!(p.seen().len(), d.seen().len(), "each with its transfer");
    assert!(p.seen().len() > 3);
}

#[tokio::test]
async fn a_proxy_without_its_etcd_starts_and_serves() {
    let flags = ["--etcd", "http://127.0.0.1:9", "--call-back-every", "200ms"];
    let rig = Rig::start(&flags).await;
    let (_d, _sidecar) = rig.instance("d", Role::Decode).await;
    let body = json!({"model": "m", "prompt": "hello"});
    assert_eq!(rig.client.post("/v1/completions", &body).await.status, 200);
    rig.until_metric("pd_proxy_shared_registry_total{result=\"failed\"}", 1.0)
        .await;
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(rig.client.post("/v1/completions", &body).await.status, 200);
}

#[test]
fn its_address_is_checked() {
    use clap::Parser;
    let config = Config::try_parse_from(["pd-proxy", "--etcd", "http://a:1,b:2"]).unwrap();
    assert_eq!(config.problems().len(), 1);
}
