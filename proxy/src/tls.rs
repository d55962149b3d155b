//! TLS on both sides: towards clients with a certificate, towards engines with roots to trust.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{ClientConfig, Error, RootCertStore, ServerConfig};

/// Certificates and keys.
#[derive(Clone, Debug, Default, Args)]
pub struct TlsFiles {
    /// Certificate chain (PEM) that clients are shown; with it the HTTP port speaks TLS only.
    #[arg(
        long,
        env = "PD_PROXY_TLS_CERT",
        value_name = "FILE",
        requires = "tls_key"
    )]
    pub tls_cert: Option<PathBuf>,

    /// Its private key (PEM).
    #[arg(
        long,
        env = "PD_PROXY_TLS_KEY",
        value_name = "FILE",
        requires = "tls_cert"
    )]
    pub tls_key: Option<PathBuf>,

    /// Roots (PEM) that `https://` engines are trusted by, instead of the system's.
    #[arg(long, env = "PD_PROXY_TLS_CA", value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
}

/// Files that make no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Not PEM of the right kind.
    #[error("{flag} {path}: {text}")]
    File {
        /// Which.
        flag: &'static str,
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        text: String,
    },
    /// Certificate and key do not fit, or are of no supported kind.
    #[error("--tls-cert and --tls-key: {0}")]
    Pair(String),
}

impl TlsFiles {
    /// What makes TLS of a client's connection, if the port speaks it.
    ///
    /// # Errors
    /// The file that cannot be used.
    pub fn acceptor(&self) -> Result<Option<TlsAcceptor>, TlsError> {
        let (Some(cert), Some(key)) = (&self.tls_cert, &self.tls_key) else {
            return Ok(None);
        };
        let chain = certificates("--tls-cert", cert)?;
        let key = PrivateKeyDer::from_pem_file(key).map_err(|e| match e {
            pem::Error::NoItemsFound => bad(
                "--tls-key",
                key,
                &"no private key in it, or one that is encrypted",
            ),
            e => bad("--tls-key", key, &e),
        })?;
        let config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
            .map_err(|e| match e {
                Error::InconsistentKeys(_) => {
                    TlsError::Pair("the key is not that of the certificate".into())
                }
                e => TlsError::Pair(e.to_string()),
            })?;
        Ok(Some(TlsAcceptor::from(Arc::new(config))))
    }

    /// What connects to engines, with TLS where their URL says so.
    ///
    /// # Errors
    /// The file that cannot be used.
    pub fn connector(
        &self,
        http: HttpConnector,
    ) -> Result<HttpsConnector<HttpConnector>, TlsError> {
        let mut roots = RootCertStore::empty();
        let trusted = match &self.tls_ca {
            Some(path) => certificates("--tls-ca", path)?,
            // A root that cannot be read is missed when an engine needs it, and named then.
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
        return Err(bad(flag, path, &"no certificate in it"));
    }
    Ok(all)
}

fn bad(flag: &'static str, path: &Path, error: &dyn std::fmt::Display) -> TlsError {
    TlsError::File {
        flag,
        path: path.to_owned(),
        text: error.to_string(),
    }
}
