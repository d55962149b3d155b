//! Tests of TLS towards clients and towards engines. A proxy with a TLS port is the engine of another proxy,
//! so one test covers both.

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use proxy::TlsFiles;
use serde_json::json;

use crate::support::Rig;
use crate::support::sidecar::Role;

/// Writes a certificate for this host. Returns the files of the certificate and of its key.
fn certificate(folder: &std::path::Path) -> (String, String) {
    let names = ["127.0.0.1".to_owned(), "localhost".to_owned()];
    let made = rcgen::generate_simple_self_signed(names).unwrap();
    let (cert, key) = (folder.join("cert.pem"), folder.join("key.pem"));
    std::fs::write(&cert, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let text = |path: &std::path::Path| path.to_str().unwrap().to_owned();
    (text(&cert), text(&key))
}

async fn get(files: &TlsFiles, url: &str) -> Result<u16, String> {
    let mut http = HttpConnector::new();
    http.enforce_http(false);
    let client: Client<_, Full<Bytes>> =
        Client::builder(TokioExecutor::new()).build(files.connector(http).unwrap());
    let request = Request::get(url).body(Full::default()).unwrap();
    let response = client.request(request).await.map_err(|e| e.to_string())?;
    let status = response.status().as_u16();
    drop(response.into_body().collect().await.unwrap());
    Ok(status)
}

#[tokio::test]
async fn both_sides() {
    let folder = tempfile::tempdir().unwrap();
    let (cert, key) = certificate(folder.path());
    let inner = Rig::start(&["--tls-cert", &cert, "--tls-key", &key]).await;
    let _instance = inner.instance_unseen("d", Role::Decode).await;
    let url = inner.client.base.replace("http://", "https://");
    let trusting = TlsFiles {
        tls_ca: Some(cert.clone().into()),
        ..TlsFiles::default()
    };
    assert_eq!(get(&trusting, &format!("{url}/health")).await, Ok(200));
    assert!(
        get(&TlsFiles::default(), &format!("{url}/health"))
            .await
            .is_err(),
        "an unknown root"
    );

    let outer = Rig::start(&["--decode", &url, "--tls-ca", &cert]).await;
    outer.until("/ready", |ready| ready["ready"] == true).await;
    let body = json!({"model": "m", "prompt": "hello"});
    let answered = async {
        while outer.client.post("/v1/completions", &body).await.status != 200 {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(crate::support::PATIENCE, answered)
        .await
        .expect("it gets through");
}

#[test]
fn bad_files() {
    let folder = tempfile::tempdir().unwrap();
    let (cert, key) = certificate(folder.path());
    let second = tempfile::tempdir().unwrap();
    let (_, other) = certificate(second.path());
    let check = |cert: &str, key: &str, word: &str| {
        let files = TlsFiles {
            tls_cert: Some(cert.into()),
            tls_key: Some(key.into()),
            tls_ca: None,
        };
        let error = files.acceptor().err().expect("no TLS of that").to_string();
        assert!(error.contains(word), "{error}");
    };
    check("/nonexistent", &key, "--tls-cert /nonexistent");
    check(&cert, "/nonexistent", "--tls-key /nonexistent");
    check(
        &key,
        &key,
        "no certificate in it, but a private key: that is for --tls-key",
    );
    check(
        &cert,
        &cert,
        "no private key in it, but a certificate: that is for --tls-cert",
    );
    let der = folder.path().join("cert.der");
    std::fs::write(&der, [0x30, 0x82, 1, 1]).unwrap();
    check(der.to_str().unwrap(), &key, "openssl x509 -inform der");
    check(&cert, &other, "not that of the certificate");
}

#[tokio::test]
async fn a_ca_as_server_certificate_is_explained() {
    let folder = tempfile::tempdir().unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let made = params.self_signed(&key).unwrap();
    let file = |name: &str, text: String| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (cert, key) = (
        file("ca.pem", made.pem()),
        file("key.pem", key.serialize_pem()),
    );
    let inner = Rig::start(&["--tls-cert", &cert, "--tls-key", &key]).await;
    let url = inner.client.base.replace("http://", "https://");
    let outer = Rig::start(&["--decode", &url, "--tls-ca", &cert]).await;
    let told = outer.until("/instances", |all| {
        let reason = all[0]["standing"]["reason"].as_str().unwrap_or_default();
        reason.contains("CA:TRUE") && reason.contains("--tls-ca")
    });
    told.await;
}
