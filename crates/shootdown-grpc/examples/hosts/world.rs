//! The owner: its memory, which is a file, and its server.

use crate::certificates::Authority;
use anyhow::Result;
use bytes::Bytes;
use shootdown::{AddressRange, AddressSpace, Event, Subscription};
use shootdown_grpc::{BootClock, Checked, Server, ServerTls, Space, Tally, Unreadable};
use shootdown_lease::engine::{Hub, Mirrors};
use shootdown_lease::{Boot, Host, Memory, Owner, Terms};
use std::fs::File;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Bytes of a page. The first eight are its version.
pub(crate) const PAGE: u64 = 4_096;
/// Pages that are shared.
pub(crate) const PAGES: u64 = 16;
/// Mirrors that there may be.
pub(crate) const MIRRORS: u64 = 16;

/// The page of that number.
pub(crate) fn page(number: u64) -> AddressRange {
    AddressRange::new(number * PAGE, PAGE).expect("a page is not empty")
}

/// The version that a page has in the memory.
pub(crate) fn version(memory: &File, page: u64) -> Result<u64> {
    let mut bytes = [0; 8];
    memory.read_exact_at(&mut bytes, page * PAGE)?;
    Ok(u64::from_le_bytes(bytes))
}

pub(crate) struct World {
    pub(crate) folder: TempDir,
    pub(crate) address: SocketAddr,
    pub(crate) space: AddressSpace,
    pub(crate) hub: Hub,
    pub(crate) tally: Tally,
    pub(crate) terms: Terms,
    memory: Arc<File>,
    _mirrors: Subscription<Mirrors>,
}

impl World {
    /// Memory in shared memory, where there is that, and certificates for all mirrors.
    pub(crate) async fn begin(term: Duration) -> Result<Self> {
        let shared_memory = Path::new("/dev/shm");
        let folder =
            if shared_memory.is_dir() { TempDir::new_in(shared_memory)? } else { TempDir::new()? };
        let authority = Authority::default();
        for number in 1..=MIRRORS {
            let own = authority.issue(&format!("mirror-{number}.example"));
            std::fs::write(folder.path().join(format!("mirror-{number}.pem")), own.certificate)?;
            std::fs::write(folder.path().join(format!("mirror-{number}.key")), own.key)?;
        }
        std::fs::write(folder.path().join("roots.pem"), &authority.root)?;
        let memory = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(folder.path().join("memory"))?;
        memory.set_len(PAGE * PAGES)?;
        let memory = Arc::new(memory);

        let terms = Terms::new(term);
        let owner = Owner::new(Boot(1), terms.clone(), Memory::New, BootClock.now())?;
        let (hub, space) = (Hub::new(owner, BootClock), AddressSpace::new());
        let shared = AddressRange::new(0, PAGE * PAGES)?;
        let mirrors = space.insert(shared, hub.mirrors())?;
        let reads = memory.clone();
        let contents = Checked::new(space.clone(), shared, move |range| {
            let mut bytes = vec![0; range.len_usize().unwrap_or(0)];
            reads.read_exact_at(&mut bytes, range.start()).map_err(Unreadable::new)?;
            Ok(Bytes::from(bytes))
        });
        let hosts = (1..=MIRRORS).map(|number| (format!("mirror-{number}.example"), Host(number)));
        let offered = hosts.fold(Space::new(hub.clone(), contents), |offered, (name, host)| {
            offered.admit(name.as_str(), host)
        });
        let own = authority.issue("owner.example");
        let tls = ServerTls::from_pem(
            own.certificate.as_bytes(),
            own.key.as_bytes(),
            authority.root.as_bytes(),
        )?;
        let server =
            Server::builder().tls(tls).space("memory", offered).bind("127.0.0.1:0").await?;
        let (address, tally, keeps) = (server.local_addr(), server.tally(), hub.clone());
        tokio::spawn(async move { keeps.run(tokio::time::sleep).await });
        tokio::spawn(server.run());
        Ok(Self { folder, address, space, hub, tally, terms, memory, _mirrors: mirrors })
    }

    /// Gives a page its next version. Returns how long the mirrors took to let go.
    pub(crate) async fn change(&self, number: u64) -> Result<Duration> {
        let began = Instant::now();
        let guard = self.space.invalidate(page(number), Event::Clear).await;
        let took = began.elapsed();
        let next = version(&self.memory, number)? + 1;
        self.memory.write_all_at(&next.to_le_bytes(), number * PAGE)?;
        drop(guard);
        Ok(took)
    }
}

/// A runtime of one thread: what follows on each other is not handed from one processor to another.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// Of sorted times, the one that so many of a hundred are not longer than.
pub(crate) fn percentile(sorted: &[Duration], of_hundred: usize) -> Duration {
    let last = sorted.len().saturating_sub(1);
    sorted.get((sorted.len() * of_hundred / 100).min(last)).copied().unwrap_or_default()
}
