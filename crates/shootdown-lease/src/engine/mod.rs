//! Both sides with an `AddressSpace`: the owner's [`Hub`], whose [`Mirrors`] are a notifier of the
//! owner's space, and the mirror's [`Leased`] space.
//!
//! Neither starts a thread or needs a runtime. A transport carries messages from [`Link::next`] to
//! [`Leased::handle`], and from [`Leased::next_message`] to [`Hub::handle`]. The program runs
//! [`Hub::run`] and [`Leased::run`] on any executor, with a sleep of its own.
//!
//! ```
//! use futures::StreamExt;
//! use futures::channel::mpsc;
//! use shootdown::{AddressRange, AddressSpace, Event};
//! use shootdown_lease::engine::{Hub, Leased, Outgoing};
//! use shootdown_lease::{Boot, Host, Incarnation, Memory, Mirror};
//! use shootdown_lease::{MirrorSettings, Owner, Terms, Time};
//! use std::time::{Duration, Instant};
//! # use futures::future::{Either, pending, select};
//!
//! # futures::executor::block_on(async {
//! // In practice: CLOCK_BOOTTIME, and a timer of your runtime.
//! let began = Instant::now();
//! let clock =
//!     move || Time::from_nanos(began.elapsed().as_nanos() as u64);
//! # let sleep = |_: Duration| pending::<()>();
//! let range = AddressRange::try_from(0x1000..0x9000)?;
//!
//! // The owner. Its mirrors are one more device of its space.
//! let mut terms = Terms::new(Duration::from_secs(1));
//! terms.shared = range;
//! let owner = Owner::new(Boot(1), terms, Memory::New, clock())?;
//! let (hub, space) = (Hub::new(owner, clock), AddressSpace::new());
//! let _mirrors = hub.insert(&space)?;
//!
//! // A mirror.
//! let settings = MirrorSettings::default();
//! let mirror = Mirror::new(Incarnation(1), settings, clock());
//! let leased = Leased::new(mirror, clock);
//!
//! // The transport. It has authenticated the mirror as `Host(1)`.
//! let mut link = hub.link(Host(1));
//! let (asked, mut fetches) = mpsc::unbounded();
//! let up = async {
//!     while let Some(message) = leased.next_message().await {
//!         hub.handle(Host(1), message);
//!     }
//! };
//! let down = async {
//!     while let Some(outgoing) = link.next().await {
//!         match outgoing {
//!             Outgoing::Message(message) => leased.handle(message, None),
//!             // Answered elsewhere, so that messages go on.
//!             Outgoing::Serve(serve) => asked.unbounded_send(serve).unwrap(),
//!         }
//!     }
//! };
//! let answers = async {
//!     while let Some(serve) = fetches.next().await {
//!         // Waits while the memory changes.
//!         if serve.ready(&space).await.is_ok() {
//!             let len = serve.range().len().unwrap() as usize;
//!             leased.handle(serve.message(), Some(vec![7; len]));
//!         }
//!     }
//! };
//!
//! let program = async {
//!     let part = AddressRange::try_from(0x1000..0x1004)?;
//!     assert_eq!(leased.fetch(part).await?, [7; 4]);
//!     let guard = space.invalidate(range, Event::Unmap).await;
//!     drop(guard); // the mirror has released the range
//!     leased.leave().await;
//!     Ok::<(), Box<dyn std::error::Error>>(())
//! };
//! let background = futures::future::join5(
//!     up,
//!     down,
//!     answers,
//!     hub.run(sleep),
//!     leased.run(sleep),
//! );
//! match select(Box::pin(program), Box::pin(background)).await {
//!     Either::Left((ended, _)) => ended?,
//!     Either::Right(_) => unreachable!("the hub runs for ever"),
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! # }).unwrap();
//! ```

mod hub;
mod leased;
mod link;
mod wake;

pub use hub::{Hub, Mirrors};
pub use leased::{Leased, Lost};
pub use link::{Ended, Link, Outgoing, Serve, read_unchanged};

use crate::time::Time;

/// The clock of a host. It must continue while the host is suspended: `CLOCK_BOOTTIME` on Linux.
pub trait Clock: Send + Sync + 'static {
    /// Returns the current time, never a cached one.
    fn now(&self) -> Time;
}

impl<F: Fn() -> Time + Send + Sync + 'static> Clock for F {
    fn now(&self) -> Time {
        self()
    }
}
