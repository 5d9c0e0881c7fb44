//! The two ends in the engine: an owner's [`Hub`], whose [`Mirrors`] are a notifier of its
//! `AddressSpace`, and a mirror's [`Leased`] space.
//!
//! Neither starts a thread or needs a runtime. A transport carries [`Link::next`] to
//! [`Leased::handle`] and [`Leased::next_message`] to [`Hub::handle`]; the program runs
//! [`Hub::run`] and [`Leased::run`] on any executor, with a sleep of its own.
//!
//! ```
//! use shootdown::{AddressRange, AddressSpace, Event};
//! use shootdown_lease::engine::{Hub, Leased, Outgoing};
//! use shootdown_lease::{Boot, Host, Incarnation, Memory, Mirror, MirrorSettings, Owner, Terms, Time};
//! use futures::channel::mpsc;
//! use futures::StreamExt;
//! use std::time::{Duration, Instant};
//! # use futures::future::{Either, pending, select};
//!
//! # futures::executor::block_on(async {
//! let began = Instant::now();
//! let clock = move || Time::from_nanos(began.elapsed().as_nanos() as u64); // in earnest: CLOCK_BOOTTIME
//! # let sleep = |_: Duration| pending::<()>(); // in earnest a timer of your runtime
//! let range = AddressRange::try_from(0x1000..0x9000)?;
//!
//! // The owner: its mirrors are one more device.
//! let mut terms = Terms::new(Duration::from_secs(1));
//! terms.shared = range;
//! let owner = Owner::new(Boot(1), terms, Memory::New, clock())?;
//! let (hub, space) = (Hub::new(owner, clock), AddressSpace::new());
//! let _mirrors = hub.insert(&space)?;
//! // A mirror.
//! let leased = Leased::new(Mirror::new(Incarnation(1), MirrorSettings::default(), clock()), clock);
//!
//! // What a transport does; `Host(1)` is whom it has authenticated.
//! let mut link = hub.link(Host(1));
//! let (asked, mut fetches) = mpsc::unbounded();
//! let up = async { while let Some(message) = leased.next_message().await { hub.handle(Host(1), message); } };
//! let down = async {
//!     while let Some(outgoing) = link.next().await {
//!         match outgoing {
//!             Outgoing::Message(message) => leased.handle(message, None),
//!             Outgoing::Serve(serve) => asked.unbounded_send(serve).unwrap(), // not here: messages go on
//!         }
//!     }
//! };
//! let answers = async {
//!     while let Some(serve) = fetches.next().await {
//!         if serve.ready(&space).await.is_ok() { // not while the memory changes
//!             let contents = vec![7; serve.range().len().unwrap() as usize];
//!             leased.handle(serve.message(), Some(contents));
//!         }
//!     }
//! };
//! let program = async {
//!     assert_eq!(leased.fetch(AddressRange::try_from(0x1000..0x1004)?).await?, [7; 4]);
//!     let guard = space.invalidate(range, Event::Unmap).await; // the mirror has let go
//!     drop(guard);
//!     leased.leave().await;
//!     Ok::<(), Box<dyn std::error::Error>>(())
//! };
//! let background = futures::future::join5(up, down, answers, hub.run(sleep), leased.run(sleep));
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

/// A host's clock. It has to go on while the host is suspended: `CLOCK_BOOTTIME` on Linux.
pub trait Clock: Send + Sync + 'static {
    /// The time at this moment, and not of an earlier one.
    fn now(&self) -> Time;
}

impl<F: Fn() -> Time + Send + Sync + 'static> Clock for F {
    fn now(&self) -> Time {
        self()
    }
}
