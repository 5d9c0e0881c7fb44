//! A connection to an owner.
#![forbid(unsafe_code)]

use crate::limits::LONGEST;
use crate::socket::Wire;
use crate::tls::ClientTls;
use hyper_util::rt::TokioIo;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tonic::transport::{Channel, Endpoint, Error};

/// Maximum size of an answer's headers in bytes.
const HEADERS: u32 = 8 * 1_024;
/// Flow-control window for contents in bytes.
const WINDOW: u32 = 1 << 20;

/// Address of an owner, and the name that its certificate must have.
#[derive(Clone, Debug)]
pub(crate) struct Address {
    text: Arc<str>,
    name: ServerName<'static>,
}

impl Address {
    /// Parses `host:port`. An IPv6 address is in brackets.
    pub(crate) fn read(text: &str, server_name: Option<&str>) -> Option<Self> {
        let (host, port) = text.rsplit_once(':')?;
        port.parse::<u16>().ok()?;
        let inner = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        if inner.is_none() && host.contains(':') {
            return None;
        }
        let host = inner.unwrap_or(host);
        let name = ServerName::try_from(server_name.unwrap_or(host).to_owned()).ok()?;
        Some(Self { text: text.into(), name })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Reason why there is no connection.
#[derive(Debug, Error)]
pub(crate) enum DialError {
    #[error("no connection: {}", chain(.0))]
    Transport(#[from] Error),
}

/// Returns an error and its sources as text.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let behind = error.to_string();
        // Some errors already contain the text of their source.
        if !text.ends_with(&behind) {
            text.push_str(": ");
            text.push_str(&behind);
        }
        source = error.source();
    }
    text
}

/// How connections are made.
#[derive(Debug)]
pub(crate) struct Dial {
    pub(crate) tls: Option<ClientTls>,
    pub(crate) keep_alive: (Duration, Duration),
}

impl Dial {
    pub(crate) async fn dial(
        &self,
        address: &Address,
        time: Duration,
    ) -> Result<Channel, DialError> {
        // The connector below does TLS, so tonic is not told of it.
        let endpoint = Endpoint::from_shared(format!("http://{address}"))?
            .connect_timeout(time)
            .http2_keep_alive_interval(self.keep_alive.0.min(LONGEST))
            .keep_alive_timeout(self.keep_alive.1.min(LONGEST))
            .keep_alive_while_idle(true)
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(2 * WINDOW)
            .http2_max_header_list_size(HEADERS);
        let (tls, address) =
            (self.tls.as_ref().map(|tls| TlsConnector::from(tls.config.clone())), address.clone());
        let connector = tower::service_fn(move |_| connect(tls.clone(), address.clone()));
        Ok(endpoint.connect_with_connector(connector).await?)
    }
}

async fn connect(
    tls: Option<TlsConnector>,
    address: Address,
) -> io::Result<TokioIo<Box<dyn Wire>>> {
    let stream = TcpStream::connect(&*address.text).await?;
    // An acknowledgement is small and must not be delayed.
    let _ = stream.set_nodelay(true);
    let wire: Box<dyn Wire> = match tls {
        None => Box::new(stream),
        Some(tls) => Box::new(tls.connect(address.name, stream).await?),
    };
    Ok(TokioIo::new(wire))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_host_and_a_port() {
        let name = |text: &str| {
            Address::read(text, None).map(|address| address.name.to_str().into_owned())
        };
        assert_eq!(name("owner.example:7443").as_deref(), Some("owner.example"));
        assert_eq!(name("127.0.0.1:1").as_deref(), Some("127.0.0.1"));
        assert_eq!(name("[::1]:1").as_deref(), Some("::1"));
        let other = Address::read("127.0.0.1:1", Some("owner.example"));
        assert_eq!(
            other.map(|address| address.name.to_str().into_owned()).as_deref(),
            Some("owner.example")
        );
        for text in [
            "",
            "owner",
            "owner:",
            "owner:x",
            "owner:70000",
            "::1:1",
            "https://owner:1",
            ":1",
            "o w:1",
        ] {
            assert_eq!(name(text), None, "{text}");
        }
    }
}
