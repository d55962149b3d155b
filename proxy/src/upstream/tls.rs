//! TLS on both sides: with a certificate for clients, and with trusted roots for engines.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::client::WebPkiServerVerifier;
use tokio_rustls::rustls::client::danger::ServerCertVerifier as _;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::rustls::{ClientConfig, Error, RootCertStore, ServerConfig};
use tracing::warn;

/// Certificates and keys.
#[derive(Clone, Debug, Default, Args)]
pub struct TlsFiles {
    /// Certificate chain (PEM) that the proxy shows to clients. With this flag the HTTP port speaks only
    /// TLS.
    #[arg(
        long,
        env = "PD_PROXY_TLS_CERT",
        value_name = "FILE",
        requires = "tls_key"
    )]
    pub tls_cert: Option<PathBuf>,

    /// Private key (PEM) of --tls-cert.
    #[arg(
        long,
        env = "PD_PROXY_TLS_KEY",
        value_name = "FILE",
        requires = "tls_cert"
    )]
    pub tls_key: Option<PathBuf>,

    /// Roots (PEM) by which the proxy trusts `https://` engines, instead of the system's roots.
    #[arg(long, env = "PD_PROXY_TLS_CA", value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
}

/// Certificates or keys that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The file is not PEM of the right kind.
    #[error("{flag} {path}: {text}")]
    File {
        /// The flag that names the file.
        flag: &'static str,
        /// Path of the file.
        path: PathBuf,
        /// The problem, and its cure if the cure is known.
        text: String,
    },
    /// Certificate and key do not belong together, or are of an unsupported kind.
    #[error("--tls-cert and --tls-key: {0}")]
    Pair(String),
}

impl TlsFiles {
    /// Returns the acceptor for clients' connections; `None` if the port does not speak TLS.
    ///
    /// # Errors
    /// A file cannot be used. The error names the file.
    pub fn acceptor(&self) -> Result<Option<TlsAcceptor>, TlsError> {
        let (Some(cert), Some(key)) = (&self.tls_cert, &self.tls_key) else {
            return Ok(None);
        };
        let chain = certificates("--tls-cert", cert)?;
        let key = PrivateKeyDer::from_pem_file(key).map_err(|e| match e {
            pem::Error::NoItemsFound => bad(
                "--tls-key",
                key,
                &format!("no private key in it{}", instead(key)),
            ),
            e => bad("--tls-key", key, &e),
        })?;
        if let Some(flaw) = flaw(&chain) {
            warn!(path = %cert.display(), "--tls-cert: clients may refuse this certificate: {flaw}");
        }
        let config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
            .map_err(|e| match e {
                Error::InconsistentKeys(_) => {
                    TlsError::Pair(
                        "the key is not that of the certificate, which is the first one in its file: give the two that \
                         were made together"
                            .into(),
                    )
                }
                e => TlsError::Pair(explained(&e.to_string())),
            })?;
        Ok(Some(TlsAcceptor::from(Arc::new(config))))
    }

    /// Returns the connector to engines, with TLS for `https://` URLs.
    ///
    /// # Errors
    /// A file cannot be used. The error names the file.
    pub fn connector<R>(
        &self,
        http: HttpConnector<R>,
    ) -> Result<HttpsConnector<HttpConnector<R>>, TlsError> {
        let mut roots = RootCertStore::empty();
        let trusted = match &self.tls_ca {
            Some(path) => certificates("--tls-ca", path)?,
            // An unreadable root is no error at the start: if an engine needs this root, the failed
            // handshake names the problem.
            None => rustls_native_certs::load_native_certs().certs,
        };
        roots.add_parsable_certificates(trusted);
        let config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|e| TlsError::Pair(e.to_string()))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(HttpsConnectorBuilder::new()
            .with_tls_config(config)
            .https_or_http()
            .enable_http1()
            .wrap_connector(http))
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn certificates(flag: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_file_iter(path).map_err(|e| bad(flag, path, &e))?;
    let all: Vec<_> = read
        .collect::<Result<_, _>>()
        .map_err(|e| bad(flag, path, &e))?;
    if all.is_empty() {
        let text = format!("no certificate in it{}", instead(path));
        return Err(bad(flag, path, &text));
    }
    Ok(all)
}

/// Returns the flaw that makes every client refuse a server's certificate, independent of the client's
/// roots; `None` if the check finds no flaw.
fn flaw(chain: &[CertificateDer<'static>]) -> Option<&'static str> {
    let (first, others) = chain.split_first()?;
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(chain.iter().cloned());
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider());
    // The name is not important, because the verifier compares it only after the checks that this
    // function needs.
    let name = ServerName::try_from("localhost").ok()?;
    let error = verifier
        .build()
        .ok()?
        .verify_server_cert(first, others, &name, &[], UnixTime::now())
        .err()?
        .to_string();
    let flaws = [
        (
            "CaUsedAsEndEntity",
            "it is a CA (CA:TRUE), which may only sign others; give one that the CA has issued (CA:FALSE)",
        ),
        (
            "expired",
            "it has expired; renew it, or set the clock of this host",
        ),
        (
            "not valid yet",
            "it is not valid yet; wait, or set the clock of this host",
        ),
    ];
    let found = flaws.iter().find(|(sign, _)| error.contains(sign));
    found.map(|(_, flaw)| *flaw)
}

/// Returns a text that names what a file contains instead of the expected item, and the cure.
fn instead(path: &Path) -> &'static str {
    let bytes = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    if text.contains("-----BEGIN ENCRYPTED PRIVATE KEY") {
        ", but an encrypted private key: decrypt it with `openssl pkey -in FILE -out NEW`"
    } else if text.contains("PRIVATE KEY-----") {
        ", but a private key: that is for --tls-key"
    } else if text.contains("-----BEGIN CERTIFICATE REQUEST") {
        ", but a request for a certificate: give what the CA has made of it"
    } else if text.contains("-----BEGIN CERTIFICATE") {
        ", but a certificate: that is for --tls-cert, or, if it is a CA, for --tls-ca"
    } else if bytes.first() == Some(&0x30) {
        ": it is DER; make PEM of it with `openssl x509 -inform der` or `openssl pkey -inform der`"
    } else {
        ""
    }
}

/// Returns the text of a TLS handshake error, followed by a cure if this function knows a cure.
pub(crate) fn explained(error: &str) -> String {
    let cures = [
        (
            "CaUsedAsEndEntity",
            "the server shows a CA certificate (CA:TRUE), which may only sign others: let the server show a \
             certificate that the CA has issued (CA:FALSE), and give the CA in --tls-ca",
        ),
        (
            "UnknownIssuer",
            "no trusted root has issued the server's certificate: give its CA in --tls-ca",
        ),
        (
            "expired",
            "renew the server's certificate, or set the clock of this host",
        ),
        (
            "NotValidForName",
            "the certificate names other hosts than the URL: call the server by a name in its subjectAltName",
        ),
        (
            "not valid for name",
            "call the server by a name in its certificate's subjectAltName",
        ),
    ];
    match cures.iter().find(|(sign, _)| error.contains(sign)) {
        Some((_, cure)) if error.contains("certificate") => format!("{error}: {cure}"),
        _ => error.to_owned(),
    }
}

fn bad(flag: &'static str, path: &Path, error: &dyn std::fmt::Display) -> TlsError {
    TlsError::File {
        flag,
        path: path.to_owned(),
        text: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flaws_of_a_certificate_are_said_at_the_start() {
        let check = |change: fn(&mut rcgen::CertificateParams), word: Option<&str>| {
            let key = rcgen::KeyPair::generate().unwrap();
            let mut params = rcgen::CertificateParams::new(vec!["host".to_owned()]).unwrap();
            change(&mut params);
            let made = params.self_signed(&key).unwrap();
            let said = flaw(&[made.der().clone()]);
            match word {
                Some(word) => assert!(said.is_some_and(|s| s.contains(word)), "{word} {said:?}"),
                None => assert_eq!(said, None),
            }
        };
        check(|_| (), None);
        check(
            |p| p.not_after = rcgen::date_time_ymd(2020, 1, 1),
            Some("expired"),
        );
        check(
            |p| p.not_before = rcgen::date_time_ymd(3000, 1, 1),
            Some("not valid yet"),
        );
        check(
            |p| p.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained),
            Some("CA:TRUE"),
        );
    }
}
