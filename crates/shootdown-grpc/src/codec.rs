//! Conversion between messages of the protocol and messages of gRPC. A message that does not decode
//! is [`Malformed`].
#![forbid(unsafe_code)]

use crate::limits::{MAX_RANGES, MAX_SPACE_NAME};
use crate::proto;
use crate::proto::refused::Why;
use shootdown::{AddressRange, RangeSet};
use shootdown_lease::{
    Asker, Boot, Epoch, Incarnation, InvalidationId, Nonce, Refusal, ToMirror, ToOwner,
};
use std::time::Duration;
use thiserror::Error;
use tonic::Status;

/// Reason why a message is invalid. It ends its stream.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Malformed {
    /// The message has no content that this version knows.
    #[error("the message says nothing that this version knows")]
    Empty,
    /// A required part is missing.
    #[error("`{0}` is missing")]
    Missing(&'static str),
    /// A range ends before it starts.
    #[error("a range ends at {last:#x}, before it starts at {start:#x}")]
    Range {
        /// First address.
        start: u64,
        /// Last address.
        last: u64,
    },
    /// A set contains no range.
    #[error("a set of no ranges")]
    NoRanges,
    /// A set contains more than 1,024 ranges.
    #[error("a set of {0} ranges: 1,024 are the most")]
    ManyRanges(usize),
    /// The name of a space is empty or longer than 255 bytes.
    #[error("a space's name of {0} bytes: it has 1 to 255")]
    SpaceName(usize),
    /// `Open` was repeated, or another message came before it.
    #[error("`Open` is the first message of a stream, and no other is")]
    Open,
    /// The term is zero.
    #[error("a term of zero")]
    Term,
    /// This version does not know the reason of a refusal.
    #[error("a refusal for the unknown reason {0}")]
    Refusal(i32),
    /// The contents were not requested, are too long, or are out of order.
    #[error("contents that were not asked for, or not in their order")]
    Contents,
}

impl From<Malformed> for Status {
    fn from(malformed: Malformed) -> Self {
        Self::invalid_argument(malformed.to_string())
    }
}

/// A message on a mirror's stream.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Received {
    Open(String),
    Message(ToOwner),
}

/// A message on an owner's stream.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    Message(ToMirror),
    Piece { epoch: Epoch, nonce: Nonce, offset: u64, data: bytes::Bytes },
}

fn epoch(epoch: Option<proto::Epoch>) -> Result<Epoch, Malformed> {
    let epoch = epoch.ok_or(Malformed::Missing("epoch"))?;
    Ok(Epoch { boot: Boot(epoch.boot), number: epoch.number })
}

fn to_epoch(epoch: Epoch) -> Option<proto::Epoch> {
    Some(proto::Epoch { boot: epoch.boot.0, number: epoch.number })
}

fn range(range: proto::Range) -> Result<AddressRange, Malformed> {
    let proto::Range { start, last } = range;
    AddressRange::try_from(start..=last).map_err(|_| Malformed::Range { start, last })
}

fn to_range(range: AddressRange) -> proto::Range {
    proto::Range { start: range.start(), last: range.last() }
}

fn ranges(list: Vec<proto::Range>) -> Result<RangeSet, Malformed> {
    if list.len() > MAX_RANGES {
        return Err(Malformed::ManyRanges(list.len()));
    }
    let list = list.into_iter().map(range).collect::<Result<Vec<_>, _>>()?;
    RangeSet::new(list).map_err(|_| Malformed::NoRanges)
}

/// Returns as many ranges as a message may have. If there are more, neighbours are merged:
/// releasing more than what changes is safe.
fn to_ranges(ranges: &RangeSet) -> Vec<proto::Range> {
    let each = ranges.len().div_ceil(MAX_RANGES).max(1);
    let hull = |part: &[AddressRange]| {
        let (first, last) = (part.first()?, part.last()?);
        Some(proto::Range { start: first.start(), last: last.last() })
    };
    ranges.chunks(each).filter_map(hull).collect()
}

impl TryFrom<proto::FromMirror> for Received {
    type Error = Malformed;

    fn try_from(message: proto::FromMirror) -> Result<Self, Malformed> {
        use proto::from_mirror::Message;
        let message = match message.message.ok_or(Malformed::Empty)? {
            Message::Open(open) => {
                return match open.space.len() {
                    1..=MAX_SPACE_NAME => Ok(Self::Open(open.space)),
                    bytes => Err(Malformed::SpaceName(bytes)),
                };
            }
            Message::Join(join) => ToOwner::Join {
                incarnation: Incarnation(join.incarnation),
                nonce: Nonce(join.nonce),
            },
            Message::Renew(renew) => {
                ToOwner::Renew { epoch: epoch(renew.epoch)?, nonce: Nonce(renew.nonce) }
            }
            Message::Fetch(fetch) => ToOwner::Fetch {
                epoch: epoch(fetch.epoch)?,
                nonce: Nonce(fetch.nonce),
                range: range(fetch.range.ok_or(Malformed::Missing("range"))?)?,
            },
            Message::Ack(ack) => ToOwner::Ack {
                epoch: epoch(ack.epoch)?,
                invalidation: InvalidationId(ack.invalidation),
            },
            Message::Left(left) => ToOwner::Left { epoch: epoch(left.epoch)? },
        };
        Ok(Self::Message(message))
    }
}

impl TryFrom<proto::FromOwner> for Heard {
    type Error = Malformed;

    fn try_from(message: proto::FromOwner) -> Result<Self, Malformed> {
        use proto::from_owner::Message;
        let message = match message.message.ok_or(Malformed::Empty)? {
            Message::Contents(piece) => {
                let (epoch, nonce) = (epoch(piece.epoch)?, Nonce(piece.nonce));
                return Ok(Self::Piece { epoch, nonce, offset: piece.offset, data: piece.data });
            }
            Message::Welcome(welcome) if welcome.term_nanos == 0 => return Err(Malformed::Term),
            Message::Welcome(welcome) => ToMirror::Welcome {
                epoch: epoch(welcome.epoch)?,
                incarnation: Incarnation(welcome.incarnation),
                nonce: Nonce(welcome.nonce),
                term: Duration::from_nanos(welcome.term_nanos),
            },
            Message::Renewed(renewed) => {
                ToMirror::Renewed { epoch: epoch(renewed.epoch)?, nonce: Nonce(renewed.nonce) }
            }
            Message::Fetched(fetched) => ToMirror::Fetched {
                epoch: epoch(fetched.epoch)?,
                nonce: Nonce(fetched.nonce),
                version: fetched.version,
            },
            Message::Inv(inv) => ToMirror::Inv {
                epoch: epoch(inv.epoch)?,
                invalidation: InvalidationId(inv.invalidation),
                ranges: ranges(inv.ranges)?,
            },
            Message::Gone(gone) => ToMirror::Gone { epoch: epoch(gone.epoch)? },
            Message::Refused(refused) => ToMirror::Refused {
                nonce: Nonce(refused.nonce),
                asker: match refused.asker {
                    Some(proto::refused::Asker::Incarnation(of)) => Asker::Join(Incarnation(of)),
                    Some(proto::refused::Asker::Epoch(of)) => Asker::Fetch(epoch(Some(of))?),
                    None => return Err(Malformed::Missing("asker")),
                },
                why: refusal(refused.why)?,
            },
        };
        Ok(Self::Message(message))
    }
}

fn refusal(why: i32) -> Result<Refusal, Malformed> {
    match Why::try_from(why) {
        Ok(Why::Members) => Ok(Refusal::Members),
        Ok(Why::MembersOfHost) => Ok(Refusal::MembersOfHost),
        Ok(Why::Fetches) => Ok(Refusal::Fetches),
        Ok(Why::Contents) => Ok(Refusal::Contents),
        Ok(Why::Expelled) => Ok(Refusal::Expelled),
        Ok(Why::NotWatched) => Ok(Refusal::NotWatched),
        Ok(Why::Unspecified) | Err(_) => Err(Malformed::Refusal(why)),
    }
}

fn to_refusal(why: Refusal) -> Why {
    match why {
        Refusal::Members => Why::Members,
        Refusal::MembersOfHost => Why::MembersOfHost,
        Refusal::Fetches => Why::Fetches,
        Refusal::Contents => Why::Contents,
        Refusal::Expelled => Why::Expelled,
        Refusal::NotWatched => Why::NotWatched,
    }
}

/// Makes the first message of a stream.
pub(crate) fn open(space: &str) -> proto::FromMirror {
    let open = proto::Open { space: space.to_owned() };
    proto::FromMirror { message: Some(proto::from_mirror::Message::Open(open)) }
}

pub(crate) fn from_mirror(message: &ToOwner) -> proto::FromMirror {
    use proto::from_mirror::Message;
    let message = match *message {
        ToOwner::Join { incarnation, nonce } => {
            Message::Join(proto::Join { incarnation: incarnation.0, nonce: nonce.0 })
        }
        ToOwner::Renew { epoch, nonce } => {
            Message::Renew(proto::Renew { epoch: to_epoch(epoch), nonce: nonce.0 })
        }
        ToOwner::Fetch { epoch, nonce, range } => Message::Fetch(proto::Fetch {
            epoch: to_epoch(epoch),
            nonce: nonce.0,
            range: Some(to_range(range)),
        }),
        ToOwner::Ack { epoch, invalidation } => {
            Message::Ack(proto::Ack { epoch: to_epoch(epoch), invalidation: invalidation.0 })
        }
        ToOwner::Left { epoch } => Message::Left(proto::Left { epoch: to_epoch(epoch) }),
    };
    proto::FromMirror { message: Some(message) }
}

pub(crate) fn from_owner(message: &ToMirror) -> proto::FromOwner {
    use proto::from_owner::Message;
    let message = match message {
        ToMirror::Welcome { epoch, incarnation, nonce, term } => Message::Welcome(proto::Welcome {
            epoch: to_epoch(*epoch),
            incarnation: incarnation.0,
            nonce: nonce.0,
            term_nanos: u64::try_from(term.as_nanos()).unwrap_or(u64::MAX),
        }),
        ToMirror::Renewed { epoch, nonce } => {
            Message::Renewed(proto::Renewed { epoch: to_epoch(*epoch), nonce: nonce.0 })
        }
        ToMirror::Fetched { epoch, nonce, version } => Message::Fetched(proto::Fetched {
            epoch: to_epoch(*epoch),
            nonce: nonce.0,
            version: *version,
        }),
        ToMirror::Inv { epoch, invalidation, ranges } => Message::Inv(proto::Inv {
            epoch: to_epoch(*epoch),
            invalidation: invalidation.0,
            ranges: to_ranges(ranges),
        }),
        ToMirror::Gone { epoch } => Message::Gone(proto::Gone { epoch: to_epoch(*epoch) }),
        ToMirror::Refused { nonce, asker, why } => Message::Refused(proto::Refused {
            nonce: nonce.0,
            asker: match asker {
                Asker::Join(of) => Some(proto::refused::Asker::Incarnation(of.0)),
                Asker::Fetch(of) => to_epoch(*of).map(proto::refused::Asker::Epoch),
            },
            why: to_refusal(*why).into(),
        }),
    };
    proto::FromOwner { message: Some(message) }
}

/// Makes a message with a piece of the contents of a fetch.
pub(crate) fn piece(
    epoch: Epoch,
    nonce: Nonce,
    offset: u64,
    data: bytes::Bytes,
) -> proto::FromOwner {
    let piece = proto::Contents { epoch: to_epoch(epoch), nonce: nonce.0, offset, data };
    proto::FromOwner { message: Some(proto::from_owner::Message::Contents(piece)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message as _;

    fn part(start: u64, last: u64) -> AddressRange {
        AddressRange::try_from(start..=last).unwrap()
    }

    const EPOCH: Epoch = Epoch { boot: Boot(7), number: u64::MAX };

    #[test]
    fn what_is_encoded_decodes_to_the_same() {
        let to_owner = [
            ToOwner::Join { incarnation: Incarnation(0), nonce: Nonce(u64::MAX) },
            ToOwner::Renew { epoch: EPOCH, nonce: Nonce(1) },
            ToOwner::Fetch { epoch: EPOCH, nonce: Nonce(2), range: AddressRange::ALL },
            ToOwner::Fetch { epoch: EPOCH, nonce: Nonce(3), range: part(0, 0) },
            ToOwner::Ack { epoch: EPOCH, invalidation: InvalidationId(4) },
            ToOwner::Left { epoch: EPOCH },
        ];
        for message in to_owner {
            let bytes = from_mirror(&message).encode_to_vec();
            let again = Received::try_from(proto::FromMirror::decode(&bytes[..]).unwrap());
            assert_eq!(again, Ok(Received::Message(message)));
        }
        let ranges = RangeSet::new([part(0, 9), part(100, 200), part(u64::MAX, u64::MAX)]).unwrap();
        let term = Duration::from_nanos(1);
        let to_mirror = [
            ToMirror::Welcome { epoch: EPOCH, incarnation: Incarnation(3), nonce: Nonce(0), term },
            ToMirror::Renewed { epoch: EPOCH, nonce: Nonce(1) },
            ToMirror::Fetched { epoch: EPOCH, nonce: Nonce(2), version: 3 },
            ToMirror::Inv { epoch: EPOCH, invalidation: InvalidationId(4), ranges },
            ToMirror::Gone { epoch: EPOCH },
            ToMirror::Refused {
                nonce: Nonce(5),
                asker: Asker::Fetch(EPOCH),
                why: Refusal::Fetches,
            },
            ToMirror::Refused {
                nonce: Nonce(6),
                asker: Asker::Fetch(EPOCH),
                why: Refusal::Contents,
            },
            ToMirror::Refused {
                nonce: Nonce(7),
                asker: Asker::Join(Incarnation(2)),
                why: Refusal::NotWatched,
            },
            ToMirror::Refused {
                nonce: Nonce(6),
                asker: Asker::Join(Incarnation(2)),
                why: Refusal::Expelled,
            },
            ToMirror::Refused {
                nonce: Nonce(5),
                asker: Asker::Join(Incarnation(0)),
                why: Refusal::Members,
            },
            ToMirror::Refused {
                nonce: Nonce(5),
                asker: Asker::Join(Incarnation(1)),
                why: Refusal::MembersOfHost,
            },
        ];
        for message in to_mirror {
            let bytes = from_owner(&message).encode_to_vec();
            let again = Heard::try_from(proto::FromOwner::decode(&bytes[..]).unwrap());
            assert_eq!(again, Ok(Heard::Message(message)));
        }
        let again = Received::try_from(open("vram"));
        assert_eq!(again, Ok(Received::Open("vram".to_owned())));
    }

    #[test]
    fn what_cannot_be_is_named() {
        use proto::from_mirror::Message as Mirror;
        use proto::from_owner::Message as Owner;
        let some = || to_epoch(EPOCH);
        let mirror = |message| Received::try_from(proto::FromMirror { message }).unwrap_err();
        assert_eq!(mirror(None), Malformed::Empty);
        assert_eq!(
            mirror(Some(Mirror::Renew(proto::Renew { epoch: None, nonce: 1 }))),
            Malformed::Missing("epoch")
        );
        let fetch =
            |range| mirror(Some(Mirror::Fetch(proto::Fetch { epoch: some(), nonce: 1, range })));
        assert_eq!(fetch(None), Malformed::Missing("range"));
        assert_eq!(
            fetch(Some(proto::Range { start: 2, last: 1 })),
            Malformed::Range { start: 2, last: 1 }
        );
        let named = |space: String| mirror(Some(Mirror::Open(proto::Open { space })));
        assert_eq!(named(String::new()), Malformed::SpaceName(0));
        assert_eq!(named("x".repeat(256)), Malformed::SpaceName(256));

        let owner = |message| Heard::try_from(proto::FromOwner { message }).unwrap_err();
        let inv =
            |ranges| owner(Some(Owner::Inv(proto::Inv { epoch: some(), invalidation: 1, ranges })));
        assert_eq!(inv(vec![]), Malformed::NoRanges);
        let many = vec![proto::Range { start: 1, last: 1 }; MAX_RANGES + 1];
        assert_eq!(inv(many), Malformed::ManyRanges(MAX_RANGES + 1));
        assert_eq!(
            inv(vec![proto::Range { start: 1, last: 0 }]),
            Malformed::Range { start: 1, last: 0 }
        );
        let refused = |why| {
            owner(Some(Owner::Refused(proto::Refused {
                nonce: 1,
                asker: Some(proto::refused::Asker::Incarnation(1)),
                why,
            })))
        };
        assert_eq!(refused(0), Malformed::Refusal(0));
        assert_eq!(refused(99), Malformed::Refusal(99));
        let welcome = proto::Welcome { epoch: some(), incarnation: 1, nonce: 1, term_nanos: 0 };
        assert_eq!(owner(Some(Owner::Welcome(welcome))), Malformed::Term);
    }

    #[test]
    fn a_set_of_too_many_ranges_becomes_fewer_that_cover_it() {
        let all: Vec<_> =
            (0..MAX_RANGES as u64 * 3 + 5).map(|n| part(n * 0x2000, n * 0x2000 + 0xfff)).collect();
        let set = RangeSet::new(all.iter().copied()).unwrap();
        let sent = ranges(to_ranges(&set)).unwrap();
        assert!(sent.len() <= MAX_RANGES, "{}", sent.len());
        assert!(all.iter().all(|range| sent.iter().any(|larger| larger.covers(*range))));
        let few = RangeSet::new(all.iter().copied().take(MAX_RANGES)).unwrap();
        assert_eq!(ranges(to_ranges(&few)).unwrap(), few);
    }

    #[test]
    fn any_bytes_decode_or_are_refused() {
        let mut random = fastrand::Rng::with_seed(7);
        let mut decoded = 0;
        for _ in 0..200_000 {
            let length = random.usize(..40);
            let mut bytes: Vec<u8> = (0..length).map(|_| random.u8(..)).collect();
            // Random bytes alone seldom name a field.
            for byte in bytes.iter_mut().filter(|byte| **byte % 2 == 0) {
                *byte = *[0x0a, 0x12, 0x1a, 0x22, 0x09, 0x11, 0x00, 0x02]
                    .get(usize::from(*byte) % 8)
                    .unwrap_or(&0);
            }
            decoded += usize::from(
                proto::FromMirror::decode(&bytes[..])
                    .is_ok_and(|it| Received::try_from(it).is_ok()),
            );
            decoded += usize::from(
                proto::FromOwner::decode(&bytes[..]).is_ok_and(|it| Heard::try_from(it).is_ok()),
            );
        }
        assert!(decoded > 0, "no bytes decode at all: are these the messages?");
    }
}
