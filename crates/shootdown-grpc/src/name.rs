//! Identity of a peer: the names in its certificate.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio_rustls::rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// Header in which a peer states its name on a server without TLS.
pub(crate) const INSECURE_NAME: &str = "shootdown-insecure-name";

/// A name of a certificate's holder: a DNS or URI entry of the subject alternative names. The
/// common name and names with a wildcard do not count.
///
/// Made from a text. A text with `://` is a URI (as in SPIFFE), and is compared byte by byte. Any
/// other text is a DNS name, and is compared without regard to case.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Name {
    /// Name of a host, in lower case, without a final dot.
    Dns(String),
    /// A URI, such as `spiffe://example.org/gpu-1`.
    Uri(String),
}

impl From<&str> for Name {
    fn from(text: &str) -> Self {
        if text.contains("://") {
            return Self::Uri(text.to_owned());
        }
        Self::Dns(text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase())
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dns(name) | Self::Uri(name) => f.write_str(name),
        }
    }
}

/// The holder of a verified certificate.
#[derive(Clone, Debug)]
pub(crate) struct Shown {
    pub(crate) names: Arc<[Name]>,
    /// How long the certificate is valid from now.
    pub(crate) valid_for: Duration,
}

/// Reads a verified certificate. Returns `None` if it has no usable name.
pub(crate) fn shown(certificate: &CertificateDer<'_>) -> Option<Shown> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let entries = certificate.subject_alternative_name().ok()??;
    let mut names: Vec<Name> = entries.value.general_names.iter().filter_map(name).collect();
    names.sort();
    names.dedup();
    let end = u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let valid_for = Duration::from_secs(end).saturating_sub(now);
    (!names.is_empty()).then(|| Shown { names: names.into(), valid_for })
}

fn name(entry: &GeneralName<'_>) -> Option<Name> {
    match entry {
        GeneralName::DNSName(name)
            if !name.is_empty() && !name.contains('*') && !name.contains("://") =>
        {
            Some(Name::from(*name))
        }
        GeneralName::URI(uri) if uri.contains("://") => Some(Name::from(*uri)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::string::Ia5String;
    use rcgen::{CertificateParams, KeyPair, SanType};

    fn names(entries: Vec<SanType>) -> Option<Vec<String>> {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, "common.example");
        params.subject_alt_names = entries;
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        shown(certificate.der()).map(|shown| shown.names.iter().map(ToString::to_string).collect())
    }

    fn text(text: &str) -> Ia5String {
        Ia5String::try_from(text).unwrap()
    }

    #[test]
    fn only_whole_dns_and_uri_names_say_who_a_peer_is() {
        let entries = vec![
            SanType::DnsName(text("GPU-1.Example.")),
            SanType::DnsName(text("*.example")),
            SanType::URI(text("spiffe://example/GPU-1")),
            SanType::Rfc822Name(text("gpu-1@example")),
            SanType::IpAddress([127, 0, 0, 1].into()),
        ];
        assert_eq!(
            names(entries),
            Some(vec!["gpu-1.example".to_owned(), "spiffe://example/GPU-1".to_owned()])
        );
        assert_eq!(names(vec![SanType::DnsName(text("*.example"))]), None);
        assert_eq!(names(vec![]), None, "a common name says nothing");
        // A DNS entry that looks like a URI does not count.
        assert_eq!(names(vec![SanType::DnsName(text("spiffe://example/gpu-1"))]), None);
    }
}
