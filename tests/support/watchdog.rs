//! A test that hangs is named, and ends the run.
//!
//! Each thread that uses [`pages`](super::pages), or calls [`watched`](super::watched), is watched
//! until it ends. The harness names the thread of a test after the test. Where it runs tests on the
//! main thread it says the name of each beforehand.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long a test may take. `SHOOTDOWN_HANG_SECONDS` says otherwise, under a slow tool.
const MOST: Duration = Duration::from_secs(300);

/// Names the tests that run, and when each began.
static RUNNING: Mutex<BTreeMap<u64, (String, Instant)>> = Mutex::new(BTreeMap::new());

fn running() -> MutexGuard<'static, BTreeMap<u64, (String, Instant)>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes its test off the list when the thread ends.
struct Watched(u64);

impl Drop for Watched {
    fn drop(&mut self) {
        running().remove(&self.0);
    }
}

thread_local!(static WATCHED: Watched = {
    let thread = thread::current();
    let mut running = running();
    let number = running.last_key_value().map_or(0, |(last, _)| last + 1);
    running.insert(number, (thread.name().unwrap_or("a test").to_owned(), Instant::now()));
    Watched(number)
});

/// Watches the calling thread until it ends.
pub fn watch() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        let seconds = std::env::var("SHOOTDOWN_HANG_SECONDS").ok();
        let seconds = seconds.and_then(|seconds| seconds.parse().ok());
        let most = seconds.map_or(MOST, Duration::from_secs);
        drop(thread::Builder::new().name("watchdog".into()).spawn(move || look(most)));
    });
    // A thread that ends is not watched again.
    let _ = WATCHED.try_with(|_| ());
}

fn look(most: Duration) {
    loop {
        thread::sleep(most / 10);
        let hangs: Vec<_> = running()
            .values()
            .filter(|(_, began)| began.elapsed() > most)
            .map(|(name, _)| name.clone())
            .collect();
        if !hangs.is_empty() {
            // Not by a macro: the harness keeps what those print.
            let text = format!("hangs since {most:?}: {}\n", hangs.join(", "));
            let _ = std::io::stderr().write_all(text.as_bytes());
            std::process::abort();
        }
    }
}
