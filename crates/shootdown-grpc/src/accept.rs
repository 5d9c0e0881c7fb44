//! From a listening socket to connections with known peers.
#![forbid(unsafe_code)]

use crate::limits::Limits;
use crate::list::List;
use crate::name::{Shown, shown};
use crate::observe::{Count, Tally};
use crate::socket::{Peer, Slot, Socket, Terms, Use, Wire};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

/// Time after which a socket that cannot accept is tried again: the process has no file descriptors
/// left.
const AGAIN: Duration = Duration::from_millis(50);

/// Accepts connections as long as they are received.
pub(crate) struct Door {
    /// `None`: no TLS, and peers have no names.
    pub(crate) tls: Option<TlsAcceptor>,
    pub(crate) limits: Limits,
    pub(crate) tally: Tally,
    /// Cuts all connections.
    pub(crate) cut: CancellationToken,
    pub(crate) list: List,
}

impl Door {
    pub(crate) async fn accept(
        self,
        listener: &TcpListener,
        ready: mpsc::Sender<io::Result<Socket>>,
    ) {
        let door = Arc::new(self);
        let places = Arc::new(Semaphore::new(door.limits.connections.min(Semaphore::MAX_PERMITS)));
        let shaking = Arc::new(Semaphore::new(door.limits.handshakes.min(Semaphore::MAX_PERMITS)));
        let mut handshakes = JoinSet::new();
        while !ready.is_closed() {
            while handshakes.try_join_next().is_some() {}
            let Ok((stream, address)) = listener.accept().await else {
                sleep(AGAIN).await;
                continue;
            };
            door.tally.add(Count::Connections);
            let (place, shake) =
                (places.clone().try_acquire_owned(), shaking.clone().try_acquire_owned());
            let (Ok(place), Ok(shake)) = (place, shake) else {
                door.tally.refuse(Count::Full, address, "as many connections as may be");
                continue;
            };
            let (door, ready) = (door.clone(), ready.clone());
            handshakes.spawn(async move {
                let socket = door.greet(stream, address, place).await;
                drop(shake);
                if let Some(socket) = socket {
                    let _ = ready.send(Ok(socket)).await;
                }
            });
        }
    }

    /// Authenticates a peer.
    async fn greet(
        &self,
        stream: TcpStream,
        address: SocketAddr,
        permit: OwnedSemaphorePermit,
    ) -> Option<Socket> {
        // An `Inv` is small and must not be delayed.
        let _ = stream.set_nodelay(true);
        let (wire, shown): (Box<dyn Wire>, _) = match &self.tls {
            None => (Box::new(stream), None),
            Some(tls) => match timeout(self.limits.handshake, tls.accept(stream)).await {
                Ok(Ok(stream)) => {
                    let certificate =
                        stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
                    let Some(shown) = certificate.and_then(shown) else {
                        self.tally.refuse(
                            Count::Nameless,
                            address,
                            "the certificate has no DNS or URI name",
                        );
                        return None;
                    };
                    (Box::new(stream), Some(shown))
                }
                Ok(Err(error)) => {
                    self.tally.refuse(Count::Handshakes, address, error);
                    return None;
                }
                Err(_) => {
                    self.tally.refuse(Count::Handshakes, address, "no handshake in time");
                    return None;
                }
            },
        };
        let cut = self.cut.child_token();
        let listed = shown.as_ref().map(|shown| {
            self.list.enter(shown, &cut, self.limits.connections_of_a_name, &self.tally)
        });
        let valid_for = shown.as_ref().map_or(Duration::MAX, |shown: &Shown| shown.valid_for);
        let names = shown.map(|shown| shown.names);
        let peer = Peer { address, names, use_: Arc::new(Use::default()) };
        let stalled_for = self.limits.keep_alive.saturating_add(self.limits.keep_alive_timeout);
        let terms = Terms { cut, idle_for: self.limits.handshake, stalled_for, valid_for };
        Some(Socket::new(
            wire,
            peer,
            terms,
            self.tally.clone(),
            Slot { _permit: permit, _listed: listed },
        ))
    }
}
