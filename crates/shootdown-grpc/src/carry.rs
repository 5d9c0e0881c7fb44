//! Messages of a link, in both directions.
#![forbid(unsafe_code)]

use crate::codec::{self, Heard, Malformed};
use crate::proto;
use shootdown_lease::engine::Leased;
use shootdown_lease::{Asker, Epoch, Nonce, ToMirror, ToOwner};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tonic::{Code, Status, Streaming};

/// Number of fetches that are remembered. Beyond it the oldest is asked again.
const FETCHES: usize = 4_096;

/// How long the owner may take to learn that the mirror has left.
const FAREWELL: Duration = Duration::from_secs(2);

/// How a link has ended.
pub(crate) enum Ended {
    /// The mirror has left for good, and has said so.
    Left,
    Down(Status),
}

/// Carries messages until the link breaks or the mirror has left. Keeps the last `farewell`, so
/// that the next link can repeat it if the owner may not have received it.
pub(crate) async fn carry(
    leased: &Leased,
    mut incoming: Streaming<proto::FromOwner>,
    sender: mpsc::Sender<proto::FromMirror>,
    malformed: &AtomicU64,
    farewell: &mut Option<ToOwner>,
) -> Ended {
    let mut pieces = Pieces::default();
    if let Some(farewell) = farewell {
        // The first message, so there is room.
        let _ = sender.send(codec::from_mirror(farewell)).await;
    }
    loop {
        // Only if there is room, so that unsent messages stay with the mirror.
        let outgoing = async {
            let Ok(room) = sender.reserve().await else { return std::future::pending().await };
            (room, leased.next_message().await)
        };
        tokio::select! {
            biased;
            message = incoming.message() => match hear(message, &mut pieces, malformed) {
                Ok(Some((message, contents))) => leased.handle(message, contents),
                Ok(None) => {}
                Err(status) => return Ended::Down(status),
            },
            (room, message) = outgoing => {
                let Some(message) = message else { break };
                if let ToOwner::Fetch { epoch, nonce, range } = message {
                    pieces.ask((epoch, nonce), range.len());
                }
                if let ToOwner::Left { .. } = message {
                    *farewell = Some(message.clone());
                }
                room.send(codec::from_mirror(&message));
            }
        }
    }
    // The owner ends its half when it has received everything.
    drop(sender);
    let rest = async {
        loop {
            match incoming.message().await {
                Ok(Some(_)) => {}
                Ok(None) => return Ended::Left,
                Err(status) => return Ended::Down(status),
            }
        }
    };
    let ended = timeout(FAREWELL, rest).await;
    if farewell.is_none() {
        return Ended::Left;
    }
    ended.unwrap_or_else(|_| {
        Ended::Down(Status::deadline_exceeded(
            "the owner has not heard in time that the mirror has left",
        ))
    })
}

/// A message for the mirror, with its contents.
type Whole = (ToMirror, Option<Vec<u8>>);

fn hear(
    message: Result<Option<proto::FromOwner>, Status>,
    pieces: &mut Pieces,
    malformed: &AtomicU64,
) -> Result<Option<Whole>, Status> {
    let counted = |status: Status| {
        malformed.fetch_add(1, Ordering::Relaxed);
        status
    };
    let message = match message {
        Ok(Some(message)) => message,
        Ok(None) => return Err(Status::unavailable("the owner has ended the stream")),
        Err(status) if status.code() == Code::OutOfRange => return Err(counted(status)),
        Err(status) => return Err(status),
    };
    let heard = Heard::try_from(message).and_then(|heard| match heard {
        Heard::Piece { epoch, nonce, offset, data } => {
            pieces.add((epoch, nonce), offset, &data).map(|()| None)
        }
        Heard::Message(message @ ToMirror::Fetched { epoch, nonce, .. }) => {
            Ok(Some((message, pieces.take((epoch, nonce)))))
        }
        Heard::Message(message) => {
            if let ToMirror::Refused { nonce, asker: Asker::Fetch(epoch), .. } = message {
                pieces.take((epoch, nonce));
            }
            Ok(Some((message, None)))
        }
    });
    heard.map_err(|what| counted(what.into()))
}

/// Contents being received, of fetches of this link.
#[derive(Default)]
struct Pieces(BTreeMap<Asked, (u64, Vec<u8>)>);

/// Identifies a fetch. An earlier life of the host may have used the same nonce, in an epoch of its
/// own.
type Asked = (Epoch, Nonce);

impl Pieces {
    fn ask(&mut self, of: Asked, length: Option<u64>) {
        if self.0.len() == FETCHES && !self.0.contains_key(&of) {
            self.0.pop_first();
        }
        // A repeated fetch: the pieces received so far stay.
        self.0.entry(of).or_insert_with(|| (length.unwrap_or(u64::MAX), Vec::new()));
    }

    fn add(&mut self, of: Asked, offset: u64, data: &[u8]) -> Result<(), Malformed> {
        // Forgotten, or cancelled.
        let Some((length, contents)) = self.0.get_mut(&of) else { return Ok(()) };
        if offset == 0 {
            contents.clear();
        }
        let end = (contents.len() as u64).checked_add(data.len() as u64);
        if offset != contents.len() as u64 || end.is_none_or(|end| end > *length) {
            return Err(Malformed::Contents);
        }
        contents.extend_from_slice(data);
        Ok(())
    }

    /// Returns the contents, if they are complete.
    fn take(&mut self, of: Asked) -> Option<Vec<u8>> {
        let (length, contents) = self.0.remove(&of)?;
        (contents.len() as u64 == length).then_some(contents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shootdown_lease::Boot;

    #[test]
    fn contents_are_as_long_as_what_was_asked_for() {
        let epoch = Epoch { boot: Boot(1), number: 1 };
        let (one, two) = ((epoch, Nonce(1)), (epoch, Nonce(2)));
        let mut pieces = Pieces::default();
        pieces.ask(one, Some(5));
        assert_eq!(pieces.add(two, 0, &[1]), Ok(()), "nobody asked: it is dropped");
        assert_eq!(pieces.take(two), None);
        assert_eq!(pieces.add(one, 0, &[1, 2]), Ok(()));
        assert_eq!(pieces.add(one, 3, &[4]), Err(Malformed::Contents), "a gap");
        assert_eq!(pieces.add(one, 0, &[7]), Ok(()), "from the start again");
        assert_eq!(pieces.add(one, 1, &[8, 9, 10, 11, 12]), Err(Malformed::Contents), "too much");
        assert_eq!(pieces.add(one, 1, &[8, 9, 10, 11]), Ok(()));
        assert_eq!(pieces.take(one), Some(vec![7, 8, 9, 10, 11]));
        pieces.ask(two, Some(2));
        assert_eq!(pieces.add(two, 0, &[1]), Ok(()));
        assert_eq!(pieces.take(two), None, "too little");
    }

    #[test]
    fn what_is_remembered_has_a_bound() {
        let (mut pieces, epoch) = (Pieces::default(), Epoch { boot: Boot(1), number: 1 });
        for nonce in 0..FETCHES as u64 + 10 {
            pieces.ask((epoch, Nonce(nonce)), Some(1));
        }
        assert_eq!(pieces.0.len(), FETCHES);
        assert!(!pieces.0.contains_key(&(epoch, Nonce(0))));
    }
}
