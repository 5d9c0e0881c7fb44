//! Election of the owner among several candidates, in etcd (feature `etcd`).
#![forbid(unsafe_code)]

use crate::clock::BootClock;
use etcd_client::{Client, ConnectOptions, Error as EtcdError, LeaderKey, ResignOptions};
use shootdown_lease::{Boot, Time};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use thiserror::Error;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// Reason why a candidate is not the owner.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CampaignError {
    /// etcd cannot be reached, or refuses.
    #[error("etcd: {0}")]
    Etcd(#[from] EtcdError),
    /// There was no reply of etcd for the key's time to live. Campaign again.
    #[error("etcd was not heard of for the time to live of the key: campaign again")]
    Lost,
    /// etcd reports a leader without its key.
    #[error("etcd names no leader")]
    NoLeader,
}

/// A candidate for the ownership of memory.
///
/// The keys of all candidates are below `election` in etcd, each under a lease that its candidate
/// keeps alive. The oldest key is the owner's. Its creation revision is larger for each later
/// owner, and is the [`Boot`].
#[derive(Clone, Debug)]
pub struct Campaign {
    endpoints: Vec<String>,
    options: Option<ConnectOptions>,
    election: String,
    value: Vec<u8>,
    time_to_live: Duration,
    drift_ppm: u32,
}

impl Campaign {
    /// Makes a candidate that uses the members of etcd at these URLs. All candidates for a memory
    /// use the same election. An election must not be named like another one followed by `/…`,
    /// because etcd would wait for the keys of both.
    pub fn new(
        endpoints: impl IntoIterator<Item = impl Into<String>>,
        election: impl Into<String>,
    ) -> Self {
        let endpoints = endpoints.into_iter().map(Into::into).collect();
        let (time_to_live, drift_ppm) = (Duration::from_secs(5), 1_000);
        Self {
            endpoints,
            options: None,
            election: election.into(),
            value: Vec::new(),
            time_to_live,
            drift_ppm,
        }
    }

    /// Sets how etcd is reached: TLS, user, timeouts.
    pub fn options(mut self, options: ConnectOptions) -> Self {
        self.options = Some(options);
        self
    }

    /// Sets the value of the key, for other readers: for example the address at which mirrors find
    /// the owner.
    pub fn value(mut self, value: impl Into<Vec<u8>>) -> Self {
        self.value = value.into();
        self
    }

    /// Sets how long the key outlives its candidate, rounded up to seconds. The default is 5 s.
    /// etcd grants more if its own election takes longer.
    pub fn time_to_live(mut self, time_to_live: Duration) -> Self {
        self.time_to_live = time_to_live;
        self
    }

    /// Sets the largest deviation of a clock from real time:
    /// [`Terms::drift_ppm`](shootdown_lease::Terms::drift_ppm).
    pub fn drift_ppm(mut self, drift_ppm: u32) -> Self {
        self.drift_ppm = drift_ppm;
        self
    }

    /// Waits until this candidate is the owner. A task then keeps its key alive.
    ///
    /// The memory has survived an earlier owner, whose mirrors may still hold on. Begin with
    /// [`Memory::Survived`](shootdown_lease::Memory::Survived) and the boot of the [`Ownership`].
    ///
    /// # Errors
    /// [`CampaignError`]. The candidate then owns nothing.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    ///
    /// # Cancel safety
    /// If the future is dropped, the candidate withdraws. Its key may live on for its time to live.
    pub async fn win(&self) -> Result<Ownership, CampaignError> {
        let mut client = Client::connect(&self.endpoints, self.options.clone()).await?;
        let seconds = i64::try_from(self.time_to_live.as_nanos().div_ceil(1_000_000_000))
            .unwrap_or(i64::MAX)
            .max(1);
        let asked = BootClock.now();
        let lease = client.lease_grant(seconds, None).await?;
        let held = Held { until: Arc::new(AtomicU64::new(0)), drift_ppm: self.drift_ppm };
        held.until.store(held.end(asked, lease.ttl()).as_nanos(), Ordering::Release);
        let keeper =
            Keeper(tokio::spawn(keep(client.clone(), lease.id(), lease.ttl(), held.clone())));
        let won = tokio::select! {
            won = client.campaign(self.election.as_str(), self.value.as_slice(), lease.id()) => won,
            () = held.lost() => return Err(CampaignError::Lost),
        };
        let key = match won.map(|mut won| won.take_leader()) {
            Ok(key) => key.ok_or(CampaignError::NoLeader)?,
            Err(error) => {
                // Otherwise its key could become an owner without a candidate.
                let _ = client.lease_revoke(lease.id()).await;
                return Err(error.into());
            }
        };
        if !held.is_held(BootClock.now()) {
            return Err(CampaignError::Lost);
        }
        let boot = Boot(u64::try_from(key.rev()).map_err(|_| CampaignError::NoLeader)?);
        Ok(Ownership { client, key, lease: lease.id(), boot, held, keeper })
    }
}

/// The time until which an ownership lasts. This is a handle; clones share it.
#[derive(Clone, Debug)]
pub struct Held {
    /// In nanoseconds of [`BootClock`].
    until: Arc<AtomicU64>,
    drift_ppm: u32,
}

impl Held {
    /// Returns `true` if the ownership lasted until `now`. Read `now` after the guarded action has
    /// begun. The time counts from when etcd was *asked* to keep the key, so the ownership ends
    /// before etcd gives the memory to another candidate. It ends once, and for good.
    pub fn is_held(&self, now: Time) -> bool {
        now < self.until()
    }

    /// Returns the end as known now, exclusive.
    pub fn until(&self) -> Time {
        Time::from_nanos(self.until.load(Ordering::Acquire))
    }

    /// Resolves when the ownership is lost.
    ///
    /// # Cancel safety
    /// The future may be dropped at any moment.
    pub async fn lost(&self) {
        loop {
            let left = self.until().since(BootClock.now());
            if left.is_zero() {
                return;
            }
            // The timer stops while the host is suspended; the clock of the check does not.
            sleep(left.min(Duration::from_millis(100))).await;
        }
    }

    fn end(&self, asked: Time, time_to_live: i64) -> Time {
        let (whole, drift) = (1_000_000_u128, u128::from(self.drift_ppm));
        let nanos = u128::try_from(time_to_live).unwrap_or(0) * 1_000_000_000;
        let usable = nanos * whole.saturating_sub(drift) / (whole + drift);
        asked + Duration::from_nanos(u64::try_from(usable).unwrap_or(u64::MAX))
    }

    /// Handles the reply to a question asked at `asked`. Returns `true` if the ownership lasts.
    fn extend(&self, asked: Time, time_to_live: i64) -> bool {
        let now = BootClock.now();
        if time_to_live <= 0 || !self.is_held(now) {
            self.end_now();
            return false;
        }
        let end = self.end(asked, time_to_live).as_nanos();
        // An ownership that has ended meanwhile stays so.
        let longer = |until: u64| (until != 0).then(|| until.max(end));
        self.until.fetch_update(Ordering::AcqRel, Ordering::Acquire, longer).is_ok()
    }

    fn end_now(&self) {
        self.until.store(0, Ordering::Release);
    }
}

/// The ownership of memory. [`Campaign::win`] returns it, and a task keeps it. It is lost if etcd
/// does not reply for long enough, or when it is dropped.
///
/// An owner that was stopped may not know yet that it is none. Call [`Held::is_held`] before the
/// memory is changed. If a stop between the check and the change is possible, pass the
/// [`boot`](Self::boot) with each change to a memory that refuses smaller boots than it has seen.
pub struct Ownership {
    client: Client,
    key: LeaderKey,
    lease: i64,
    boot: Boot,
    held: Held,
    keeper: Keeper,
}

impl Ownership {
    /// Returns the creation revision of the key. It is larger than that of each earlier owner: a
    /// fencing token.
    pub fn boot(&self) -> Boot {
        self.boot
    }

    /// Returns how long the ownership lasts.
    pub fn held(&self) -> Held {
        self.held.clone()
    }

    /// Returns `true` if the ownership lasted until `now`: see [`Held::is_held`].
    pub fn is_held(&self, now: Time) -> bool {
        self.held.is_held(now)
    }

    /// Gives the memory away, so that the next candidate wins at once. Nothing may change the
    /// memory any more.
    ///
    /// # Errors
    /// etcd has not received it. The key then lives for its time to live. If etcd does not reply,
    /// this waits, so use a timeout.
    pub async fn resign(mut self) -> Result<(), CampaignError> {
        self.held.end_now();
        self.keeper.0.abort();
        let resigned =
            self.client.resign(Some(ResignOptions::new().with_leader(self.key.clone()))).await;
        let revoked = self.client.lease_revoke(self.lease).await;
        resigned?;
        revoked?;
        Ok(())
    }
}

impl fmt::Debug for Ownership {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, lease, boot, held, .. } = self;
        f.debug_struct("Ownership")
            .field("key", key)
            .field("lease", lease)
            .field("boot", boot)
            .field("held", held)
            .finish()
    }
}

impl Drop for Ownership {
    fn drop(&mut self) {
        self.held.end_now();
    }
}

/// Aborts a task when it is dropped.
#[derive(Debug)]
struct Keeper(JoinHandle<()>);

impl Drop for Keeper {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Asks five times in each time to live, on a new stream if one does not reply.
async fn keep(mut client: Client, lease: i64, time_to_live: i64, held: Held) {
    let interval = Duration::from_secs(u64::try_from(time_to_live).unwrap_or(1)) / 5;
    while held.is_held(BootClock.now()) {
        // Opening a stream also asks. Its result counts only with the next reply.
        if let Ok(Ok((mut keeper, mut replies))) =
            timeout(interval, client.lease_keep_alive(lease)).await
        {
            loop {
                let asked = BootClock.now();
                let reply = timeout(interval, async {
                    keeper.keep_alive().await.ok()?;
                    replies.message().await.ok()?
                });
                match reply.await {
                    Ok(Some(reply)) if !held.extend(asked, reply.ttl()) => return,
                    Ok(Some(_)) => sleep(interval).await,
                    Ok(None) | Err(_) => break,
                }
            }
        }
        sleep(interval / 4).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(until: Time) -> Held {
        Held { until: Arc::new(AtomicU64::new(until.as_nanos())), drift_ppm: 10_000 }
    }

    #[test]
    fn it_lasts_from_when_etcd_was_asked_and_less_by_the_drift() {
        let end = held(Time::default()).end(Time::from_nanos(7), 2);
        assert_eq!(end, Time::from_nanos(7 + 2_000_000_000 * 990 / 1_010));
    }

    #[test]
    fn it_ends_once_and_for_good() {
        let now = BootClock.now();
        let later = now + Duration::from_secs(60);
        let lasting = held(later);
        assert!(lasting.extend(now, 120) && lasting.until() > later);
        let end = lasting.until();
        assert!(lasting.extend(now, 1), "an older reply");
        assert_eq!(lasting.until(), end, "it does not shorten it");
        assert!(!lasting.extend(now, 0), "etcd knows the lease no more");
        assert!(!lasting.is_held(now));
        assert!(!lasting.extend(now, 120) && !lasting.is_held(now), "once lost, lost");
    }
}
