#!/usr/bin/env bash
# The tests under Miri, which looks for undefined behaviour in `src/entry.rs` and for data races. By
# hand, not in `.ci/run`.
#
# Needs a nightly toolchain with Miri (`rustup toolchain install nightly --component miri`). Takes
# about ten minutes on 2 cores. `ci/miri.sh NAME` runs the tests with NAME in theirs.
#
# Runs: the unit tests of `entry`, the contract, and a part of the sweep of foreign code.
#
# Cannot run:
# - tests that yield many thousand times, or need a clock that goes on meanwhile: `c4_patience`,
#   `c4_a_clock`, `c4_one_waiter`, `s4_a_sequence`, `a5_tasks`;
# - tests that start processes: `foreign_code::f2`, and the watchdog's own;
# - `cache` and `source`: they have no `unsafe` code but for system calls, which Miri does not know.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! cargo +nightly miri --version >/dev/null 2>&1; then
    echo "ci/miri.sh needs Miri: rustup toolchain install nightly --component miri" >&2
    exit 2
fi
# Some tests leak on purpose (`mem::forget`).
export MIRIFLAGS="-Zmiri-disable-isolation -Zmiri-ignore-leaks ${MIRIFLAGS:-}"
miri() {
    cargo +nightly miri test --target-dir "${CARGO_TARGET_DIR:-target}/miri" "$@"
}
skipped=()
for name in c4_patience c4_a_clock c4_one_waiter foreign_code::f2 a5_tasks s4_a_sequence; do
    skipped+=(--skip "$name")
done
if [ $# = 0 ]; then
    # Here nothing may leak.
    MIRIFLAGS="-Zmiri-disable-isolation" miri --lib -- entry::
fi
miri --test contract --test sweep -- "${skipped[@]}" "$@"
