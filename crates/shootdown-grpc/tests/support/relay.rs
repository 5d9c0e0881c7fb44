//! A relay between a mirror and an owner: it can be cut, hold back, and count.

use std::net::SocketAddr;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What a relay does with connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Forward,
    /// Closes them, and takes no new ones.
    Cut,
    /// Keeps them and forwards nothing, either way.
    Hold,
    /// Forwards nothing to the mirror.
    HoldDown,
}

pub(crate) struct Relay {
    pub(crate) address: SocketAddr,
    mode: Arc<watch::Sender<Mode>>,
    task: JoinHandle<()>,
}

impl Relay {
    pub(crate) async fn begin(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mode = Arc::new(watch::Sender::new(Mode::Forward));
        let modes = mode.clone();
        let task = tokio::spawn(async move {
            loop {
                let (near, _) = listener.accept().await.unwrap();
                if *modes.borrow() != Mode::Cut {
                    tokio::spawn(carry(near, to, modes.subscribe()));
                }
            }
        });
        Self { address, mode, task }
    }

    pub(crate) fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.set(Mode::Cut);
        self.task.abort();
    }
}

async fn carry(near: TcpStream, to: SocketAddr, mode: watch::Receiver<Mode>) {
    let Ok(far) = TcpStream::connect(to).await else { return };
    near.set_nodelay(true).unwrap();
    far.set_nodelay(true).unwrap();
    let ((mut near_in, mut near_out), (mut far_in, mut far_out)) =
        (near.into_split(), far.into_split());
    let up_mode = mode.clone();
    let up = pump(&mut near_in, &mut far_out, up_mode, &[Mode::Hold]);
    let down_mode = mode.clone();
    let down = pump(&mut far_in, &mut near_out, down_mode, &[Mode::Hold, Mode::HoldDown]);
    tokio::select! { () = up => {}, () = down => {} }
}

async fn pump(
    from: &mut (impl AsyncReadExt + Unpin),
    to: &mut (impl AsyncWriteExt + Unpin),
    mut mode: watch::Receiver<Mode>,
    holds: &[Mode],
) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let now = *mode.borrow_and_update();
        if now == Mode::Cut {
            return;
        }
        tokio::select! {
            changed = mode.changed() => if changed.is_err() { return },
            read = from.read(&mut buffer), if !holds.contains(&now) => match read {
                Ok(0) | Err(_) => return,
                Ok(bytes) => if to.write_all(&buffer[..bytes]).await.is_err() { return },
            }
        }
    }
}
