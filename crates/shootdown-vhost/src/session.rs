//! A connection of a front-end, as a state machine without I/O: messages go in, messages come out.
//!
//! Messages take effect in their order, at once; only answers wait (V6). An answer that waits (an
//! INVALIDATE, a ring that stops) delays the answers after it, as the protocol says, and nothing
//! else.
#![forbid(unsafe_code)]

mod handle;
mod queue;

use crate::device::Device;
use crate::iotlb::{Invalidated, Iotlb};
use crate::message::{Channel, Message, ProtocolError, iotlb_bytes, vhost_access};
use queue::Queue;
use shootdown::{Invalidate, Reached, Timeline};
use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use vhost::vhost_user::message::{BackendReq, VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::{VhostIotlbMsg, VhostIotlbType};
use virtio_bindings::virtio_config::VIRTIO_F_ACCESS_PLATFORM;

/// A deliberate mistake, to test how a guest reacts. It overwrites memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// Answers INVALIDATE and GET_VRING_BASE at once, whatever is in flight.
    AnswerEarly,
    /// Keeps translations: INVALIDATE waits for mappings in flight and removes no translation. Nor
    /// does a device that stops.
    KeepTranslations,
}

/// Work that a session requests. All of it must be done, so a new variant is a breaking change.
#[derive(Debug)]
pub enum Output {
    /// Send this message.
    Send(Channel, Message),
    /// Also receive from this socket, and send the messages of the back-end channel there.
    Open(OwnedFd),
    /// No ring is left after [`Stopper::stop`]: close the connection.
    Close,
}

/// Ends a session from elsewhere.
#[derive(Clone, Debug, Default)]
pub struct Stopper(Timeline);

impl Stopper {
    /// Stops all rings. They take no more requests, finish what they have, and tell the driver;
    /// then the session closes the connection. Until then the front-end gets its answers: a
    /// connection that is closed earlier counts as an answer to an INVALIDATE, too.
    ///
    /// May be called from any thread, and more than once.
    pub fn stop(&self) {
        self.0.signal(1);
    }
}

/// A connection of a front-end to a device.
///
/// Its driver passes each message to [`receive`](Self::receive), and does what
/// [`poll_output`](Self::poll_output) requests, after each message and whenever the waker is woken.
/// [`crate::driver`] has two drivers. When the front-end has disconnected,
/// [close](Self::poll_closed) the session: rings with requests in flight may take their time.
pub struct Session<D: Device> {
    device: Arc<D>,
    iotlb: Iotlb,
    fault: Option<Fault>,
    features: u64,
    protocol: VhostUserProtocolFeatures,
    queues: Vec<Queue>,
    backend: Backend,
    replies: VecDeque<Reply>,
    stopper: Stopper,
    /// Resolves after a stop; `None` once it has resolved.
    stopping: Option<Reached>,
}

/// State of the back-end channel.
enum Backend {
    None,
    /// The session's driver has not been told of the socket.
    New(OwnedFd),
    Open,
}

/// A due answer.
struct Reply {
    request: u32,
    state: Due,
}

enum Due {
    Now(Vec<u8>),
    /// Due when an INVALIDATE has been carried out. `true` if it must be answered.
    Invalidated(Invalidated, bool),
    /// Due when nothing of the former memory is in flight. `true` if it must be answered.
    Quiet(Invalidate<'static>, bool),
    /// Due when this queue has stopped. The base may have been set since the ring was told to stop.
    Base(usize, Option<u16>),
    /// Due when all queues have stopped. `true` if it must be answered.
    Bases(bool),
}

impl<D: Device> Session<D> {
    /// Makes a connection to `device`, whose translations go into `iotlb`. Sessions may use the
    /// same IOTLB one after the other, and its counters go on. Two sessions must not use it at the
    /// same time.
    pub fn new(device: Arc<D>, iotlb: Iotlb) -> Self {
        let queues = (0..device.queues()).map(|_| Queue::default()).collect();
        let stopper = Stopper::default();
        Self {
            device,
            iotlb,
            fault: None,
            features: 0,
            protocol: VhostUserProtocolFeatures::empty(),
            queues,
            backend: Backend::None,
            replies: VecDeque::new(),
            stopping: Some(stopper.0.reached(1)),
            stopper,
        }
    }

    /// Returns a handle that ends the session from elsewhere, such as at the end of the process.
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// Makes a deliberate mistake.
    pub fn fault(mut self, fault: Option<Fault>) -> Self {
        self.fault = fault;
        self
    }

    /// Returns the IOTLB of the device.
    pub fn iotlb(&self) -> &Iotlb {
        &self.iotlb
    }

    /// Returns the features that the front-end has accepted.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Returns the number of due answers.
    pub fn due(&self) -> usize {
        self.replies.len()
    }

    /// Handles a message. Poll the [output](Self::poll_output) afterwards, before the next message.
    ///
    /// # Errors
    /// [`ProtocolError`]. Close the connection then. A request that the protocol permits and this
    /// side refuses is no error: its answer refuses it.
    pub fn receive(&mut self, channel: Channel, message: Message) -> Result<(), ProtocolError> {
        tracing::trace!(?channel, ?message, "received");
        match channel {
            Channel::Frontend => self.handle(message),
            Channel::Backend if !message.is_reply() => {
                Err(ProtocolError::NoAnswer(message.request))
            }
            // The message is from before the channel was closed.
            Channel::Backend if matches!(self.backend, Backend::None) => Ok(()),
            Channel::Backend => {
                let answer: u64 = message.body()?;
                if self.iotlb.answered(answer == 0) { Ok(()) } else { Err(ProtocolError::Answer) }
            }
        }
    }

    /// Returns the next work. `Pending`: none until a message comes or the waker is woken.
    ///
    /// It also continues rings that were stopped and started again.
    pub fn poll_output(&mut self, cx: &mut Context<'_>) -> Poll<Output> {
        if self.stopping.as_mut().is_some_and(|stopping| Pin::new(stopping).poll(cx).is_ready()) {
            self.stopping = None;
            // If a miss may have no answer, none is waited for.
            let each = self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK);
            self.queues.iter_mut().for_each(if each { Queue::stop } else { Queue::disconnect });
        }
        self.queues.iter_mut().for_each(|queue| queue.poll_ended(cx));
        if let Backend::New(_) = &self.backend
            && let Backend::New(socket) = std::mem::replace(&mut self.backend, Backend::Open)
        {
            return Poll::Ready(Output::Open(socket));
        }
        let reply = self.poll_reply(cx);
        // Last: an answer that tells where a ring has stopped comes before the next ring starts.
        self.start_queues();
        self.queues.iter_mut().for_each(|queue| queue.poll_ended(cx));
        if let Poll::Ready(message) = reply {
            return Poll::Ready(Output::Send(Channel::Frontend, message));
        }
        if let Backend::Open = self.backend
            && let Poll::Ready((iova, access)) = self.iotlb.poll_ask(cx)
        {
            let perm = vhost_access(access);
            let miss = VhostIotlbMsg {
                iova,
                size: 0,
                userspace_addr: 0,
                perm,
                msg_type: VhostIotlbType::Miss,
            };
            let each = self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK);
            let flags =
                if each { VhostUserHeaderFlag::NEED_REPLY } else { VhostUserHeaderFlag::empty() };
            let message = Message::new(BackendReq::IOTLB_MSG, flags, &iotlb_bytes(&miss));
            return Poll::Ready(Output::Send(Channel::Backend, message));
        }
        if self.stopping.is_none()
            && self.replies.is_empty()
            && self.queues.iter().all(|queue| queue.base().is_some())
        {
            return Poll::Ready(Output::Close);
        }
        Poll::Pending
    }

    /// Returns the next answer. Polls all due answers, so that none starts later than it could.
    fn poll_reply(&mut self, cx: &mut Context<'_>) -> Poll<Message> {
        let (queues, mut stopped) = (&mut self.queues, false);
        for reply in &mut self.replies {
            let answer =
                |needed: bool| if needed { 0u64.to_ne_bytes().to_vec() } else { Vec::new() };
            let over = match &mut reply.state {
                Due::Now(_) => continue,
                Due::Invalidated(future, needed) => {
                    Pin::new(future).poll(cx).map(|_| answer(*needed))
                }
                Due::Quiet(future, needed) => Pin::new(future).poll(cx).map(|_| answer(*needed)),
                Due::Base(index, set) => match queues[*index].base() {
                    Some(base) => {
                        stopped = true;
                        queues[*index].answered();
                        Poll::Ready(handle::vring_state(*index, set.unwrap_or(base)))
                    }
                    None => Poll::Pending,
                },
                Due::Bases(needed) => {
                    if queues.iter().all(|queue| queue.base().is_some()) {
                        stopped = true;
                        queues.iter_mut().for_each(Queue::answered);
                        Poll::Ready(answer(*needed))
                    } else {
                        Poll::Pending
                    }
                }
            };
            if let Poll::Ready(payload) = over {
                reply.state = Due::Now(payload);
            }
        }
        // Memory that is unmapped while no ring runs is never reported, so translations must go.
        // While a ring runs, unmapped memory is reported, and the ring may need known translations
        // to end.
        let quiet = queues.iter().all(|queue| queue.base().is_some());
        if stopped && quiet && self.fault != Some(Fault::KeepTranslations) {
            self.iotlb.forget_all();
        }
        while self.replies.front().is_some_and(|reply| matches!(reply.state, Due::Now(_))) {
            if let Some(Reply { request, state: Due::Now(payload) }) = self.replies.pop_front()
                && !payload.is_empty()
            {
                return Poll::Ready(Message::new(request, VhostUserHeaderFlag::REPLY, &payload));
            }
        }
        Poll::Pending
    }

    /// Stops all rings and fails everything that waits for a translation. Call it when the
    /// front-end has disconnected, or must no longer be heard. Resolves when no ring is left, so
    /// that rings have no guest memory in flight.
    pub fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        // Known translations stay until then: the front-end has received no answer, so they hold,
        // and completions can be put.
        self.queues.iter_mut().for_each(Queue::disconnect);
        self.iotlb.end();
        self.replies.clear();
        let mut left = false;
        for queue in &mut self.queues {
            queue.poll_ended(cx);
            left |= queue.base().is_none();
        }
        if left {
            return Poll::Pending;
        }
        self.iotlb.leave();
        Poll::Ready(())
    }

    /// Records that the front-end has closed its back-end channel, so no questions are possible.
    pub fn backend_closed(&mut self) {
        self.backend = Backend::None;
        self.iotlb.new_channel();
        if self.features & (1 << VIRTIO_F_ACCESS_PLATFORM) != 0 {
            self.iotlb.end();
        }
    }
}

impl<D: Device> Drop for Session<D> {
    /// Also stops rings that no session waits for.
    fn drop(&mut self) {
        self.queues.iter_mut().for_each(Queue::disconnect);
        self.iotlb.leave();
    }
}

impl<D: Device> fmt::Debug for Session<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("features", &self.features)
            .field("iotlb", &self.iotlb)
            .finish_non_exhaustive()
    }
}
