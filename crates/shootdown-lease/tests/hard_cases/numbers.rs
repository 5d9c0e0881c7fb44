//! Numbers at their ends.

use crate::support::*;
use futures::FutureExt;
use shootdown_lease::engine::{Hub, Leased};
use shootdown_lease::{
    Boot, Epoch, Host, Incarnation, Memory, Mirror, MirrorDecision, MirrorSettings, Nonce, Owner,
    Terms, ToMirror, ToOwner,
};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

#[test]
fn d8_a_welcome_with_an_endless_term_does_not_panic() {
    let mut mirror = Mirror::new(Incarnation(1), MirrorSettings::default(), ms(0));
    mirror.tick(ms(0));
    let epoch = Epoch { boot: Boot(1), number: 1 };
    let welcome = ToMirror::Welcome {
        epoch,
        incarnation: Incarnation(1),
        nonce: Nonce(1),
        term: Duration::MAX,
    };
    assert!(catch_unwind(AssertUnwindSafe(|| mirror.handle(welcome, ms(1)))).is_ok());
}

#[test]
fn d10_a_mirror_whose_retry_is_zero_has_something_to_wait_for() {
    let mut settings = MirrorSettings::default();
    settings.retry = Duration::ZERO;
    let mut mirror = Mirror::new(Incarnation(1), settings, ms(1));
    mirror.tick(ms(1));
    assert!(mirror.deadline() > Some(ms(1)), "`Leased::run` never yields then");
}

#[test]
fn d10_a_run_whose_retry_is_zero_yields() {
    let mut settings = MirrorSettings::default();
    settings.retry = Duration::ZERO;
    let asked = Arc::new(AtomicUsize::new(0));
    let clock = move || {
        assert!(asked.fetch_add(1, SeqCst) < 10_000, "it does not return to its executor");
        ms(1)
    };
    let leased = Leased::new(Mirror::new(Incarnation(1), settings, ms(1)), clock);
    let mut run = Box::pin(leased.run(|_| std::future::pending::<()>()));
    let polled = catch_unwind(AssertUnwindSafe(|| run.as_mut().now_or_never().is_none()));
    assert!(polled.is_ok());
}

#[test]
fn d10_two_processes_of_one_host_do_not_expel_each_other_without_a_pause() {
    let mut owner = Owner::new(Boot(1), Terms::new(TERM), Memory::New, ms(0)).unwrap();
    let mut mirrors =
        [1, 2].map(|of| Mirror::new(Incarnation(of), MirrorSettings::default(), ms(0)));
    // A millisecond each way, for ten terms.
    for at in 0..500 {
        for mirror in &mut mirrors {
            mirror.tick(ms(at * 2));
            while let Some(message) = mirror.next_message() {
                owner.handle(Host(1), message, ms(at * 2));
            }
        }
        owner.tick(ms(at * 2 + 1));
        while let Some((_, message)) = owner.next_message() {
            for mirror in &mut mirrors {
                mirror.handle(message.clone(), ms(at * 2 + 1));
                while let Some(decision) = mirror.next_decision() {
                    if matches!(decision, MirrorDecision::Stop { .. }) {
                        mirror.stopped(ms(at * 2 + 1));
                    }
                }
            }
        }
    }
    assert!(owner.counts().joins <= 100, "{} epochs in a second", owner.counts().joins);
}

#[test]
fn d10_a_late_copy_of_a_dead_processs_join_does_not_end_the_lease_of_the_living_one() {
    let mut owner = Owner::new(Boot(1), Terms::new(TERM), Memory::New, ms(0)).unwrap();
    let old = ToOwner::Join { incarnation: Incarnation(1), nonce: Nonce(1) };
    owner.handle(Host(1), old.clone(), ms(0));
    while owner.next_message().is_some() {}
    owner.tick(ms(150));
    let mut mirror = Mirror::new(Incarnation(2), MirrorSettings::default(), ms(150));
    let epoch = joined(&mut mirror, &mut owner, 1, ms(150));
    owner.handle(Host(1), old, ms(151));
    assert!(owner.is_live(epoch));
}

#[test]
fn d10_a_mirror_that_is_not_to_ask_again_can_be_made() {
    let mut settings = MirrorSettings::default();
    settings.retry = Duration::MAX;
    assert!(catch_unwind(move || Mirror::new(Incarnation(1), settings, ms(1))).is_ok());
}

#[test]
fn d8_a_window_without_a_bound_does_not_overflow() {
    let timer = Timer::default();
    let mut terms = Terms::new(TERM);
    terms.window = usize::MAX;
    let hub =
        Hub::new(Owner::new(Boot(1), terms, Memory::New, timer.now()).unwrap(), timer.clock());
    let _mirrors = hub.mirrors();
    let _link = hub.link(Host(1));
    let join = ToOwner::Join { incarnation: Incarnation(1), nonce: Nonce(1) };
    assert!(catch_unwind(AssertUnwindSafe(|| hub.handle(Host(1), join))).is_ok());
}

#[test]
fn d10_a_mirror_whose_answers_take_longer_than_its_term_does_not_ask_without_a_pause() {
    let mut owner =
        Owner::new(Boot(1), Terms::new(Duration::from_millis(1)), Memory::New, ms(0)).unwrap();
    let mut mirror = Mirror::new(Incarnation(1), MirrorSettings::default(), ms(0));
    mirror.tick(ms(0));
    let (mut asked, mut now) = (0, 0);
    // A millisecond each way, for a second, and `retry` is 20 ms.
    while now < 1_000 {
        now += 1;
        while let Some(message) = mirror.next_message() {
            asked += u64::from(matches!(message, ToOwner::Join { .. }));
            owner.handle(Host(1), message, ms(now));
        }
        owner.tick(ms(now));
        now += 1;
        while let Some((_, message)) = owner.next_message() {
            mirror.handle(message, ms(now));
        }
        mirror.tick(ms(now));
    }
    assert!(asked <= 60, "{asked} joins in a second, and each books an epoch");
}
