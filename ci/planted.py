#!/usr/bin/env python3
"""Plants bugs in the library, one at a time, and lets the simulation find them.

`multi_gpu` exits with 1 if it has found something stale. Bugs of drivers, devices and programs are
planted by `multi_gpu --fault`, and tests/multi_gpu.rs tries them all. These are the library's own.
`ci/planted.py` tries all of them on a copy of the tree (about a minute each), `ci/planted.py NAME
...` some; it exits with 1 if the simulation does not see one with every number of GPUs and in every
mode in which it can do harm. `ci/planted.py --check` looks only whether the code of each is there,
once.
"""
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
# What is built of a copy has the names of what is built here, and cargo would take it for that. A
# setting that nobody else uses gives the library other names; its dependencies stay the same.
APART = ["--config", "profile.release.package.shootdown.codegen-units=255"]
MODES = ["single-pass", "two-pass", "round-robin", "poll-driven"]

# Name; file, the code as it is and as it is not to be, of each edit; and the number of GPUs from
# which on it can do harm.
PLANTED = [
    ("read_begin never waits", [("src/protocol/own.rs", "(word & UNCOVERED != 0).then_some(word)", "Some(word | UNCOVERED)")], 1),
    ("read_retry is always false", [("src/subscription.rs", "space.collides(entry, sequence, open)", "_ = space.collides(entry, sequence, open);\n        false")], 1),
    # A search in several leaves finds it all the same.
    ("the last hit of a leaf is dropped", [("src/protocol/quick.rs", "for at in candidates {", "for at in candidates.start..candidates.end.saturating_sub(1) {")], 1),
    ("every fifth invalidation finds nobody", [("src/protocol.rs", "if self.index.may_overlap(range) {", "if (self.started >> PLACE_BITS) % 5 != 0 && self.index.may_overlap(range) {")], 1),
    ("S6 is left out", [("src/protocol.rs", "{ after_clash(current) }", "{ sequence }")], 1),
    ("a notifier is uncovered at the first end of two", [
        ("src/protocol/quick.rs", "        if covering == 0 {\n            self.word.store(self.word.load(Ordering::Relaxed) | UNCOVERED, Ordering::Release);\n        }\n        true", "        self.word.store(self.word.load(Ordering::Relaxed) | UNCOVERED, Ordering::Release);\n        true"),
        ("src/protocol/own.rs", "        } else if covering < COVER {", "            let _ = covering;\n        } else if true {\n            self.word.store(self.word.load(Ordering::Relaxed) | UNCOVERED, Ordering::Release);\n        } else if covering < COVER {"),
    ], 1),
]


def planted(tree, name, edits):
    """The files of `tree` that the edits change, as they are and as they are not to be."""
    was, changed = {}, {}
    for file, code, mutant in edits:
        was.setdefault(file, (tree / file).read_text())
        text = changed.get(file, was[file])
        if text.count(code) != 1:
            sys.exit(f"{name}: its code stands {text.count(code)} times in {file}; bring ci/planted.py up to date")
        changed[file] = text.replace(code, mutant)
    return was, changed


def simulate(tree):
    """The highest exit code, and the stale accesses of each number of GPUs and mode, with a few seeds."""
    worst, stale = 0, {}
    # The dependencies are built already, by `.ci/run`.
    env = {**os.environ, "CARGO_TARGET_DIR": str(TARGET.resolve())}
    for seed in map(str, range(1, 6)):
        command = ["cargo", "run", *APART, "--quiet", "--release", "--example", "multi_gpu", "--", "--json", "--gpus", "1,4,16", "--seed", seed]
        done = subprocess.run(["timeout", "600", *command], cwd=tree, env=env, capture_output=True, text=True)
        worst = max(worst, done.returncode)
        if done.returncode in (0, 1):
            for row in json.loads(done.stdout)["rows"]:
                key = (row["gpus"], row["mode"])
                stale[key] = stale.get(key, 0) + row["stale_accesses"]
    return worst, stale


def main():
    wanted = sys.argv[1:]
    if wanted == ["--check"]:
        for name, edits, _ in PLANTED:
            planted(ROOT, name, edits)
        return
    missed = []
    try:
        with tempfile.TemporaryDirectory() as temporary:
            tree = pathlib.Path(temporary) / "tree"
            shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns("target", ".git"))
            code, rows = simulate(tree)
            if code != 0:
                sys.exit(f"the simulation finds {rows} in the library as it is (exit code {code})")
            print("| planted | GPUs | " + " | ".join(MODES) + " |\n| --- | ---: |" + " ---: |" * len(MODES), flush=True)
            for name, edits, least in PLANTED:
                if wanted and name not in wanted:
                    continue
                was, changed = planted(tree, name, edits)
                for file, text in changed.items():
                    (tree / file).write_text(text)
                code, rows = simulate(tree)
                for file, text in was.items():
                    (tree / file).write_text(text)
                if code != 1:
                    missed.append(f"{name}: exit code {code}")
                for gpus in (1, 4, 16):
                    stale = [rows.get((gpus, mode), 0) for mode in MODES]
                    print(f"| {name} | {gpus} | " + " | ".join(map(str, stale)) + " |", flush=True)
                    if gpus >= least and 0 in stale:
                        missed.append(f"{name}, {gpus} GPUs: {stale}")
    finally:
        # The program with a planted bug does not stay where the example is looked for.
        (TARGET / "release/examples/multi_gpu").unlink(missing_ok=True)
    if missed:
        sys.exit("not found:\n" + "\n".join(missed))


if __name__ == "__main__":
    main()
