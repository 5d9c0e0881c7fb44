//! A peer that says what it likes.

use super::certificates::Identity;
use hyper_util::rt::TokioIo;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};

#[allow(unreachable_pub, clippy::all, reason = "generated")]
pub(crate) mod proto {
    tonic::include_proto!("shootdown.v1");
}

use proto::from_mirror::Message;
use proto::shootdown_client::ShootdownClient;
use proto::{FromMirror, FromOwner, from_owner};

pub(crate) trait Wire: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Wire for T {}

/// A connection with a certificate, or without TLS.
pub(crate) async fn wire(
    address: SocketAddr,
    identity: Option<&Identity>,
) -> std::io::Result<Box<dyn Wire>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(match identity {
        None => Box::new(stream),
        Some(identity) => {
            let mut config = identity.config();
            config.alpn_protocols = vec![b"h2".to_vec()];
            let name = ServerName::try_from("owner.example").unwrap();
            Box::new(TlsConnector::from(Arc::new(config)).connect(name, stream).await?)
        }
    })
}

pub(crate) async fn channel(address: SocketAddr, identity: Option<&Identity>) -> Channel {
    connect(Endpoint::from_static("http://owner.example"), address, identity).await
}

/// With windows in which all contents have room.
pub(crate) async fn wide_channel(address: SocketAddr, identity: Option<&Identity>) -> Channel {
    let endpoint = Endpoint::from_static("http://owner.example");
    let endpoint =
        endpoint.initial_stream_window_size(1 << 30).initial_connection_window_size(1 << 30);
    // It asks again and again whether the owner is there.
    let endpoint =
        endpoint.http2_keep_alive_interval(Duration::from_millis(500)).keep_alive_while_idle(true);
    let endpoint = endpoint.keep_alive_timeout(super::LONG * 10);
    connect(endpoint, address, identity).await
}

async fn connect(endpoint: Endpoint, address: SocketAddr, identity: Option<&Identity>) -> Channel {
    let wire = wire(address, identity).await.unwrap();
    let mut wire = Some(TokioIo::new(wire));
    let once = tower::service_fn(move |_| {
        let wire = wire.take();
        async move { wire.ok_or_else(|| std::io::Error::other("once")) }
    });
    endpoint.connect_with_connector(once).await.unwrap()
}

/// A stream, before or after it says `Open`.
pub(crate) struct Raw {
    pub(crate) sender: mpsc::Sender<FromMirror>,
    pub(crate) incoming: Streaming<FromOwner>,
    _channel: Channel,
}

impl Raw {
    /// A stream that begins with these messages.
    pub(crate) async fn begin(channel: &Channel, first: Vec<FromMirror>) -> Result<Self, Status> {
        let (sender, mut receiver) = mpsc::channel(64);
        let rest = futures::stream::poll_fn(move |cx| receiver.poll_recv(cx));
        let messages = futures::StreamExt::chain(futures::stream::iter(first), rest);
        let mut client = ShootdownClient::new(channel.clone());
        let incoming = client.mirror(Request::new(messages)).await?.into_inner();
        Ok(Self { sender, incoming, _channel: channel.clone() })
    }

    /// A stream for the shared memory.
    pub(crate) async fn open(address: SocketAddr, identity: &Identity) -> Self {
        let channel = channel(address, Some(identity)).await;
        Self::begin(&channel, vec![open("memory")]).await.unwrap()
    }

    /// A member, by a stream of its own.
    pub(crate) async fn join(
        address: SocketAddr,
        identity: &Identity,
        incarnation: u64,
    ) -> (Self, proto::Epoch) {
        let mut raw = Self::open(address, identity).await;
        raw.say(Message::Join(proto::Join { incarnation, nonce: 1 })).await;
        let Some(from_owner::Message::Welcome(welcome)) = raw.hear().await else {
            panic!("no welcome")
        };
        (raw, welcome.epoch.unwrap())
    }

    pub(crate) async fn say(&self, message: Message) {
        self.sender.send(FromMirror { message: Some(message) }).await.unwrap();
    }

    pub(crate) async fn hear(&mut self) -> Option<from_owner::Message> {
        let heard = super::soon("a message", self.incoming.message()).await.unwrap();
        heard.map(|heard| heard.message.unwrap())
    }

    /// How the stream ends.
    pub(crate) async fn end(&mut self) -> Code {
        loop {
            match super::soon("the end", self.incoming.message()).await {
                Ok(Some(_)) => {}
                Ok(None) => return Code::Ok,
                Err(status) => return status.code(),
            }
        }
    }

    /// Waits until the owner has handled all that was said before: it answers a stranger.
    pub(crate) async fn settle(&mut self) {
        let nobody = proto::Epoch { boot: 0, number: u64::MAX };
        self.say(Message::Renew(proto::Renew { epoch: Some(nobody), nonce: 0 })).await;
        let told = |message: &from_owner::Message| matches!(message, from_owner::Message::Gone(gone) if gone.epoch == Some(nobody));
        while !told(&self.hear().await.unwrap()) {}
    }
}

pub(crate) fn open(space: &str) -> FromMirror {
    FromMirror { message: Some(Message::Open(proto::Open { space: space.to_owned() })) }
}

/// A pause in which nothing is expected to happen.
pub(crate) async fn a_while() {
    tokio::time::sleep(Duration::from_millis(50)).await;
}
