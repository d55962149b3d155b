//! TLS 1.3 in which both sides prove an Ed25519 key of the roster. There are no certificates (RFC 7250).
//!
//! Resumption and tickets are off: a resumed connection would not prove a key again, so a revoked key would stay valid
//! until the ticket expires.

use std::io;
use std::sync::Arc;

use tokio_rustls::rustls::client::danger::{
    HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier,
};
use tokio_rustls::rustls::client::{ResolvesClientCert, Resumption};
use tokio_rustls::rustls::crypto::{CryptoProvider, ring, verify_tls13_signature_with_raw_key};
use tokio_rustls::rustls::pki_types::{
    CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime,
};
use tokio_rustls::rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use tokio_rustls::rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use tokio_rustls::rustls::sign::CertifiedKey;
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, OtherError,
    PeerMisbehaved, ServerConfig, SignatureScheme,
};

use super::{Identity, Member, PublicKey, Role};

/// The peers that a port serves, or that a client may reach at an address.
#[derive(Clone, Debug, Default)]
pub struct Expected {
    /// Roles of which the peer needs at least one.
    pub roles: &'static [Role],
    /// Host that this process has dialed; `None` for peers that connect to this process.
    pub host: Option<String>,
    /// Keys of which the peer needs one; empty if any key of the roster will do.
    pub keys: Vec<PublicKey>,
    /// The kind of the port. A connection to a port of one kind is of no use at a port of another kind.
    pub channel: Channel,
}

/// The kind of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Channel {
    /// ZeroMQ inside TLS.
    #[default]
    Control,
    /// The data of the built-in TCP transport: a greeting inside TLS, then frames under keys of the handshake.
    Data,
}

impl Channel {
    /// Returns the protocol that both sides state, so that an HTTP client that reaches a port is refused early.
    fn protocol(self) -> &'static [u8] {
        match self {
            Self::Control => b"pd-sidecar/1",
            Self::Data => b"pd-sidecar-data/1",
        }
    }
}

/// Reason why a peer's key is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The roster does not have the key.
    #[error("the roster has no key {0}")]
    UnknownKey(PublicKey),
    /// The key's entry in the roster has none of the roles that this connection needs.
    #[error("{name} has none of the roles {needed} in the roster")]
    Role {
        /// Name of the key's owner.
        name: String,
        /// The roles that would do.
        needed: String,
    },
    /// The key belongs to a process of another host.
    #[error("{name} is not at {host}, says the roster")]
    Host {
        /// Name of the key's owner.
        name: String,
        /// The host that was dialed.
        host: String,
    },
    /// The peer has another key than the proxy has named.
    #[error("{0} has proved another key than the named one")]
    OtherKey(String),
}

impl Refusal {
    /// Returns the reason's name in metrics.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::UnknownKey(_) => "unknown_key",
            Self::Role { .. } => "role",
            Self::Host { .. } => "host",
            Self::OtherKey(_) => "other_key",
        }
    }
}

impl Expected {
    /// Checks a key that a peer has shown. The handshake then checks that the peer has the private key.
    ///
    /// # Errors
    /// See [`Refusal`].
    pub fn check(&self, identity: &Identity, key: &PublicKey) -> Result<Member, Refusal> {
        let roster = identity.roster();
        let member = roster.member(key).ok_or(Refusal::UnknownKey(*key))?;
        let name = member.name.to_string();
        if !member.has(self.roles) {
            let words: Vec<_> = self.roles.iter().map(|role| role.as_str()).collect();
            let needed = words.join(", ");
            return Err(Refusal::Role { name, needed });
        }
        if let Some(host) = self.host.as_ref().filter(|host| !member.is_at(host)) {
            let host = host.clone();
            return Err(Refusal::Host { name, host });
        }
        if !self.keys.is_empty() && !self.keys.contains(key) {
            return Err(Refusal::OtherKey(name));
        }
        Ok(member.clone())
    }
}

/// Returns the configuration of a port that serves these peers.
pub fn server(identity: &Identity, expected: Expected) -> Arc<ServerConfig> {
    let protocol = expected.channel.protocol();
    let verifier = Verifier::new(identity, expected);
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .expect("the provider has suites for TLS 1.3")
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(OwnKey(identity.clone())));
    config.alpn_protocols = vec![protocol.to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Arc::new(config)
}

/// Returns the configuration of a connection to one of these peers.
pub fn client(identity: &Identity, expected: Expected) -> Arc<ClientConfig> {
    let protocol = expected.channel.protocol();
    let verifier = Verifier::new(identity, expected);
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .expect("the provider has suites for TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(OwnKey(identity.clone())));
    config.alpn_protocols = vec![protocol.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Arc::new(config)
}

/// Returns the reason for which a handshake refused the peer's key; `None` if the handshake failed otherwise.
pub fn refusal(error: &io::Error) -> Option<&Refusal> {
    match error.get_ref()?.downcast_ref::<Error>()? {
        Error::InvalidCertificate(CertificateError::Other(other)) => other.0.downcast_ref(),
        _ => None,
    }
}

/// Returns true if the peer has refused this process's key. A client learns this only when it first reads.
pub fn alert(error: &io::Error) -> bool {
    let cause = error.get_ref().and_then(|e| e.downcast_ref());
    matches!(cause, Some(Error::AlertReceived(_)))
}

/// Returns the key that a peer has proved in a completed handshake, from the chain that it has shown.
pub fn proved(shown: Option<&[CertificateDer<'_>]>) -> Option<PublicKey> {
    PublicKey::of_spki(shown?.first()?)
}

/// Shows this process's key to peers. Reads the key at each handshake, because the key can change.
#[derive(Debug)]
struct OwnKey(Identity);

impl OwnKey {
    fn certified(&self) -> Option<Arc<CertifiedKey>> {
        let key = Arc::clone(&self.0.private().signing);
        let spki = CertificateDer::from(key.public_key()?.to_vec());
        Some(Arc::new(CertifiedKey::new(vec![spki], key)))
    }
}

impl ResolvesServerCert for OwnKey {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.certified()
    }

    fn only_raw_public_keys(&self) -> bool {
        true
    }
}

impl ResolvesClientCert for OwnKey {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.certified()
    }

    fn only_raw_public_keys(&self) -> bool {
        true
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Accepts the keys of the roster.
#[derive(Debug)]
struct Verifier {
    identity: Identity,
    expected: Expected,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn new(identity: &Identity, expected: Expected) -> Self {
        Self {
            identity: identity.clone(),
            expected,
            provider: provider(),
        }
    }

    fn check(&self, spki: &CertificateDer<'_>) -> Result<(), Error> {
        let key = PublicKey::of_spki(spki)
            .ok_or(Error::InvalidCertificate(CertificateError::BadEncoding))?;
        let checked = self.expected.check(&self.identity, &key).map(drop);
        checked.map_err(|refusal| {
            let other = OtherError(Arc::new(refusal));
            Error::InvalidCertificate(CertificateError::Other(other))
        })
    }

    fn verify(
        &self,
        message: &[u8],
        spki: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let spki = SubjectPublicKeyInfoDer::from(spki.as_ref());
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature_with_raw_key(message, &spki, signature, algorithms)
    }
}

/// The methods that have the same form for the keys of servers and of clients.
macro_rules! signed_by_raw_key {
    () => {
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Err(OLD)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            spki: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            self.verify(message, spki, signature)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ED25519]
        }

        fn requires_raw_public_keys(&self) -> bool {
            true
        }
    };
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        spki: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(spki).map(|()| ServerCertVerified::assertion())
    }

    signed_by_raw_key!();
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        spki: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(spki).map(|()| ClientCertVerified::assertion())
    }

    signed_by_raw_key!();
}

/// TLS 1.2 is never negotiated.
const OLD: Error = Error::PeerMisbehaved(PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme);

/// The cryptography is named here, so that it does not depend on the features of other crates.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}
