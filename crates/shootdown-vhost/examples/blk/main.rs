//! A vhost-user block device (`vhost-user-blk`) for guests with an IOMMU. Its data path is io_uring
//! straight into the guest's memory: an INVALIDATE is answered when the requests that overlap it
//! have ended, and waits for no other.
//!
//! ```text
//! truncate -s 64M /tmp/disk
//! cargo run --release -p shootdown-vhost --example blk -- --socket /tmp/blk.sock --file /tmp/disk
//! ```
//!
//! - [`server`]: one device on its socket, one front-end after the other.
//! - [`disk`]: the device, a thread for each ring.
//! - [`request`]: what a guest wants, and doing that.
//! - [`executor`], [`uring`]: futures on an io_uring; the only unsafe code.
#![allow(unreachable_pub)]

#[cfg(target_os = "linux")]
mod disk;
#[cfg(target_os = "linux")]
mod executor;
#[cfg(target_os = "linux")]
mod options;
#[cfg(target_os = "linux")]
mod request;
#[cfg(target_os = "linux")]
mod server;
#[cfg(target_os = "linux")]
mod stats;
#[cfg(target_os = "linux")]
mod uring;

#[cfg(target_os = "linux")]
fn main() -> std::process::ExitCode {
    use std::io::IsTerminal;
    use tracing_subscriber::EnvFilter;

    let options = options::Options::read();
    let filter =
        EnvFilter::builder().with_default_directive(tracing::Level::INFO.into()).from_env_lossy();
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(colours)
        .with_writer(std::io::stderr)
        .init();
    match run(&options) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

#[cfg(target_os = "linux")]
fn run(options: &options::Options) -> anyhow::Result<()> {
    use anyhow::Context;
    use signal_hook::consts::{SIGINT, SIGTERM};
    use std::sync::Mutex;
    use std::thread;

    uring::Uring::new()
        .context("io_uring cannot be used (see the sysctl kernel.io_uring_disabled)")?;
    let domain = options.domain.then(shootdown_vhost::Domain::new);
    let servers =
        (0..options.sockets.len()).map(|index| server::Server::new(index, options, domain.clone()));
    let servers = servers.collect::<anyhow::Result<Vec<_>>>()?;

    let writing = Mutex::new(());
    let write = || {
        let Some(path) = &options.stats else { return };
        let _one = writing.lock();
        let all: Vec<_> = servers
            .iter()
            .enumerate()
            .map(|(index, server)| server.disk.counters.figures(index))
            .collect();
        if let Err(error) = stats::write(path, &all) {
            tracing::error!(%error, path = %path.display(), "the figures");
        }
    };
    let mut signals = signal_hook::iterator::Signals::new([SIGTERM, SIGINT])?;
    let handle = signals.handle();
    let ended = thread::scope(|scope| {
        scope.spawn(|| {
            for (count, signal) in signals.forever().enumerate() {
                tracing::info!(signal, "ending; requests in flight are waited for");
                write();
                servers.iter().for_each(server::Server::end);
                if count > 0 {
                    tracing::warn!("not waiting");
                    std::process::exit(1);
                }
            }
        });
        let threads: Vec<_> =
            servers.iter().map(|server| scope.spawn(|| server.run(write))).collect();
        let ended: Vec<_> = threads.into_iter().map(thread::ScopedJoinHandle::join).collect();
        handle.close();
        ended
    });
    write();
    for ended in ended {
        ended.map_err(|_| anyhow::anyhow!("the thread of a device has panicked"))??;
    }
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn main() {}
