//! The two kinds of executor that every case runs on.

use futures::FutureExt;
use futures::future::BoxFuture;
use std::sync::Arc;
use std::time::Duration;

#[derive(Clone)]
pub enum Runtime {
    /// Several threads.
    Tokio,
    OneThread(Arc<smol::Executor<'static>>),
}

impl Runtime {
    /// Runs `task` beside its caller; the returned future resolves to what it returns.
    pub fn spawn<T: Send + 'static>(
        &self,
        task: impl Future<Output = T> + Send + 'static,
    ) -> BoxFuture<'static, T> {
        match self {
            Self::Tokio => {
                let task = tokio::spawn(task);
                async move { task.await.unwrap() }.boxed()
            }
            Self::OneThread(executor) => executor.spawn(task).boxed(),
        }
    }
}

/// Whoever takes so long waits for something that does not come.
const LIMIT: Duration = Duration::from_secs(120);

pub fn on_tokio<C: Future<Output = ()> + Send + 'static>(case: impl FnOnce(Runtime) -> C) {
    let tokio = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_time()
        .build()
        .unwrap();
    let case = case(Runtime::Tokio);
    tokio.block_on(async {
        let task = tokio::spawn(case);
        if let Err(panic) = tokio::time::timeout(LIMIT, task).await.expect("it hangs") {
            std::panic::resume_unwind(panic.into_panic());
        }
    });
}

pub fn on_one_thread<C: Future<Output = ()> + Send + 'static>(case: impl FnOnce(Runtime) -> C) {
    let executor = Arc::new(smol::Executor::new());
    let case = executor.spawn(case(Runtime::OneThread(executor.clone())));
    let limit = async {
        smol::Timer::after(LIMIT).await;
        panic!("it hangs");
    };
    smol::block_on(executor.run(smol::future::or(case, limit)));
}
