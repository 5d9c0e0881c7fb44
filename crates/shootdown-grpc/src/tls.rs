//! Authentication by TLS 1.3, of both sides.
#![forbid(unsafe_code)]

use std::sync::Arc;
use thiserror::Error;
use tokio_rustls::rustls::client::Resumption;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer,
};
use tokio_rustls::rustls::server::{
    NoServerSessionStorage, ProducesTickets, VerifierBuilderError, WebPkiClientVerifier,
};
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{ClientConfig, Error as RustlsError, RootCertStore, ServerConfig};

/// Name of HTTP/2 in TLS.
const H2: &[u8] = b"h2";

/// Reason why certificates cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A text is not PEM, or lacks the expected part.
    #[error("the {what} cannot be read from PEM: {error}")]
    Pem {
        /// The text.
        what: &'static str,
        /// The reason.
        error: pem::Error,
    },
    /// The key is protected by a password.
    #[error("the key is encrypted: give it without a password (`openssl pkey -in KEY -out PLAIN`)")]
    Encrypted,
    /// A text contains no certificate.
    #[error("no certificate in the {0}")]
    Nothing(&'static str),
    /// The key does not belong to the certificate, or its kind is not supported.
    #[error("rustls does not take the certificate and its key, or a root: {0}")]
    Rustls(#[from] RustlsError),
    /// The roots or revocation lists cannot be used to verify mirrors.
    #[error("the roots or revocation lists cannot be used to verify mirrors: {0}")]
    Verifier(#[from] VerifierBuilderError),
}

/// The certificate of an owner, and the certificates of mirrors that it accepts.
#[derive(Clone, Debug)]
pub struct ServerTls {
    pub(crate) config: Arc<ServerConfig>,
}

/// The certificate of a mirror, and the certificates of owners that it accepts.
#[derive(Clone, Debug)]
pub struct ClientTls {
    pub(crate) config: Arc<ClientConfig>,
}

impl ServerTls {
    /// Makes settings from PEM: the owner's certificate (with intermediate ones), its key, and the
    /// roots of the mirrors' certificates. Mirrors without a certificate of these roots are
    /// refused.
    ///
    /// # Errors
    /// [`TlsError`], if a text is not valid or the key does not fit.
    pub fn from_pem(certificate: &[u8], key: &[u8], roots: &[u8]) -> Result<Self, TlsError> {
        Self::from_pem_with_revoked(certificate, key, roots, &[])
    }

    /// Makes settings like [`from_pem`](Self::from_pem), with revocation lists (PEM) of the roots.
    /// If `revoked` is not empty, intermediate certificates must be on a list, too.
    ///
    /// # Errors
    /// As [`from_pem`](Self::from_pem).
    pub fn from_pem_with_revoked(
        certificate: &[u8],
        key: &[u8],
        roots: &[u8],
        revoked: &[u8],
    ) -> Result<Self, TlsError> {
        let lists =
            CertificateRevocationListDer::pem_slice_iter(revoked).collect::<Result<Vec<_>, _>>();
        let lists = lists.map_err(|error| TlsError::Pem { what: "revocation lists", error })?;
        let roots = Arc::new(read_roots(roots)?);
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
            .with_crls(lists)
            .build()?;
        let (chain, key) = (read_chain(certificate)?, read_key(key)?);
        let config =
            ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13])?;
        Ok(Self::from_config(
            config.with_client_cert_verifier(verifier).with_single_cert(chain, key)?,
        ))
    }

    /// Makes settings from a configuration, such as one that reloads certificates when they change.
    /// Peers without a certificate are refused here as well. Sessions are not resumed, so each
    /// connection shows a certificate that is valid now. The protocol is HTTP/2.
    pub fn from_config(mut config: ServerConfig) -> Self {
        config.alpn_protocols = vec![H2.to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.ticketer = Arc::new(NoTickets);
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Self { config: Arc::new(config) }
    }
}

impl ClientTls {
    /// Makes settings from PEM: the mirror's certificate (with intermediate ones), its key, and the
    /// roots of the owners' certificates.
    ///
    /// # Errors
    /// [`TlsError`], if a text is not valid or the key does not fit.
    pub fn from_pem(certificate: &[u8], key: &[u8], roots: &[u8]) -> Result<Self, TlsError> {
        let (chain, key) = (read_chain(certificate)?, read_key(key)?);
        let config =
            ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13])?;
        let config =
            config.with_root_certificates(read_roots(roots)?).with_client_auth_cert(chain, key)?;
        Ok(Self::from_config(config))
    }

    /// Makes settings from a configuration. Sessions are not resumed, and the protocol is HTTP/2.
    pub fn from_config(mut config: ClientConfig) -> Self {
        config.alpn_protocols = vec![H2.to_vec()];
        config.resumption = Resumption::disabled();
        config.enable_early_data = false;
        Self { config: Arc::new(config) }
    }
}

/// Resumes no sessions: another server with the same secret could otherwise resume one here.
#[derive(Debug)]
struct NoTickets;

impl ProducesTickets for NoTickets {
    fn enabled(&self) -> bool {
        false
    }

    fn lifetime(&self) -> u32 {
        0
    }

    fn encrypt(&self, _: &[u8]) -> Option<Vec<u8>> {
        None
    }

    fn decrypt(&self, _: &[u8]) -> Option<Vec<u8>> {
        None
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn read_chain(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    certificates(text, "certificate")
}

fn certificates(text: &[u8], what: &'static str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_slice_iter(text).collect::<Result<Vec<_>, _>>();
    let read = read.map_err(|error| TlsError::Pem { what, error })?;
    if read.is_empty() { Err(TlsError::Nothing(what)) } else { Ok(read) }
}

fn read_key(text: &[u8]) -> Result<PrivateKeyDer<'static>, TlsError> {
    if text.windows(9).any(|part| part == b"ENCRYPTED") {
        return Err(TlsError::Encrypted);
    }
    PrivateKeyDer::from_pem_slice(text).map_err(|error| TlsError::Pem { what: "key", error })
}

fn read_roots(text: &[u8]) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for root in certificates(text, "roots")? {
        roots.add(root)?;
    }
    Ok(roots)
}
