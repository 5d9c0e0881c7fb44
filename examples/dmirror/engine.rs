//! The device's engine: accesses take time, and whoever takes memory away has to wait for those
//! under way.

use futures::channel::oneshot;
use futures::future::{BoxFuture, FutureExt, Shared, ready};
use std::sync::Arc;

/// Accesses under way. Those that began before a zap hold the epoch that the zap ends.
pub struct Engine {
    epoch: Arc<oneshot::Sender<()>>,
    ended: oneshot::Receiver<()>,
    earlier: Shared<BoxFuture<'static, ()>>,
}

impl Engine {
    pub fn new() -> Self {
        let (epoch, ended) = oneshot::channel();
        Self { epoch: Arc::new(epoch), ended, earlier: ready(()).boxed().shared() }
    }

    /// An access begins; it ends when what this returns is dropped.
    pub fn begin(&self) -> Arc<oneshot::Sender<()>> {
        self.epoch.clone()
    }

    /// Resolves when every access that has begun has ended; `None` if there is none. Those that an
    /// earlier call waits for count, too (O6).
    pub fn drained(&mut self) -> Option<Shared<BoxFuture<'static, ()>>> {
        if Arc::strong_count(&self.epoch) > 1 {
            let next = Self::new();
            let (earlier, Self { ended, .. }) =
                (self.earlier.clone(), std::mem::replace(self, next));
            // `ended` is an error when the last access has dropped its end of the channel: that is
            // the message.
            self.earlier = async move { futures::join!(earlier, ended).0 }.boxed().shared();
        }
        self.earlier.clone().now_or_never().is_none().then(|| self.earlier.clone())
    }
}

/// Lets others run.
pub async fn pause() {
    let mut first = true;
    futures::future::poll_fn(|cx| {
        cx.waker().wake_by_ref();
        if std::mem::take(&mut first) {
            std::task::Poll::Pending
        } else {
            std::task::Poll::Ready(())
        }
    })
    .await;
}
