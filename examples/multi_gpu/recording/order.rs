//! The order in which calls take effect, within a file and among several.

use super::call::{Call, Op};
use std::collections::{HashMap, HashSet};

/// The calls of a file, and the task that it is of (`-ff`).
pub(super) type OfTask = (Option<u32>, Vec<Call>);

/// Puts calls in that take effect before others which were recorded earlier.
pub(super) fn put_early(calls: &mut Vec<Call>, mut early: Vec<(usize, Call)>) {
    early.sort_by_key(|(before, _)| *before);
    let mut from = calls.len();
    let nothing = || Call { pid: 0, at_ns: 0, line: 0, op: Op::Ended };
    calls.resize_with(from + early.len(), nothing);
    let mut to = calls.len();
    while let Some((before, call)) = early.pop() {
        while from > before {
            (from, to) = (from - 1, to - 1);
            calls.swap(from, to);
        }
        to -= 1;
        calls[to] = call;
    }
}

/// All files have times of one clock.
pub(super) fn by_time(origins: &[u64], files: Vec<OfTask>) -> Vec<Call> {
    let first = origins.iter().min().copied().unwrap_or(0);
    let mut all = Vec::with_capacity(files.iter().map(|(_, calls)| calls.len()).sum());
    for (origin, (_, calls)) in origins.iter().zip(files) {
        let shift = origin - first;
        all.extend(
            calls.into_iter().map(|call| Call { at_ns: call.at_ns.saturating_add(shift), ..call }),
        );
    }
    all.sort_by_key(|call| call.at_ns);
    all
}

/// Without times: a new task runs to its end where it is made.
pub(super) fn by_birth(files: Vec<OfTask>) -> Vec<Call> {
    let mut all = Vec::with_capacity(files.iter().map(|(_, calls)| calls.len()).sum());
    let born: HashSet<u32> = files.iter().flat_map(|(_, calls)| calls).filter_map(child).collect();
    let (later, first): (Vec<_>, Vec<_>) =
        files.into_iter().partition(|(of, _)| of.is_some_and(|of| born.contains(&of)));
    let mut waiting: HashMap<u32, Vec<Call>> = HashMap::new();
    let mut rest: Vec<u32> = Vec::new();
    for (of, calls) in later {
        let of = of.unwrap_or_default();
        rest.push(of);
        waiting.entry(of).or_default().extend(calls);
    }
    let mut run = |calls: Vec<Call>, waiting: &mut HashMap<u32, Vec<Call>>| {
        let mut under_way = vec![calls.into_iter()];
        while let Some(calls) = under_way.last_mut() {
            let Some(call) = calls.next() else {
                under_way.pop();
                continue;
            };
            let born = child(&call).and_then(|child| waiting.remove(&child));
            all.push(call);
            under_way.extend(born.map(Vec::into_iter));
        }
    };
    first.into_iter().for_each(|(_, calls)| run(calls, &mut waiting));
    for of in rest {
        if let Some(calls) = waiting.remove(&of) {
            run(calls, &mut waiting);
        }
    }
    all
}

fn child(call: &Call) -> Option<u32> {
    if let Op::Clone { child, .. } = call.op { Some(child) } else { None }
}
