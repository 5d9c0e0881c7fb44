//! Authorities and whom they vouch for.

use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    date_time_ymd,
};
use shootdown_grpc::{ClientTls, ServerTls};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::ring};

pub(crate) struct Authority {
    pub(crate) root: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key, and the root of whom its holder trusts.
pub(crate) struct Identity {
    pub(crate) certificate: String,
    pub(crate) key: String,
    pub(crate) root: String,
}

impl Default for Authority {
    fn default() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, "root");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        let root = params.self_signed(&key).unwrap().pem();
        Self { root, issuer: Issuer::new(params, key) }
    }
}

impl Authority {
    pub(crate) fn issue(&self, name: &str) -> Identity {
        self.sign(CertificateParams::new(vec![name.to_owned()]).unwrap())
    }

    pub(crate) fn issue_for(&self, names: &[&str]) -> Identity {
        self.sign(
            CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())
                .unwrap(),
        )
    }

    /// Valid for so many seconds from now.
    pub(crate) fn issue_for_seconds(&self, name: &str, seconds: u64) -> Identity {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.not_before = (SystemTime::now() - Duration::from_secs(60)).into();
        params.not_after = (SystemTime::now() + Duration::from_secs(seconds)).into();
        self.sign(params)
    }

    /// Of a year that is over.
    pub(crate) fn issue_expired(&self, name: &str) -> Identity {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.not_before = date_time_ymd(2001, 1, 1);
        params.not_after = date_time_ymd(2002, 1, 1);
        self.sign(params)
    }

    /// For nobody.
    pub(crate) fn issue_nameless(&self) -> Identity {
        self.sign(CertificateParams::new(Vec::new()).unwrap())
    }

    fn sign(&self, params: CertificateParams) -> Identity {
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap().pem();
        Identity { certificate, key: key.serialize_pem(), root: self.root.clone() }
    }

    pub(crate) fn server(&self, name: &str) -> ServerTls {
        let own = self.issue(name);
        ServerTls::from_pem(own.certificate.as_bytes(), own.key.as_bytes(), self.root.as_bytes())
            .unwrap()
    }

    /// Trusts this authority and shows nothing.
    pub(crate) fn without_certificate(&self) -> ClientTls {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.root.as_bytes()).unwrap()).unwrap();
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let config =
            config.with_protocol_versions(&[&TLS13]).unwrap().with_root_certificates(roots);
        ClientTls::from_config(config.with_no_client_auth())
    }
}

impl Identity {
    pub(crate) fn client(&self) -> ClientTls {
        ClientTls::from_pem(self.certificate.as_bytes(), self.key.as_bytes(), self.root.as_bytes())
            .unwrap()
    }

    pub(crate) fn config(&self) -> ClientConfig {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.root.as_bytes()).unwrap()).unwrap();
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let config =
            config.with_protocol_versions(&[&TLS13]).unwrap().with_root_certificates(roots);
        let chain = vec![CertificateDer::from_pem_slice(self.certificate.as_bytes()).unwrap()];
        config
            .with_client_auth_cert(
                chain,
                PrivateKeyDer::from_pem_slice(self.key.as_bytes()).unwrap(),
            )
            .unwrap()
    }

    /// Trusts another authority.
    pub(crate) fn trusting(mut self, authority: &Authority) -> Self {
        self.root.clone_from(&authority.root);
        self
    }
}
