#!/usr/bin/env python3
"""Breaks the library on purpose, one line at a time, and says which check notices.

Each mutation removes what some rule asks for. `ci/mutations.py` tries all of them on a copy of the tree (about half a minute each),
`ci/mutations.py NAME ...` some; it exits with 1 if one survives. tests/README.md has the table of the last run.
"""
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Name, file, the code as it is, the code as it is not to be.
MUTATIONS = [
    ("leave out S6", "src/protocol.rs", "{ after_clash(current) }", "{ sequence }"),
    ("never mark a covered notifier", "src/protocol/own.rs", "self.word.store(word & !UNCOVERED, Ordering::Release);\n            word | UNCOVERED", "word | UNCOVERED"),
    ("mark uncovered while another covers", "src/protocol/own.rs", "        } else if covering < COVER {", "            let _ = covering;\n        } else if true {\n            self.word.store(self.word.load(Ordering::Relaxed) | UNCOVERED, Ordering::Release);\n        } else if covering < COVER {"),
    ("one hit is marked uncovered while another covers it", "src/protocol/own.rs", "        if covering == 0 {\n            self.word.store(self.word.load(Ordering::Relaxed) | UNCOVERED, Ordering::Release);\n        }\n        true", "        self.word.store(self.word.load(Ordering::Relaxed) | UNCOVERED, Ordering::Release);\n        true"),
    ("a sequence goes back", "src/protocol/own.rs", "(sequence.wrapping_sub(word | UNCOVERED)).cast_signed() > 0", "sequence != word"),
    ("insert forgets the active invalidations", "src/protocol.rs", "if active.range.overlaps(member.range()) {", "if false {"),
    ("the last end leaves the sequence odd", "src/protocol.rs", "if live == 0 && *sequence % 2 == 1 {", "if false {"),
    ("end before the passes are done", "src/engine/start.rs", "if passes.running() == 0 {", "if true {"),
    ("an end without hits forgets who was inserted meanwhile", "src/protocol.rs", "let Some(active) = places.get_mut(id as usize).filter(|active| active.late.is_empty()) else", "let Some(active) = places.get_mut(id as usize) else"),
    ("an end with one hit forgets who was inserted meanwhile", "src/protocol.rs", "let active = places.get_mut(id as usize).filter(|active| active.late.is_empty())?;", "let active = places.get_mut(id as usize)?;"),
    ("an end with one hit does not see that somebody waits for it", "src/protocol/own.rs", "if !covering.is_multiple_of(COVER) {", "if covering & CLOSED != 0 {"),
    ("an end does not count", "src/protocol.rs", "    heads.live -= 1;\n", ""),
    ("an end does not say that somebody waits for it", "src/protocol.rs", "(marks & WATCHED != 0 || !active.late.is_empty(), &mut active.extra)", "(!active.late.is_empty(), &mut active.extra)"),
    ("nobody is told of the end that a reader waits for", "src/entry.rs", "waiter.is_some() || self.own.is_marked(DETACHED)", "self.own.is_marked(DETACHED)"),
    ("nobody is told of the end that a dropped subscription waits for", "src/entry.rs", "self.own.mark(DETACHED | WATCHED, true);", "self.own.mark(DETACHED, true);"),
    ("remove frees an entry that an invalidation covers", "src/engine/remove.rs", "let alone = !entry.own.is_covered() && !entry.is_held();", "let alone = !entry.is_held();"),
    ("remove frees an entry that is asked for its name", "src/engine/remove.rs", "let alone = !entry.own.is_covered() && !entry.is_held();", "let alone = !entry.own.is_covered();"),
    ("a budget's other first passes are forgotten when the passes are done at once", "src/engine/invalidate.rs", "scratch.passes().running() == 0 && scratch.resume_at.is_none()", "scratch.passes().running() == 0"),
    ("the poll before the passes are handed over is taken for the last one", "src/engine/invalidate.rs", "if scratch.passes().running() == 0 && scratch.resume_at.is_none()", "if scratch.resume_at.is_none()"),
    ("claim before the passes are done", "src/engine/invalidate.rs", "if !pending.done {\n            return pending.scratch.take()", "if false {\n            return pending.scratch.take()"),
    ("an abandoned invalidation ends at once", "src/engine/pending.rs", "        if !pending.done {\n            return;\n        }", ""),
    ("drop the wake-up of a pass that was woken while it was polled", "src/engine/pending.rs", "(woken || progress != Progress::Waiting).then", "(progress != Progress::Waiting).then"),
    ("drop the wake-up when the passes are done", "src/engine/pending.rs", "(woken || progress != Progress::Waiting).then", "(woken && progress == Progress::Waiting).then"),
    ("do not wake sleepers when there is something to help with", "src/engine/pending.rs", "        for entry in asleep {\n            self.nudge(entry, after);\n        }", "        drop(asleep);"),
    ("do not wake readers at their moment", "src/engine/waiters.rs", "        after.work().wakers.extend(waiter.waker.take());\n        if waiter.wait_for", "        drop(waiter.waker.take());\n        if waiter.wait_for"),
    ("a reader does not take its moment", "src/engine/waiters.rs", "            waiter.fired = true;\n", ""),
    ("readers wait for others to drive", "src/engine/wait.rs", "for job in jobs {\n                progress |= space.work(job, true);\n            }", "space.with(|state, _| {\n                for job in jobs {\n                    let scratch = job.scratch;\n                    if let Some(pending) = state.pending_mut(job.unclaimed) {\n                        pending.scratch = Some(scratch);\n                    }\n                }\n            });\n            progress |= false;"),
    ("nothing ever lapses", "src/engine/wait.rs", "yields > pending.patience", "yields == u32::MAX"),
    ("remove does not wait for a call under way", "src/engine/remove.rs", "if self.protocol.active().iter().any(calls) { Look::Soon } else { Look::Ready }", "if self.protocol.active().iter().any(calls) { Look::Ready } else { Look::Ready }"),
    ("remove does not wait for a pass", "src/engine/remove.rs", "entry.pending.load(Ordering::Relaxed) != 0 ||", "false ||"),
    ("remove waits for guards", "src/engine/remove.rs", "if self.protocol.active().iter().any(calls) { Look::Soon } else { Look::Ready }", "if self.protocol.active().iter().any(calls) { Look::Soon } else { Look::Wait }"),
    ("a removed notifier is called", "src/engine/start.rs", "if !entry.own.is_closed() {", "if true {"),
    ("a closed notifier can be installed for", "src/protocol/own.rs", "self.sequence() != sequence || self.is_closed()", "self.sequence() != sequence"),
    ("the word of a closed notifier does not say so", "src/protocol/own.rs", "if !self.is_covered() {", "if false {"),
    ("an end makes a closed notifier stable again", "src/protocol/own.rs", "if marks & CLOSED == 0 {", "if true {"),
    ("a refusal does not stop the first passes", "src/engine/start.rs", "Answer::WouldBlock if !invalidation.blockable() => return Called::Refused,", "Answer::WouldBlock if !invalidation.blockable() => passes.refused = true,"),
    ("the budget is not given back", "src/engine/mod.rs", "self.used.fetch_sub(1, Ordering::Relaxed);", ""),
    ("the budget is not looked at", "src/engine/mod.rs", "(used < self.limit).then_some(used + 1)", "Some(used + 1)"),
    ("a panic stops the other notifiers", "src/engine/start.rs", "Err(panic) => passes.keep_panic(panic),", "Err(panic) => {\n                passes.keep_panic(panic);\n                break None;\n            }"),
    ("a panic is lost", "src/engine/invalidate.rs", "if scratch.passes().panic.is_some() { fail(space, id, scratch) } else { (id, Some(scratch)) }", "(id, Some(scratch))"),
    ("a memory keeps the hits of an invalidation that has ended", "src/engine/mod.rs", "        scratch.hits.clear();\n", ""),
    ("remove leaves an entry that is asked for its name", "src/entry.rs", "self.own.mark(HELD, holds != 0);", "self.own.mark(HELD, false);"),
    ("the memory of two former entries in one place", "src/entry.rs", "let empty = self.0.load(Ordering::Relaxed).is_null();", "let empty = true;"),
    ("the memory of a former entry goes to two", "src/entry.rs", "        self.0.store(ptr::null_mut(), Ordering::Relaxed);\n        // SAFETY: nobody else has the memory any more; an entry", "        // SAFETY: nobody else has the memory any more; an entry"),
    ("the memory of a former entry fits everything", "src/entry.rs", "calls.layout } != Allocation::<N>::LAYOUT {", "calls.layout.size() } == 0 {"),
    ("the memory that does not fit stays", "src/engine/remove.rs", "_unfit = self.spare.clear();", "_unfit = ();"),
    ("a removal that is dropped keeps a place for its memory", "src/engine/remove.rs", "                self.space.spare.cancel();\n", ""),
    ("a notifier that was moved out is still there", "src/entry.rs", "        self.own.mark(TAKEN, true);\n", ""),
    ("remove leaves an entry that an invalidation covers", "src/protocol/own.rs", "let plain = self.covering.load(Ordering::Relaxed) == 0;", "let plain = true;"),
    ("an invalidation has the age of an earlier one", "src/engine/mod.rs", "(serial == self.serial()).then_some(since)", "Some(since)"),
    ("a pass beyond the budget may be deferred", "src/event.rs", "Self(self.0 & !Self::MAY_DEFER)", "self"),
    ("a future that has panicked starts over", "src/engine/invalidate.rs", "            (this.space, this.step) = (ManuallyDrop::new(None), ManuallyDrop::new(Step::Done));\n            let (id, scratch) = begin(space, this.range, this.owner, this.terms);\n", "            let (id, scratch) = begin(space, this.range, this.owner, this.terms);\n            (this.space, this.step) = (ManuallyDrop::new(None), ManuallyDrop::new(Step::Done));\n"),
    ("release lets notifiers in", "src/engine/invalidate.rs", "space.with(|state, _| state.released = true);", "let _ = space;"),
    ("the first pass does not set the sequence", "src/mirror/driver_lock.rs", "        invalidation.set_seq();\n        guard", "        guard"),
    ("a mapping is installed without the check", "src/mirror/driver_lock.rs", "if subscription.read_retry(sequence) { Err(Collision) }", "if false { Err(Collision) }"),
    ("a cancelled delivery goes to the end of the queue", "src/mirror/inbox.rs", "desk.queue.push_front(self.letter);", "desk.queue.push_back(self.letter);"),
    ("a cancelled delivery is lost", "src/mirror/inbox.rs", "desk.queue.push_front(self.letter);", ""),
    ("a dropped inbox leaves its passes pending", "src/mirror/inbox.rs", "            letter.done = true;\n            wakers.extend", "            wakers.extend"),
    ("a search counts one too few", "src/index/node.rs", "2 + below(c)", "1 + below(c)"),
    ("equal starts in reverse order", "src/index/leaf.rs", "count_at_most(&self.starts, false, start)", "self.starts.partition_point(|candidate| *candidate < start)"),
    ("a query leaves out an interval that ends where it begins", "src/index/leaf.rs", "value.range().last() >= range.start()", "value.range().last() > range.start()"),
    ("a single interval is hit by what lies before it", "src/index/leaf.rs", "0..usize::from(self.starts[0] <= range.last())", "0..1"),
    ("a query leaves out the last place of a leaf before the last", "src/index.rs", "leaf.first_candidate(range)..CAP", "leaf.first_candidate(range)..CAP - 1"),
    ("a query looks into the last of several leaves only", "src/index/hints.rs", "            if children.start < children.end {\n                return None;\n            }\n", ""),
    ("a node's slack does not grow", "src/index/leaf.rs", "self.slack = self.slack.max(self.overhang(at));", ""),
    ("the span does not grow", "src/index.rs", "if range.start() < first || range.last() > last {", "if self.len == 1 {"),
    ("a slack that is too great for a number", "src/index/node.rs", "start.min(u64::MAX - 1).checked_sub(slack).map_or(0, |bound| bound + 1)", "start.checked_sub(slack).map_or(0, |bound| bound.saturating_add(1))"),
    ("a likely leaf is believed to hold what lies behind its end", "src/index/leaf.rs", "range.last() < self.bound && range.start() >= self.starts[0]", "range.start() >= self.starts[0]"),
    ("a likely leaf is believed to hold what lies before its first interval", "src/index/leaf.rs", " && range.start() >= self.starts[0] && range.start() - self.starts[0] >= reach", ""),
    ("a likely leaf is believed without regard to what reaches into it", "src/index/leaf.rs", " && range.start() - self.starts[0] >= reach", ""),
    ("an insertion that reaches out of its leaf is not noted", "src/index.rs", "            if range.last() >= leaf.bound {", "            if false {"),
    ("a split does not note what reaches out of the lower leaf", "src/index.rs", "self.reach.max(reach).max(upper.reach())", "self.reach.max(upper.reach())"),
    ("a merge does not note what reaches out of the lower leaf", "src/index.rs", "            self.reach = self.reach.max(self.leaves.at(a).reach());\n", ""),
    ("an insertion keeps from the nodes above that it reaches further", "src/index/leaf.rs", " && range.last() <= self.max_last", ""),
    ("an insertion goes into a likely leaf that ends before it", "src/index/leaf.rs", "range.start() < self.bound && range.last() <= self.max_last", "range.last() <= self.max_last"),
    ("an insertion goes into a likely leaf that begins behind it", "src/index/leaf.rs", "range.start() >= self.starts[0] && range.start() < self.bound && range.last()", "range.start() < self.bound && range.last()"),
    ("a search does not note where it ended", "src/index/hints.rs", "        self.hints.set(range.last(), node);\n", ""),
    ("what is far apart is not scattered", "src/index/hints.rs", ".wrapping_mul(GOLDEN) >> self.fold", ""),
    ("the wide leaves say what is told apart", "src/index/hints.rs", "widths.len() / 4", "widths.len() * 3 / 4"),
    ("an index that is empty keeps how far something reached", "src/index.rs", "(self.span, self.reach) = (NOWHERE, 0);", "self.span = NOWHERE;"),
    ("a leaf keeps the greatest last of what has gone", "src/index/leaf.rs", "if last == self.max_last {", "if false {"),
    ("a removal believes that nothing has moved", "src/index.rs", "Some(known) if known.values[at] == Some(value) && known.is_plain(value.range().last()) =>", "Some(known) if known.is_plain(value.range().last()) =>"),
    ("a slow removal believes that nothing has moved", "src/index.rs", "is_some_and(|known| known.values[at] == Some(value))", "is_some()"),
    ("a removal leaves the slack as it is", "src/index/leaf.rs", "self.slack == 0 && last < self.bound", "last < self.bound"),
    ("a plain removal leaves a greatest last that reaches into other leaves", "src/index/leaf.rs", "self.slack == 0 && last < self.bound &&", "self.slack == 0 &&"),
    ("a leaf does not know where the next one begins after ascending insertion", "src/index.rs", "        leaf.bound = upper.starts[0];\n", ""),
    ("a leaf does not know where the next one begins after a split", "src/index/leaf.rs", "        self.bound = upper.starts[0];\n", ""),
    ("a leaf does not know where the next one begins after a merge", "src/index/leaf.rs", "        self.bound = upper.bound;\n", "        self.bound = UNUSED;\n"),
    ("a leaf becomes small and is not merged", "src/index/leaf.rs", " && self.len as usize > LOW\n", "\n"),
    ("a gap moves only one interval", "src/index/leaf.rs", "for _ in EASY_STEPS..steps {", "for _ in EASY_STEPS..steps.min(EASY_STEPS + 1) {"),
    ("a gap moves no more than one interval of the first two", "src/index/leaf.rs", "self.fill(at, if taken < steps {", "self.fill(at, if taken < steps.min(1) {"),
    ("the longest interval of a leaf is not noted", "src/index/leaf.rs", "if last - start > self.longest {", "if false {"),
    ("a leaf's longest interval is taken for shorter than it is", "src/index/leaf.rs", "start - own > self.longest", "start - own >= self.longest"),
    ("a merged leaf forgets the longest interval of the upper one", "src/index/leaf.rs", "        self.longest = self.longest.max(upper.longest);\n", ""),
    ("a merged leaf does not know what reached from one into the other", "src/index/leaf.rs", ".max(upper.slack).max(reach);", ".max(upper.slack);"),
    ("what is left of a leaf keeps its greatest last", "src/index/leaf.rs", "        self.find_max_last();\n    }\n}", "    }\n}"),
    ("the longest interval is not forgotten when it goes", "src/index/leaf.rs", "        self.longest = (0..CAP).map(", "        let _ = (0..CAP).map("),
    ("read_begin does not ask the gate", "src/engine/wait.rs", "            && !self.space.gate.is_closed()\n", ""),
    ("read_retry does not ask the gate", "src/subscription.rs", "let open = !space.gate.is_closed_now();", "let open = true;"),
    ("a reader looks at the gate before the memory", "src/engine/gate.rs", "            fence(Ordering::Acquire);\n", ""),
    ("free an entry that an invalidation covers", "src/entry.rs", " && !self.own.is_covered()", ""),
]

# Cheap ones first; the first that fails is named.
CHECKS = [
    ("unit and property tests", "cargo test --release --lib"),
    ("contract", "cargo test --release --test contract"),
    ("conformance", "cargo test --release --test conformance"),
    ("fuzz", "cargo test --release --test fuzz"),
    ("allocations", "cargo test --release --test allocations"),
    ("loom", "ci/loom.sh"),
    ("shuttle", "ci/shuttle.sh"),
    ("futurelock", "cargo test --release --test futurelock"),
    ("soak", "cargo test --release --test soak"),
    ("AddressSanitizer", "ci/asan.sh"),
]


def run(command, tree, seconds):
    """Whether the check passed, and the name of the test that failed."""
    try:
        done = subprocess.run(["timeout", str(seconds), *command.split()], cwd=tree, capture_output=True, text=True)
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
    survivors = []
    sound = set()
    with tempfile.TemporaryDirectory() as temporary:
        tree = pathlib.Path(temporary) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns("target", ".git"))
        print("| mutation | caught by | test |\n| --- | --- | --- |", flush=True)
        for name, file, code, mutant in MUTATIONS:
            if wanted and name not in wanted:
                continue
            path = tree / file
            original = path.read_text()
            if original.count(code) != 1:
                sys.exit(f"{name}: its code stands {original.count(code)} times in {file}; bring ci/mutations.py up to date")
            for check, command in CHECKS:
                if check not in sound:
                    # Built once, and known to pass on the library as it is.
                    passed, failed = run(command, tree, 600)
                    if not passed:
                        sys.exit(f"{command} fails without a mutation: {failed}")
                    sound.add(check)
                path.write_text(original.replace(code, mutant))
                passed, failed = run(command, tree, 75)
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
