//! What no test can see from outside, because it lasts from one lock to the next.

use super::*;
use futures::executor::block_on;

#[test]
fn a5_nothing_is_installed_once_the_stream_has_ended_though_the_subscription_has_not_yet() {
    let space = AddressSpace::new();
    let inbox = space.inbox(AddressRange::new(0x1000, 0x1000).unwrap(), 0).unwrap();
    let sequence = block_on(inbox.read_begin());
    assert_eq!(inbox.install(sequence, |mapped| *mapped += 1), Ok(()));
    inbox.desk.post.lock().ended = true;
    assert!(!inbox.read_retry(sequence) && inbox.is_closed());
    assert_eq!(inbox.install(sequence, |mapped| *mapped += 1), Err(Collision));
    let mirrored = inbox.mirror(
        RetryBudget::default(),
        |_| core::future::ready(Ok::<_, ()>(())),
        |mapped, ()| *mapped += 1,
    );
    assert_eq!((block_on(mirrored), inbox.with(|mapped| *mapped)), (Err(MirrorError::Closed), 1));
}
