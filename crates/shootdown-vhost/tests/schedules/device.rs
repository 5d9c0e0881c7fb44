//! The device: it copies the request's token all over the buffer, and takes its time.

use futures::StreamExt;
use futures::channel::oneshot;
use futures::future::{Either, select};
use futures::stream::FuturesUnordered;
use shootdown::Timeline;
use shootdown_vhost::{Chain, Device, Next, Ring};
use std::pin::pin;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// What the simulation decides.
#[derive(Default)]
pub struct Hardware {
    /// Rings that are to be run.
    pub started: Mutex<Vec<Ring>>,
    /// Accesses that go on when they are told to.
    pub in_flight: Mutex<Vec<oneshot::Sender<()>>>,
    /// How often each queue was kicked.
    pub kicks: Vec<Timeline>,
    /// A ring could not go on.
    pub broken: AtomicBool,
    /// A request whose token changed under it.
    pub stale: Mutex<Option<String>>,
    /// The used ring is told before the access: a fault.
    pub early_used: bool,
}

impl Device for Hardware {
    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> u16 {
        u16::try_from(self.kicks.len()).unwrap()
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn start(&self, ring: Ring) {
        self.started.lock().unwrap().push(ring);
    }
}

/// Runs a ring to its end.
pub async fn run(hardware: Arc<Hardware>, mut ring: Ring) {
    let mut serving = FuturesUnordered::new();
    let kicks = hardware.kicks[usize::from(ring.index())].clone();
    let mut seen = kicks.value();
    loop {
        let next = match select(pin!(ring.next()), pin!(progress(&mut serving))).await {
            Either::Left((next, _)) => next,
            Either::Right(_) => continue,
        };
        match next {
            Ok(Next::Chain(chain)) => serving.push(serve(hardware.clone(), chain)),
            Ok(Next::Empty) => {
                let more = select(kicks.reached(seen + 1), ring.stopping());
                select(more, pin!(progress(&mut serving))).await;
                seen = kicks.value();
            }
            Ok(Next::Stopping) => break,
            Err(_) => {
                hardware.broken.store(true, Ordering::SeqCst);
                break;
            }
            _ => unreachable!("there is nothing else"),
        }
    }
    // Ends what is in flight.
    while serving.next().await.is_some() {}
}

/// Waits for one of them; for ever if there is none.
async fn progress<F: Future<Output = ()>>(serving: &mut FuturesUnordered<F>) {
    if serving.next().await.is_none() {
        futures::future::pending::<()>().await;
    }
}

async fn serve(hardware: Arc<Hardware>, chain: Chain) {
    // A chain of stale descriptors may have no token at all.
    let token = |chain: &Chain| {
        let mut token = [0; 8];
        chain.readable().read(0, &mut token).ok().map_or(0, |()| u64::from_ne_bytes(token))
    };
    let before = token(&chain);
    let len = u32::try_from(chain.writable().len()).unwrap();
    if hardware.early_used {
        let _ = chain.complete_early(len).await;
    }
    let (go, wait) = oneshot::channel();
    hardware.in_flight.lock().unwrap().push(go);
    let _ = wait.await;
    let after = token(&chain);
    if before != after {
        *hardware.stale.lock().unwrap() =
            Some(format!("request {before} has the token {after:#x} while it is in flight"));
    }
    let bytes: Vec<_> = before.to_ne_bytes().repeat(chain.writable().len() / 8);
    chain.writable().write(0, &bytes).unwrap();
    if !hardware.early_used {
        let _ = chain.complete(len).await;
    }
}
