//! One device on its socket: one front-end after the other.
#![forbid(unsafe_code)]

use crate::disk::{Disk, Served};
use crate::options::{Driver, Options};
use anyhow::{Context as _, Result, bail};
use shootdown_vhost::{Domain, Fault, Iotlb, Session, Stopper, driver};
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub struct Server {
    index: usize,
    pub disk: Arc<Disk>,
    path: PathBuf,
    /// The file at `path`, as long as nobody else has replaced it.
    inode: u64,
    listener: UnixListener,
    /// Of all devices, if they share one.
    domain: Option<Domain>,
    fault: Option<Fault>,
    driver: Driver,
    once: bool,
    now: Mutex<Now>,
}

enum Now {
    Waiting,
    /// Ends the session.
    Serving(Stopper),
    /// No front-end is to come any more.
    Ended,
}

impl Server {
    pub fn new(index: usize, options: &Options, domain: Option<Domain>) -> Result<Self> {
        let (path, file) = (options.sockets[index].clone(), &options.files[index]);
        let disk = Arc::new(Disk::open(index, file, options)?);
        let listener = listen(&path)?;
        tracing::info!(device = index, socket = %path.display(), file = %file.display(), sectors = disk.sectors(), "listening");
        let inode = fs::symlink_metadata(&path)?.ino();
        let (fault, driver, once) = (options.session_fault(), options.driver, options.once);
        Ok(Self {
            index,
            disk,
            path,
            inode,
            listener,
            domain,
            fault,
            driver,
            once,
            now: Mutex::new(Now::Waiting),
        })
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves one front-end after the other until its [end](Self::end). After each it calls `gone`.
    pub fn run(&self, gone: impl Fn()) -> Result<()> {
        loop {
            let socket = match self.listener.accept() {
                Ok((socket, _)) => socket,
                Err(_) if matches!(*self.now(), Now::Ended) => return Ok(()),
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
                    ) =>
                {
                    continue;
                }
                Err(error) => {
                    return Err(error)
                        .with_context(|| format!("{} is not listened to", self.path.display()));
                }
            };
            let session = self.session();
            match &mut *self.now() {
                Now::Ended => return Ok(()),
                now => *now = Now::Serving(session.stopper()),
            }
            self.serve(socket, session);
            gone();
            match &mut *self.now() {
                Now::Ended => return Ok(()),
                now if self.once => {
                    *now = Now::Ended;
                    return Ok(());
                }
                now => *now = Now::Waiting,
            }
        }
    }

    fn session(&self) -> Session<Served> {
        let iotlb = Iotlb::new(&self.domain.clone().unwrap_or_default());
        self.disk.counters.session(Some(iotlb.clone()));
        Session::new(Arc::new(Served(self.disk.clone())), iotlb).fault(self.fault)
    }

    fn serve(&self, socket: UnixStream, session: Session<Served>) {
        let device = self.index;
        tracing::info!(device, "a front-end has come");
        let served = match self.driver {
            Driver::Thread => driver::serve(socket, session),
            #[cfg(feature = "tokio")]
            Driver::Tokio => with_tokio(socket, session),
        };
        self.disk.counters.session(None);
        match served {
            Ok(()) => tracing::info!(device, "the front-end has gone"),
            Err(error) => tracing::warn!(device, %error, "the front-end was sent away"),
        }
    }

    /// Has [`run`](Self::run) return once nothing of the guest's memory is in flight.
    pub fn end(&self) {
        let now = std::mem::replace(&mut *self.now(), Now::Ended);
        let ended = match now {
            Now::Serving(stopper) => {
                stopper.stop();
                Ok(())
            }
            Now::Waiting => rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both)
                .map_err(io::Error::from),
            Now::Ended => Ok(()),
        };
        if let Err(error) = ended {
            tracing::debug!(device = self.index, %error, "the socket");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::debug!(%error, socket = %self.path.display(), "the socket's file stays");
        }
    }
}

/// One runtime for each session, on the thread of its device.
#[cfg(feature = "tokio")]
fn with_tokio(socket: UnixStream, session: Session<Served>) -> Result<(), driver::ServeError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(driver::serve_tokio(socket, session))
}

fn listen(path: &Path) -> Result<UnixListener> {
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            bail!("{} exists, and is no socket", path.display())
        }
        Ok(_) => fs::remove_file(path)
            .with_context(|| format!("{} cannot be replaced", path.display()))?,
        Err(_) => {}
    }
    UnixListener::bind(path).with_context(|| format!("{} cannot be listened to", path.display()))
}
