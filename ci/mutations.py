#!/usr/bin/env python3
"""Breaks the library on purpose, one line at a time, and says which check notices.

Each mutation removes what some rule asks for, and is none that `ci/mutants.sh` makes: cargo-mutants
swaps operators, deletes `!` and match arms, and replaces the bodies of functions and the guards of
matches; of these, only what a model checker has to notice stands here, which `ci/mutants.sh` does
not run. `ci/mutations.py` tries all on a copy of the tree (about half a minute each),
`ci/mutations.py NAME ...` some; it exits with 1 if one survives. `ci/mutations.py --check` looks
only whether the code of each is there, once. tests/README.md has the table of the last run.
"""
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Name, file, the code as it is, the code as it is not to be; and the check that notices it, where
# all before it are known not to.
MUTATIONS = [
    ("leave out S6", "src/protocol.rs", "{ after_clash(current) }", "{ sequence }"),
    ("never mark a covered notifier", "src/protocol/own.rs", "self.word.store(word & !UNCOVERED, Ordering::Relaxed);\n            word | UNCOVERED", "word | UNCOVERED"),
    ("mark uncovered while another covers", "src/protocol/own.rs", "        } else if covering < COVER {", "            let _ = covering;\n        } else if true {\n            self.word.store(self.word.load(Ordering::Relaxed) | UNCOVERED, Ordering::Release);\n        } else if covering < COVER {"),
    ("one hit is marked uncovered while another covers it", "src/protocol/quick.rs", "        if covering == 0 {\n            self.word.store(self.word.load(Ordering::Relaxed) | UNCOVERED, Ordering::Release);\n        }\n        true", "        self.word.store(self.word.load(Ordering::Relaxed) | UNCOVERED, Ordering::Release);\n        true"),
    ("a sequence goes back", "src/protocol/own.rs", "(sequence.wrapping_sub(word | UNCOVERED)).cast_signed() > 0", "sequence != word"),
    ("two first passes set a sequence by a load and a store", "src/protocol/own.rs", "match self.word.compare_exchange_weak(word, sequence & !UNCOVERED, Ordering::Relaxed, Ordering::Relaxed) {\n                Ok(_) => return,\n                Err(other) => word = other,\n            }", "self.word.store(sequence & !UNCOVERED, Ordering::Relaxed);\n            word = sequence;", "loom"),
    ("insert forgets the active invalidations", "src/protocol.rs", "self.active.len() != 0 && self.insert_covered(member)", "false && self.insert_covered(member)"),
    ("insert forgets the active invalidations of the crowd", "src/protocol/active.rs", "if !self.crowd.is_empty() {\n            let Self", "if false {\n            let Self"),
    ("the last end leaves the sequence odd", "src/protocol.rs", "if live == 0 && *sequence % 2 == 1 {", "if false {"),
    ("what enters the crowd is ordered by its serial", "src/protocol/active.rs", "let (number, serial) = (self.entered, active.serial());", "let (number, serial) = (active.serial(), active.serial());"),
    ("what is parked is ordered by its serial", "src/engine/state/parked.rs", "parking.number = self.parked_ever;", "parking.number = ticket.serial();", "contract, debug build"),
    ("the last end in the crowd leaves the sequence odd", "src/protocol.rs", "make_even_if_idle(&mut self.sequence, self.active.occupancy.live);\n            report_uncovered(", "report_uncovered("),
    ("end before the passes are done", "src/engine/work/first_passes.rs", "match (passes.running() == 0, refused) {", "match (true, refused) {"),
    ("an end without hits forgets who was inserted meanwhile", "src/protocol/quick.rs", "            .filter(|active| active.is(id) && active.newcomers.is_empty())\n        else", "            .filter(|active| active.is(id))\n        else"),
    ("an end with one hit forgets who was inserted meanwhile", "src/protocol/quick.rs", "            .filter(|active| active.is(id) && active.newcomers.is_empty())?;", "            .filter(|active| active.is(id))?;"),
    ("an end with one hit does not see that somebody waits for it", "src/protocol/quick.rs", "if !covering.is_multiple_of(COVER) {", "if covering & CLOSED != 0 {"),
    ("an end does not count", "src/protocol/active.rs", "    occupancy.live -= 1;\n    occupancy.live\n", "    occupancy.live\n"),
    ("an end does not say that somebody waits for it", "src/protocol/quick.rs", "(marks & WATCHED != 0 || !active.newcomers.is_empty(), &mut active.extra)", "(!active.newcomers.is_empty(), &mut active.extra)"),
    ("nobody is told of the end that a reader waits for", "src/entry/rare.rs", "waiter.is_some() || self.own.is_marked(DETACHED)", "self.own.is_marked(DETACHED)"),
    ("nobody is told of the end that a dropped subscription waits for", "src/entry/marks.rs", "self.own.mark(DETACHED | WATCHED, true);", "self.own.mark(DETACHED, true);"),
    ("remove frees an entry that an invalidation covers", "src/engine/registration.rs", "let alone = !entry.own.is_covered() && !entry.is_held();", "let alone = !entry.is_held();"),
    ("remove frees an entry that is asked for its name", "src/engine/registration.rs", "let alone = !entry.own.is_covered() && !entry.is_held();", "let alone = !entry.own.is_covered();"),
    ("a budget's other first passes are forgotten when the passes are done at once", "src/engine/futures/invalidate.rs", "if !late && running.drive(1) && !running.is_deferred() {", "if !late && running.drive(1) {"),
    ("the poll before the passes are handed over is taken for the last one", "src/engine/futures/invalidate.rs", "if !late && running.drive(1) && !running.is_deferred() {", "running.drive(1);\n    if !running.is_deferred() {"),
    ("claim before the passes are done", "src/engine/state/stage.rs", "*self = if work.is_done() {", "*self = if work.is_done() || true {"),
    ("an abandoned invalidation ends at once", "src/engine/state/stage.rs", "Self::Parked { work, .. } => {\n                *self = Self::Parked { work, then: Then::End };\n                Next::Nothing\n            }", "Self::Parked { work, .. } => Next::End(work),"),
    ("an abandoned invalidation whose passes are being polled waits to be claimed", "src/engine/state/stage.rs", "*self = Self::Leased { then: Then::End };", "*self = Self::Leased { then: Then::Claim(Claim::default()) };"),
    ("passes that are to be driven after a drop are nobody's", "src/engine/state/parked.rs", "if matches!(next, Next::Drive) {\n            // Futures that", "if false {\n            // Futures that"),
    ("drop the wake-up of a pass that was woken while it was polled", "src/engine/state/parked.rs", "if woken || progress != Progress::Waiting ||", "if progress != Progress::Waiting ||"),
    ("drop the wake-up when the passes are done", "src/engine/state/parked.rs", "if woken || progress != Progress::Waiting ||", "if (woken && progress == Progress::Waiting) ||", "loom"),
    ("a wake-up between the poll and the park is ignored", "src/engine/state/parked.rs", "            ready |= woken;\n", "            let _ = woken;\n"),
    ("the owner is not woken", "src/engine/wakers.rs", "if let Some(owner) = owner {\n            owner.rouse();\n        }", "drop(owner);"),
    ("those who wait beside the owner are not woken", "src/engine/wakers.rs", "            if let Some(task) = bell.ring(Some(ticket)) {\n                task.rouse();\n            }", "            drop((bell, ticket));"),
    ("a full bell does not say that all are to be looked at", "src/engine/futures/wait.rs", "if let (true, Some(rung)) = (self.scanned, rung) {", "if let (true, rung) = (self.scanned, rung.unwrap_or_default()) {"),
    ("a bell keeps what it was rung for without a bound", "src/engine/wakers.rs", "rung.all = rung.tickets.len() == MOST_RUNG;", "rung.all = false;"),
    ("do not wake sleepers when there is something to help with", "src/engine/state/parked.rs", "self.most_parked = self.most_parked.max(self.parked.len());\n        for entry in asleep {\n            self.nudge(entry, Some(ticket), outbox);\n        }", "self.most_parked = self.most_parked.max(self.parked.len());\n        drop(asleep);"),
    ("do not wake readers at their moment", "src/engine/state/waiters.rs", "if let Some(task) = waiter.bell.ring(None) {\n            outbox.contents().tasks.push(task);\n        }\n        if waiter.wait_for", "drop(waiter.bell.ring(None));\n        if waiter.wait_for"),
    ("a reader does not take its moment", "src/engine/state/waiters.rs", "            waiter.fired = true;\n", ""),
    ("readers wait for others to drive", "src/engine/state/parked.rs", "parking.stage.lease().map_or(Help::Busy, Help::Leased)", "Help::Busy"),
    ("an invalidation whose caller unwinds is not given up", "src/engine/running.rs", "if !self.armed {", "if true {"),
    ("nothing ever lapses", "src/engine/state/claims.rs", "let Stage::Unclaimed { work, .. } = &parking.stage else { return false };", "let Stage::Unclaimed { work, .. } = &parking.stage else { return false };\n        if !work.hits.is_empty() {\n            return false;\n        }"),
    ("turns that are far apart are none", "src/engine/state/patience.rs", "if gap && !core::mem::replace(&mut entry.had_gap, true) {", "if gap {"),
    ("passes that were left at many are forgotten", "src/engine/work/passes/join.rs", "                    join.wakers.note_woken();\n", ""),
    ("a drain does not hear of what is parked later", "src/engine/state/parked.rs", "        for (_, bell) in &self.drains {", "        for (_, bell) in self.drains.iter().take(0) {"),
    ("a full bell forgets what is over", "src/engine/futures/wait.rs", "        self.backlog.extend(self.pending.keys().chain(self.unclaimed.keys()));\n", ""),
    ("time counts without turns for the others", "src/engine/state/patience.rs", "*looks >= entry.from + LOOKS", "*looks >= entry.from"),
    ("a gap gives nobody a turn", "src/engine/state/patience.rs", "                entry.from = self.looks;\n", ""),
    ("a clock that stands still stops patience", "src/engine/state/patience.rs", "None | Some(_) => self.skew = self.skew.saturating_add(tick),", "None => self.skew = self.skew.saturating_add(tick),\n            Some(_) => {}"),
    ("patience does not grow", "src/engine/state/patience.rs", "2u32.saturating_pow(lapses)", "1 + lapses.min(0)"),
    ("nobody takes the watch over", "src/engine/state/patience.rs", "self.watchman.is_none() || watch.unchanged > ABSENT", "self.watchman.is_none()"),
    ("everybody is the watchman", "src/engine/state/patience.rs", "self.watchman == Some(watch.me)\n    }\n\n    /// Decides how", "true\n    }\n\n    /// Decides how"),
    ("a watchman that goes keeps the watch", "src/engine/state/patience.rs", "if self.watchman == Some(watch.me) {", "if false {"),
    ("a waiter of any task is certain", "src/engine/state/claims.rs", " && parking.wakers.is_owned_by(waker)", " && (parking.wakers.is_owned_by(waker) || true)"),
    ("one poll of the same task is certain", "src/engine/state/claims.rs", "claim.is_some_and(|claim| polls >= Patience::certain_after(claim.lapses))", "claim.is_some()"),
    ("nothing is certain", "src/engine/state/claims.rs", "polls >= Patience::certain_after(claim.lapses)", "polls == u64::MAX && claim.lapses == 0"),
    ("remove does not wait for a call under way", "src/engine/registration.rs", "if calls { Quiet::Soon } else { Quiet::Yes }", "if calls { Quiet::Yes } else { Quiet::Yes }", "loom"),
    ("one whose first passes run is moved out of its place", "src/engine/running.rs", "host.flags.is_up(id) == Some(false);", "host.flags.is_up(id).is_some();"),
    ("one that was moved is believed to be in its place", "src/protocol/active.rs", "        self.id == id.0\n", "        self.id != 0 || id.0 == 0\n"),
    ("a claim of one that was moved lowers another one's flag", "src/protocol/active.rs", "is_some_and(|active| active.is(id)) {\n            id\n        } else {\n            id.in_crowd()\n        }", "is_some() { id } else { id.in_crowd() }"),
    ("remove does not wait for a call of the crowd", "src/protocol/active.rs", "if !any {", "if false {"),
    ("a call of the crowd is never over", "src/engine/calls.rs", "                active.extra.calls = false;\n", ""),
    ("remove sleeps when the last call ends between its two looks", "src/engine/futures/wait.rs", "Verdict::Over => {", "Verdict::Over if goal.queue().is_none() => {", "loom"),
    ("remove does not wait for a pass", "src/engine/registration.rs", "entry.pending.load(Ordering::Relaxed) != 0 || entry.is_held()", "entry.is_held()"),
    ("remove waits for a pass that was claimed", "src/engine/work/mod.rs", "for entry in self.0.drain() {\n            count_down(entry);\n        }", "self.0.clear();"),
    ("a pass that moves into the join is not known as listed", "src/engine/work/passes/pass.rs", "(self.future.take(), self.listed.take())", "(self.future.take(), self.listed.take().and(None))"),
    ("remove waits for guards", "src/engine/registration.rs", "if calls { Quiet::Soon } else { Quiet::Yes }", "if calls { Quiet::Soon } else { Quiet::No }"),
    ("a removed notifier is called", "src/engine/work/first_passes.rs", "if !entry.own.is_closed() {", "if true {"),
    ("a closed notifier can be installed for", "src/protocol/own.rs", "self.sequence() != sequence || self.is_closed()", "self.sequence() != sequence"),
    ("the word of a closed notifier does not say so", "src/protocol/own.rs", "if !self.is_covered() {", "if false {"),
    ("an end makes a closed notifier stable again", "src/protocol/own.rs", "if marks & CLOSED == 0 {", "if true {"),
    ("a refusal does not stop the first passes", "src/engine/work/first_passes.rs", "Ok(Called::Refused) => {\n                refused = true;\n                break;\n            }", "Ok(Called::Refused) => refused = true,"),
    ("a pass that has waited keeps its place in the budget", "src/engine/work/passes/join.rs", "                    if finished.budgeted {\n                        host.give_permit_back();\n                    }\n", ""),
    ("a pass that was ready at once keeps its place in the budget", "src/engine/work/passes.rs", "} else if record.budgeted {", "} else if false {"),
    ("a first pass that leaves no pass keeps its place in the budget", "src/engine/host.rs", "        if self.granted {\n            self.budget.give_back();", "        if false {\n            self.budget.give_back();"),
    ("the budget is not looked at", "src/engine/host.rs", "(used < self.limit).then_some(used + 1)", "Some(used + 1)"),
    ("a panic stops the other notifiers", "src/engine/work/first_passes.rs", "Err(panic) => passes.panic.note(&host.losses, Callback::FirstPass, panic),", "Err(panic) => {\n                passes.panic.note(&host.losses, Callback::FirstPass, panic);\n                break;\n            }"),
    ("a panic is lost", "src/engine/running.rs", "if !panic.is_some() {", "if true {"),
    ("a panic that panics when it is dropped is not caught", "src/foreign.rs", "if let Err(second) = keep(|_| drop(payload)) {", "drop(payload);\n        if let Err(second) = keep(|_| ()) {"),
    ("a panic that has no caller is not counted", "src/foreign.rs", "        self.count.fetch_add(1, Ordering::Relaxed);\n", ""),
    ("a memory keeps the hits of an invalidation that has ended", "src/engine/state/record.rs", "        work.hits.clear();\n", ""),
    ("remove leaves an entry that is asked for its name", "src/entry/rare.rs", "self.own.mark(HELD, holds != 0);", "self.own.mark(HELD, false);"),
    ("the memory of two former entries in one place", "src/entry.rs", "let empty = self.0.load(Ordering::Relaxed).is_null();", "let empty = true;"),
    ("the memory of a former entry goes to two", "src/entry.rs", "        self.0.store(ptr::null_mut(), Ordering::Relaxed);\n        // SAFETY: no other code has the memory. An entry", "        // SAFETY: no other code has the memory. An entry"),
    ("the memory of a former entry fits everything", "src/entry.rs", "vtable.layout } != Allocation::<N>::LAYOUT {", "vtable.layout.size() } == 0 {"),
    ("the memory that does not fit stays", "src/engine/registration.rs", "_unfit = self.spare.clear();", "_unfit = ();"),
    ("a removal that is dropped keeps a place for its memory", "src/engine/registration.rs", "                self.space.spare.cancel();\n", ""),
    ("a notifier that was moved out is still there", "src/entry.rs", "        self.own.mark(TAKEN, true);\n", ""),
    ("remove leaves an entry that an invalidation covers", "src/protocol/quick.rs", "let plain = self.covering.load(Ordering::Relaxed) == 0;", "let plain = true;"),
    ("an invalidation has the age of an earlier one", "src/engine/state/record.rs", "(serial == self.serial()).then_some(since)", "Some(since)"),
    ("a pass beyond the budget may be deferred", "src/event.rs", "Self(self.0 & !Self::MAY_DEFER)", "self"),
    ("a future that has panicked starts over", "src/engine/quick/poll.rs", "        (self.space, self.step) = (ByHand::empty(), ByHand::empty());\n        Some((space, begin(space, self.range, self.owner, self.terms)))\n", "        let begun = begin(space, self.range, self.owner, self.terms);\n        (self.space, self.step) = (ByHand::empty(), ByHand::empty());\n        Some((space, begun))\n"),
    ("release lets notifiers in", "src/engine/futures/invalidate.rs", "space.with(|state, _| state.released = true);", "let _ = space;"),
    ("the first pass does not set the sequence", "src/mirror/driver_lock.rs", "        invalidation.set_seq();\n        guard", "        guard"),
    ("a mapping is installed without the check", "src/mirror/driver_lock.rs", "subscription.read_retry(sequence) || !open(&guard)", "!open(&guard)"),
    ("a first pass that takes two driver locks is a false alarm", "src/protocol/own.rs", "short(_address) } else { SEVERAL };", "short(_address) } else { short(_address) };", "contract, debug build"),
    ("the check under a wrong lock is not caught", "src/protocol/own.rs", "noted == 0 || noted == SEVERAL || noted == short(_address)", "noted == 0 || noted == SEVERAL || _address != 0", "contract, debug build"),
    ("a cancelled delivery goes to the end of the queue", "src/mirror/delivery.rs", "post.queue.push_front(self.letter);", "post.queue.push_back(self.letter);"),
    ("a cancelled delivery is lost", "src/mirror/delivery.rs", "post.queue.push_front(self.letter);", ""),
    ("a dropped inbox leaves its passes pending", "src/mirror/inbox.rs", "                (letter.done, letter.queued) = (true, false);\n                tasks.extend", "                tasks.extend"),
    ("a stopped inbox installs", "src/mirror/inbox.rs", "            post.ended = true;\n        }\n        drop(self.subscription.close());", "        }"),
    ("a search counts one too few", "src/index/node.rs", "2 + below(c)", "1 + below(c)"),
    ("equal starts in reverse order", "src/index/leaf.rs", "count_at_most(&self.starts, false, start)", "self.starts.partition_point(|candidate| *candidate < start)"),
    ("a query leaves out an interval that ends where it begins", "src/index/leaf.rs", "value.range().last() >= range.start()", "value.range().last() > range.start()"),
    ("a single interval is hit by what lies before it", "src/index/leaf.rs", "0..usize::from(self.starts[0] <= range.last())", "0..1"),
    ("a query leaves out the last place of a leaf before the last", "src/index.rs", "leaf.first_candidate(range)..CAP", "leaf.first_candidate(range)..CAP - 1"),
    ("a query looks into the last of several leaves only", "src/index/hints.rs", "            if children.start < children.end {\n                return None;\n            }\n", ""),
    ("the span does not grow", "src/index.rs", "if range.start() < first || last < range.last() {", "if self.len == 1 {"),
    ("a slack that is too great for a number", "src/index/node.rs", "start.min(u64::MAX - 1).checked_sub(slack).map_or(0, |bound| bound + 1)", "start.checked_sub(slack).map_or(0, |bound| bound.saturating_add(1))"),
    ("a likely leaf is believed to hold what lies behind its end", "src/index/leaf.rs", "range.last() < self.bound\n            && range.start() >= self.starts[0]", "range.start() >= self.starts[0]"),
    ("a likely leaf is believed to hold what lies before its first interval", "src/index/leaf.rs", "            && range.start() >= self.starts[0]\n            && range.start() - self.starts[0] >= reach", ""),
    ("a likely leaf is believed without regard to what reaches into it", "src/index/leaf.rs", " && range.start() - self.starts[0] >= reach", ""),
    ("an insertion that reaches out of its leaf is not noted", "src/index.rs", "            if range.last() >= leaf.bound {", "            if false {"),
    ("a split does not note what reaches out of the lower leaf", "src/index.rs", "self.reach.max(reach).max(upper.reach())", "self.reach.max(upper.reach())"),
    ("a merge does not note what reaches out of the lower leaf", "src/index/remove.rs", "            self.reach = self.reach.max(self.leaves.at(a).reach());\n", ""),
    ("an insertion keeps from the nodes above that it reaches further", "src/index/leaf.rs", " && range.last() <= self.max_last", ""),
    ("an insertion goes into a likely leaf that ends before it", "src/index/leaf.rs", "range.start() < self.bound\n            && range.last() <= self.max_last", "range.last() <= self.max_last"),
    ("an insertion goes into a likely leaf that begins behind it", "src/index/leaf.rs", "range.start() >= self.starts[0]\n            && range.start() < self.bound\n            && range.last()", "range.start() < self.bound && range.last()"),
    ("a search does not note where it ended", "src/index/hints.rs", "        self.hints.set(range.last(), node);\n", ""),
    ("what is far apart is not scattered", "src/index/hints.rs", ".wrapping_mul(GOLDEN) >> self.fold", ""),
    ("the wide leaves say what is told apart", "src/index/hints.rs", "widths.len() / 4", "widths.len() * 3 / 4"),
    ("an index that is empty keeps how far something reached", "src/index/remove.rs", "(self.span, self.reach) = (NOWHERE, 0);", "self.span = NOWHERE;"),
    ("a leaf keeps the greatest last of what has gone", "src/index/leaf.rs", "if last == self.max_last {", "if false {"),
    ("a removal believes that nothing has moved", "src/index/remove.rs", "Some(known)\n                if known.values[at] == Some(value) && known.is_plain(value.range().last()) =>", "Some(known) if known.is_plain(value.range().last()) =>"),
    ("a slow removal believes that nothing has moved", "src/index/remove.rs", "is_some_and(|known| known.values[at] == Some(value))", "is_some()"),
    ("a removal leaves the slack as it is", "src/index/leaf.rs", "self.slack == 0 && last < self.bound", "last < self.bound"),
    ("a plain removal leaves a greatest last that reaches into other leaves", "src/index/leaf.rs", "self.slack == 0 && last < self.bound &&", "self.slack == 0 &&"),
    ("a leaf does not know where the next one begins after ascending insertion", "src/index.rs", "        leaf.bound = upper.starts[0];\n", ""),
    ("a leaf does not know where the next one begins after a split", "src/index/leaf.rs", "        self.bound = upper.starts[0];\n", ""),
    ("a leaf does not know where the next one begins after a merge", "src/index/leaf.rs", "        self.bound = upper.bound;\n", "        self.bound = UNUSED;\n"),
    ("a leaf becomes small and is not merged", "src/index/leaf.rs", " && self.len as usize > LOW\n", "\n"),
    ("a gap moves only one interval", "src/index/leaf.rs", "for _ in EASY_STEPS..steps {", "for _ in EASY_STEPS..steps.min(EASY_STEPS + 1) {"),
    ("a gap moves no more than one interval of the first two", "src/index/leaf.rs", "self.fill(at, if taken < steps {", "self.fill(at, if taken < steps.min(1) {"),
    ("the longest interval of a leaf is not noted", "src/index/leaf.rs", "if last - start > self.longest {", "if false {"),
    ("a merged leaf forgets the longest interval of the upper one", "src/index/leaf.rs", "        self.longest = self.longest.max(upper.longest);\n", ""),
    ("a merged leaf does not know what reached from one into the other", "src/index/leaf.rs", ".max(upper.slack).max(reach);", ".max(upper.slack);"),
    ("what is left of a leaf keeps its greatest last", "src/index/leaf.rs", "        self.find_max_last();\n    }\n}", "    }\n}"),
    ("the longest interval is not forgotten when it goes", "src/index/leaf.rs", "        self.longest =\n            (0..CAP).map(", "        let _ = (0..CAP).map("),
    ("read_begin does not ask the gate", "src/engine/futures/read.rs", "            && !self.space.is_shut()\n", "", "loom"),
    ("read_retry does not ask the gate", "src/subscription.rs", "let open = !space.gate.is_closed_now();", "let open = true;", "loom"),
    ("a reader looks at the gate before the memory", "src/engine/gate.rs", "            fence(Ordering::Acquire);\n            self.is_closed()", "            self.is_closed()", "loom"),
    ("free an entry that an invalidation covers", "src/entry/marks.rs", " && !self.own.is_covered()", ""),
    ("a fast reader does not see what came before the end", "src/protocol/own.rs", "let word = self.word.load(Ordering::Acquire);", "let word = self.word.load(Ordering::Relaxed);", "loom"),
    ("an end publishes nothing", "src/protocol/own.rs", "        if covering == 0 {\n            self.word.store(self.word.load(Ordering::Relaxed) | UNCOVERED, Ordering::Release);\n        } else", "        if covering == 0 {\n            self.word.store(self.word.load(Ordering::Relaxed) | UNCOVERED, Ordering::Relaxed);\n        } else", "loom"),
    ("an end with one hit publishes nothing", "src/protocol/quick.rs", "| UNCOVERED, Ordering::Release);\n        }\n        true", "| UNCOVERED, Ordering::Relaxed);\n        }\n        true", "loom"),
    ("an end of a watched notifier publishes nothing", "src/protocol/own.rs", "| UNCOVERED, Ordering::Release);\n        }\n        marks", "| UNCOVERED, Ordering::Relaxed);\n        }\n        marks", "loom"),
    ("first passes that are over publish nothing", "src/engine/calls.rs", "flag.store(false, Ordering::Release);", "flag.store(false, Ordering::Relaxed);", "loom"),
    ("remove does not see what the first passes did", "src/engine/calls.rs", "load(Ordering::Acquire)", "load(Ordering::Relaxed)", "loom"),
    ("the memory of a former entry is published without what was done with it", "src/entry.rs", "self.0.store(entry.0.as_ptr(), Ordering::Release);", "self.0.store(entry.0.as_ptr(), Ordering::Relaxed);", "loom"),
    ("the memory of a former entry is taken without what was done with it", "src/entry.rs", "NonNull::new(self.0.load(Ordering::Acquire))", "NonNull::new(self.0.load(Ordering::Relaxed))", "loom"),
    ("a reader that finds the gate open does not see what was invalidated", "src/engine/gate.rs", "self.word.load(Ordering::Acquire) << 1 != 0", "self.word.load(Ordering::Relaxed) << 1 != 0", "loom"),
    ("an orphan that is in use is not waited for", "src/cache/entry/guardian.rs", "Some(PassFuture::new(leaving.wait()))", "shelf.is_some().then(|| PassFuture::new(leaving.wait()))", "cache"),
    ("the last user of an orphan leaves it to nobody", "src/cache/entry/live.rs", "_ => self.entry.drive(),", "_ => {}", "cache"),
    ("an orphan keeps a space that nobody can reach", "src/cache/entry.rs", "        if !leaving.poke(POKES) && self.is_handed_back() {\n", "        if false && !leaving.poke(POKES) {\n", "cache"),
    ("what registers goes on when the last handle goes", "src/cache/entry.rs", "self.cancelled.store(true, Ordering::Release);", "", "cache"),
    ("a registration from before a change is published", "src/cache/entry.rs", "if valid && let Some(published) = live.take() {", "if (valid || true) && let Some(published) = live.take() {", "cache"),
    ("a caller that goes away leaves its attempt", "src/cache/entry.rs", "let unwanted = progress.claims == 0 && matches!", "let unwanted = progress.claims == 0 && false && matches!", "cache"),
    ("a deregistration that fails is given up", "src/cache/life.rs", "            Deregistered::Kept(kept) => handle = kept,\n", "            Deregistered::Kept(_) if failures >= AT_ONCE => break,\n            Deregistered::Kept(kept) => handle = kept,\n", "cache"),
    ("a deregistration that fails waits without waking", "src/cache/life.rs", "        cx.waker().wake_by_ref();\n", "        let _ = cx;\n", "cache"),
    ("what is registered is no longer watched", "src/cache/entry.rs", "        progress.watched = watched;\n", "        drop(progress);\n        drop(watched);\n", "cache on real memory"),
    ("what is taken away before the gate opens does not count as a collision", "src/cache/miss.rs", "tries.registered = (!outdated).then_some(entry);", "tries.registered = None::<Arc<Entry<D>>>;", "cache"),
    ("a panic of a device's poll is not caught", "src/cache/device.rs", "match keep(|_| this.future.as_mut().as_pin_mut().map(|future| future.poll(cx))) {", "match Ok::<_, Panic>(this.future.as_mut().as_pin_mut().map(|future| future.poll(cx))) {", "cache"),
    ("a panic that no caller is told of is not counted", "src/cache/device.rs", "        if !told {\n", "        if false && !told {\n", "cache"),
    ("a flush spares what was used last", "src/cache/table.rs", ".filter(|key| self.is_idle(*key))", ".filter(|key| self.used(*key) == 0 && self.is_idle(*key))", "cache"),
    ("a limit forgets what was in use", "src/cache/table.rs", "            self.look_at_busy();\n", "", "cache"),
    ("attempts of one start are published out of order", "src/cache/table.rs", "let at = self.next(key.slot());", "let at = key;", "cache"),
    ("who comes while a task is polled is not woken", "src/cache/task.rs", "let missed = state.woken && matches!(state.stage, Stage::Idle(_));", "let missed = false;", "cache"),
    ("a child of fork gives up what is its parent's", "src/cache/entry/live.rs", "        if self.entry.device.source.is_inert() {\n", "        if false {\n", "unit tests of the cache"),
    ("a gate that opens publishes nothing", "src/engine/gate.rs", "fetch_sub(closings.0, Ordering::AcqRel)", "fetch_sub(closings.0, Ordering::Relaxed)", "loom"),
    ("a part that is no part is added to the address", "src/source/mapping.rs", "let start = self.range().start().checked_add(part.start as u64)?;", "let start = self.range().start() + part.start as u64;", "source"),
    ("a mapping forgets that parts are protected", "src/source/sys.rs", "        self.plain = false;\n", "", "source"),
    ("a place that may be somebody else's is unmapped", "src/source/sys/moving.rs", "        if moved.is_err() {\n", "        if moved.is_err() {\n            self.given = from;\n", "source"),
    ("pieces that move leave their old address to others", "src/source/sys/moving.rs", "{ MremapFlags::empty() } else { MremapFlags::DONTUNMAP }", "{ MremapFlags::empty() } else { MremapFlags::empty() }", "source"),
    ("a move that is refused half way stays half made", "src/source/sys/moving.rs", "                self.move_back(place, &pieces[..at]);\n", "", "source"),
    ("nobody looks whether there is room for the pieces", "src/source/sys/moving.rs", "        room_for(pieces.len())?;\n", "", "source"),
    ("several mappings are taken for one", "src/source/sys/moving.rs", "matches!(error, io::Errno::NOMEM | io::Errno::AGAIN)", "true", "source"),
    ("the discarded pages of shared memory stay in the file", "src/source/sys.rs", "Backing::Shared(file) => file.punch(offset, len),", "Backing::Shared(_) => unsafe { mm::madvise(self.at(offset), len, mm::Advice::LinuxDontNeed) },", "source"),
    ("the file of shared memory keeps its length", "src/source/mapping/resize.rs", "            file.resize(len)?;\n", "            let _ = file;\n", "source"),
    ("a mapping changes before the invalidation", "src/source/mapping.rs", "let guard = invalidated(&space, self.process, self.range(), event).await?;\n        let changed = change(self.memory_mut());", "let range = self.range();\n        let changed = change(self.memory_mut());\n        let guard = invalidated(&space, self.process, range, event).await?;", "source"),
    ("a file is mapped beyond its end", "src/source/file.rs", "size.next_multiple_of(self.unit as u64) >= end", "size <= u64::MAX", "source"),
    ("M2: a watch whose memory is gone does not say so", "src/source/watches.rs", "!state.ended.swap(true, Ordering::AcqRel) && !state.quiet", "!state.quiet && !state.ended.load(Ordering::Acquire)", "source"),
    ("M2: each page is watched by itself", "src/source/uffd/watch.rs", "if self.armed.pieces() < EXACT {\n            return (asked, asked);", "if true {\n            return (asked, asked);", "source"),
    ("M2: watches use up all mappings", "src/source/uffd/watch.rs", "if self.armed.pieces() >= self.room &&", "if false &&", "source"),
    ("M3: the end of the reader is no invalidation", "src/source/uffd/reader.rs", "        self.inner.ring.overflow();\n        self.end_turn(closing);", "        self.end_turn(closing);", "source"),
    ("M3: the end of the deliveries is no invalidation", "src/source/uffd/deliveries.rs", "        self.inner.ring.overflow();\n", "", "source"),
    ("M3: a driver's panic goes on in who delivers", "src/engine/running.rs", "if is_late || unwinding() {", "let _ = is_late;\n        if unwinding() {", "source"),
    ("M3: no descriptor is kept in reserve", "src/source/uffd/reader.rs", "if self.reserve.take().is_some() {", "if false {", "source"),
    ("M4: a child of fork unwatches the parent's memory", "src/source/uffd/watch.rs", "        if !self.inner.is_forked() {\n            self.inner.unwatch(self.watched);", "        {\n            self.inner.unwatch(self.watched);", "source"),
    ("M4: a child of fork reads the parent's events", "src/source/uffd/reader.rs", "        self.inner.check()?;\n        self.let_readers_go_on();", "        self.let_readers_go_on();", "source"),
    ("M5: a discard is over when its event was read", "src/source/uffd/settle.rs", "        if self.pages.look().is_ready() {\n", "        if true || self.pages.look().is_ready() {\n", "source"),
    ("M5: the marks go with the watch of who is told", "src/source/uffd/watch.rs", "        Ok(Some(self.watches.add(range, true).0))\n", "        let held = self.watches.add(range, true).0;\n        self.watches.remove(held);\n        Ok(Some(held))\n", "source"),
    ("M5: who waits for pages holds up the invalidations of others", "src/source/uffd/settle.rs", "let ours = invalidation.is_tagged(self.0.owner);", "let ours = invalidation.is_tagged(self.0.owner) || true;", "source"),
    ("M3: the gate is opened when one of several deliveries has told all drivers", "src/source/uffd/deliveries.rs", "if starting.threads == 0 {\n                core::mem::take(&mut starting.closings)\n            } else {\n                Closings::default()\n            }", "core::mem::take(&mut starting.closings)", "source"),
    ("M4: a change of a mapping that a child drops takes the parent's locks", "src/source/mapping.rs", "move || process != std::process::id()", "move || process == 0", "source"),
    ("M5: what nobody watches any more is not waited for", "src/source/uffd/watch.rs", "            pagemap.mark(range)?;\n        }\n", "            pagemap.mark(range)?;\n        } else if self.watches.unwatched(range) == [range] {\n            return Ok(None);\n        }\n", "source"),
    ("M5: a range is not looked at again when its time was used up", "src/source/uffd/settle.rs", "                changed.extend(gone.then(|| suspect.pages.range()));\n", "", "source"),
    ("M7: a delivery does not say that it is late", "src/source/uffd/deliveries.rs", "self.space().invalidate_all(ranges, batch.event).late();", "self.space().invalidate_all(ranges, batch.event);", "source"),
    ("M7: a late invalidation waits for the budget", "src/engine/work/first_passes.rs", ".filter(|_| !request.terms.is_late())", "", "contract"),
    ("M8: forks are asked for although they are not permitted", "src/source/uffd/builder.rs", "Ok((agree(features)?, Fork::Keep, known))", "Ok((agree(features)?, Fork::Ignore, known))", "source"),
    ("M8: kept pages are in the child", "src/source/uffd/watch.rs", "if keep { uffd::keep_from_children(armed, true) } else { Ok(()) }", "{\n                let _ = keep;\n                Ok(())\n            }", "source"),
    ("a hole is taken for watched", "src/source/uffd/watch.rs", "            if !whole {\n", "            if false && !whole {\n", "source"),
    ("a thread that listens does not look at its flag again", "src/block.rs", "let listener = self.event.listen();\n                // A wake-up before `listen` has notified no listener, so look again.\n                if self.woken.swap(false, Ordering::AcqRel) {\n                    return;\n                }\n", "let listener = self.event.listen();\n", "loom"),
    ("two waits of a thread look like polls of one task", "src/block.rs", "if let Some(unshared) = Arc::get_mut(&mut sleeper) {\n                unshared.woken.store(false, Ordering::Relaxed);\n", "if Arc::strong_count(&sleeper) > 0 {\n                sleeper.woken.store(false, Ordering::Relaxed);\n"),
    ("a waiter of a timeline that registers does not look again", "src/timeline.rs", "        this.core.look_again();\n        if reached", "        if reached", "loom"),
    ("a waiter of a timeline that goes does not look again", "src/timeline.rs", "        self.core.look_again();\n        task\n", "        task\n", "loom"),
    ("a signal that had the lock does not look again", "src/timeline.rs", "batch.iter().flatten().for_each(|task| task.rouse());\n", "batch.iter().flatten().for_each(|task| task.rouse());\n            return;\n"),
    ("what came before a signal is not seen with it", "src/timeline.rs", "fetch_max(value, Ordering::AcqRel)", "fetch_max(value, Ordering::Relaxed)", "loom"),
    ("a range that a notifier overlaps beside another one hits it twice", "src/protocol/batch.rs", "member.range().start() <= last", "false"),
    ("of fewer notifiers than ranges all in the hull are hit", "src/protocol/batch.rs", "if !set.overlaps(member.range()) {", "if false {"),
    ("a reader looks at invalidations in whose gap it is", "src/engine/futures/wait.rs", "if state.protocol.active().overlaps(ticket, range) {", "if true {"),
    ("a notifier is told of ranges that are nothing to it", "src/engine/work/first_passes.rs", "let own = parts.overlapping(entry.range);", "let own = parts;"),
    ("changes that concern others are told of together", "src/source/uffd/batch.rs", "known.entry(concerned(range)).or_default()", "known.entry(Vec::new()).or_default()"),
    ("each change is told of alone", "src/source/uffd/batch.rs", "== (event, seen))", "== (event, seen) && false)"),
    ("a fence closes nothing", "src/engine/fence.rs", "        state.close(entry);\n", ""),
    ("passes that are parked when a fence comes stay", "src/engine/fence.rs", "leases.into_iter().for_each(Lease::cut);", "drop(leases);"),
    ("who parks passes after a fence is not told", "src/engine/state/parked.rs", "parking.note_done(now) || behind;", "parking.note_done(now); let _ = behind;"),
    ("who brings passes back after a fence does not look again", "src/engine/lease.rs", "        if behind {\n", "        if behind && false {\n", "contract"),
    ("a pass that fences its own notifier stays", "src/engine/lease.rs", "while passes.is_behind(host.fences.load(Ordering::Relaxed)) {", "while false {"),
    ("passes all of which were cut are taken for pending", "src/engine/work/passes/join.rs", "if self.running() == 0 { Progress::AllFinished } else { progress }", "progress", "contract"),
    ("a fence keeps what a pass had of the budget", "src/engine/work/passes/cut.rs", "        if pass.budgeted {\n            host.give_permit_back();\n        }\n        self.finished", "        self.finished"),
    ("a set prepares all again", "src/mirror/set.rs", "            drop(stale);\n", "            drop(stale);\n            set.prepared.iter_mut().for_each(|prepared| *prepared = None);\n"),
    ("what is stale is dropped under the lock", "src/mirror/set.rs", "stale.extend(prepared.take_if(collides));", "if prepared.take_if(collides).is_some() { stale.push(()); }"),
    ("forks in a row are taken for changes of the device", "src/cache/miss.rs", "let by =\n            by.filter(|(event, _)| !matches!(event, Event::ProtectionPage | Event::ProtectionVma));", "", "cache"),
    ("a set installs what has collided", "src/mirror/set.rs", "if set.prepared.iter().all(Option::is_some) {", "if true {"),
    ("two wake for a timeline at a time", "src/timeline.rs", "if self.waking.swap(true, Ordering::AcqRel) {", "if false {", "contract"),
    ("what was prepared stays when its range is hit", "src/mirror/set.rs", "prepared.take_if(|prepared| prepared.hit.poll(cx).is_ready())", "prepared.take_if(|_| false)", "contract"),
    ("a request holds buffers while it waits for another", "crates/shootdown-vhost/src/iotlb.rs", "                    drop(mappings);\n", "", "vhost"),
    ("translations survive a ring that stops", "crates/shootdown-vhost/src/session.rs", "            self.iotlb.forget_all();", "", "vhost"),
    ("an INVALIDATE waits for nothing", "crates/shootdown-vhost/src/in_flight.rs", "Ok(waits.then(|| PassFuture::new(gone.reached(1))))", "{ let _ = waits; Ok(None) }", "vhost"),
    ("an INVALIDATE forgets nothing", "crates/shootdown-vhost/src/iotlb.rs", "        self.forget_in_domain(range);\n        self.inval", "        self.inval", "vhost"),
    ("a refusal is taken for a translation", "crates/shootdown-vhost/src/iotlb/asked.rs", "        } else if self.refused.load(Ordering::Acquire) {", "        } else if false {", "vhost"),
    ("SET_MEM_TABLE is answered at once", "crates/shootdown-vhost/src/session/handle.rs", "self.reply(&message, Due::Quiet(quiet, answered));", "drop(quiet); let _ = answered; self.reply(&message, Due::Now(vec![0; 8]));", "vhost"),
    ("an INVALIDATE forgets the rest of a translation", "crates/shootdown-vhost/src/iotlb/table.rs", "if self.by_start.len() < MOST {", "if false {", "vhost"),
    ("GET_VRING_BASE is answered at once", "crates/shootdown-vhost/src/session.rs", "Due::Base(index, set) => match queues[*index].base() {", "Due::Base(index, set) => match Some(queues[*index].base_now()) {", "vhost"),
    ("the used ring is told before the buffers are let go", "crates/shootdown-vhost/src/ring.rs", "        drop((readable, writable));\n        shared.push(entry, head, len).await", "        let told = shared.push(entry, head, len).await;\n        drop((readable, writable));\n        told", "vhost"),
    ("a ring that stops waits for translations", "crates/shootdown-vhost/src/ring.rs", "select(put, self.stop.reached(HURRY))", "select(put, Timeline::new().reached(HURRY))", "vhost"),
    ("a mapping looks before it is registered", "crates/shootdown-vhost/src/iotlb.rs", "        let (mut mapping, range) = self.register(want).ok()?;\n        let found = self.0.table.read().look_up(range, want.access, mapping.parts_mut());\n", "        let mut parts = Parts::default();\n        let found = self.0.table.read().look_up(want.range().ok()?, want.access, &mut parts);\n        let (mut mapping, _) = self.register(want).ok()?;\n        *mapping.parts_mut() = parts;\n", "vhost, loom"),
    ("a check does not ask the lease", "src/engine/mod.rs", "!(open || self.is_let_in())", "!(open || true)", "leases"),
    ("a reader does not ask the lease", "src/engine/gate.rs", "self.gate.is_closed() && !self.is_let_in()", "self.gate.has_closings()", "leases"),
    ("a lease that is valid again while a reader enrols is missed", "src/engine/gate.rs", "polled.is_pending() && !valid && self.is_leased()", "false", "leases"),
    ("the cache does not ask the lease", "src/cache/core.rs", "        if self.space.shared().is_shut() {\n            return None;\n        }\n", "", "leases"),
    ("a host of a tree grants without a lease of its own", "crates/shootdown-lease/src/engine/hub.rs", "Some(Box::new(move || above.has_lease()))", "{ let _ = above; None }", "hosts"),
    ("what a link has lost is sent again by time only", "crates/shootdown-lease/src/engine/hub.rs", "            state.owner.connected(host, now);\n", "", "hosts"),
    ("a host that reads nothing has everything kept", "crates/shootdown-lease/src/engine/hub.rs", "outbox.queue.len() < room", "{ let _ = room; true } || outbox.queue.is_empty()", "hosts"),
    ("a flush counts for whichever epoch there is", "crates/shootdown-lease/src/mirror.rs", "if !self.is_in(epoch) || !self.working", "if !self.working", "hosts"),
    ("a driver's panic is taken for a flush", "crates/shootdown-lease/src/engine/leased.rs", "state.mirror.give_up(epoch, now);", "state.mirror.invalidated(epoch, invalidation, now);", "hosts"),
    ("what was left is not said when the link is made anew", "crates/shootdown-lease/src/engine/leased.rs", "state.outgoing.retain(|message| matches!(message, ToOwner::Left { .. }));", "state.outgoing.clear();", "hosts"),
    ("who waits for the lease is not woken", "crates/shootdown-lease/src/engine/leased/state.rs", "                    drop(space.pause());\n", "                    let _ = &space;\n", "hosts"),
    ("what is not shared is served", "crates/shootdown-lease/src/owner/fetches.rs", "        if !served {", "        if !served && false {", "hosts"),
    ("a late join is a new one", "crates/shootdown-lease/src/owner/books.rs", "        if self.is_late(from, incarnation, nonce) {", "        if false && self.is_late(from, incarnation, nonce) {", "hosts"),
    ("timers of those who have gone stay", "crates/shootdown-lease/src/owner/books.rs", "        self.timers.remove(&(member.expiry, Timer::Expiry(number)));\n", "", "hosts"),
    ("the way up ends before what was granted is given back", "crates/shootdown-lease/src/mirror/lease.rs", "            State::Out { .. } => self.state = State::Over,\n", "            State::Out { .. } | State::Joining { .. } => self.state = State::Over,\n", "hosts"),
    ("changes that have happened cover who comes later", "src/protocol/active.rs", "&& sets.get(&serial).is_none_or(|set| !set.is_past)", "", "unit and property tests"),
]

# Cheap ones first; the first that fails is named. With the seconds after which it hangs, the build
# included.
CHECKS = [
    ("unit and property tests", "cargo test --release --lib", 75),
    ("contract", "cargo test --release --test contract", 75),
    ("conformance", "cargo test --release --test conformance", 75),
    ("fuzz", "cargo test --release --test fuzz", 75),
    ("allocations", "cargo test --release --test allocations", 75),
    ("loom", "ci/loom.sh", 300),
    ("shuttle", "ci/shuttle.sh", 300),
    ("contract, debug build", "cargo test --test contract", 150),
    ("futurelock", "cargo test --release --test futurelock", 75),
    ("source", "cargo test --all-features --test source", 300),
    ("soak", "cargo test --release --test soak", 75),
    ("soak on real memory", "cargo test --release --all-features --test memory_soak", 150),
    ("unit tests of the cache", "cargo test --features cache,userfaultfd --lib cache", 150),
    ("cache", "cargo test --all-features --test cache", 150),
    ("cache on real memory", "cargo test --all-features --test source -- m1_", 150),
    ("AddressSanitizer", "ci/asan.sh", 300),
    ("vhost", "cargo test --release -p shootdown-vhost --lib --test pitfalls --test schedules", 200),
    ("vhost, loom", "ci/vhost.sh loom", 300),
    ("leases", "cargo test --all-features --test contract --test cache r4_", 200),
    ("hosts", "cargo test --release -p shootdown-lease --all-features --test engine --test owner --test mirror --test hard_cases", 200),
]


def places(code, text):
    """Where the code stands in the text, however it is broken into lines."""
    tokens = re.findall(r"\w+|[^\w\s]", code)
    pattern = r"\s*".join((r",?\s*" if token in ")]}" else "") + re.escape(token) for token in tokens)
    lead = re.match(r"\s*", code).group()
    trail = re.search(r"\s*$", code).group() if code.strip() else ""
    return list(re.finditer(re.escape(lead) + pattern + re.escape(trail), text))


def mutated(name, file, code, mutant, text):
    """The text with the mutation."""
    found = places(code, text)
    if len(found) != 1:
        sys.exit(f"{name}: its code stands {len(found)} times in {file}; bring ci/mutations.py up to date")
    return text[: found[0].start()] + mutant + text[found[0].end() :]


def run(command, tree, seconds):
    """Whether the check passed, and the name of the test that failed."""
    # What is built of the copy would be taken for what is built here.
    env = {**os.environ, "CARGO_TARGET_DIR": str(tree / "target")}
    try:
        done = subprocess.run(["timeout", str(seconds), *command.split()], cwd=tree, env=env, capture_output=True, text=True)
    except OSError as error:
        sys.exit(f"{command}: {error}")
    if done.returncode == 0:
        return True, ""
    if done.returncode == 124:
        return False, "hangs"
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("test ") and "FAILED" in line]
    if not failed and "error: could not compile" in done.stderr:
        sys.exit(f"does not compile:\n{done.stderr[-2000:]}")
    return False, failed[0] if failed else "aborts"


def main():
    wanted = sys.argv[1:]
    if wanted == ["--check"]:
        for name, file, code, mutant, *_ in MUTATIONS:
            mutated(name, file, code, mutant, (ROOT / file).read_text())
        return
    survivors = []
    sound = set()
    with tempfile.TemporaryDirectory() as temporary:
        tree = pathlib.Path(temporary) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns("target", ".git"))
        print("| mutation | caught by | test |\n| --- | --- | --- |", flush=True)
        for name, file, code, mutant, *of in MUTATIONS:
            if wanted and name not in wanted:
                continue
            path = tree / file
            original = path.read_text()
            broken = mutated(name, file, code, mutant, original)
            checks = [check for check, _, _ in CHECKS]
            first = checks.index(of[0]) if of else 0
            for check, command, seconds in CHECKS[first:]:
                if check not in sound:
                    # Built once, and known to pass on the library as it is.
                    passed, failed = run(command, tree, 900)
                    if not passed:
                        sys.exit(f"{command} fails without a mutation: {failed}")
                    sound.add(check)
                path.write_text(broken)
                passed, failed = run(command, tree, seconds)
                path.write_text(original)
                if not passed:
                    print(f"| {name} | {check} | `{failed}` |", flush=True)
                    break
            else:
                survivors.append(name)
                print(f"| {name} | **nothing** | |", flush=True)
    if survivors:
        sys.exit(f"{len(survivors)} mutations survived")


if __name__ == "__main__":
    main()
