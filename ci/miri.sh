#!/usr/bin/env bash
# The tests of the contract and a part of the sweep of foreign code under Miri, which looks for
# undefined behaviour in `src/entry.rs`: some seven minutes. Needs a nightly toolchain with Miri
# (`rustup toolchain install nightly --component miri`). `ci/miri.sh NAME` runs the tests with NAME
# in theirs.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! cargo +nightly miri --version >/dev/null 2>&1; then
    echo "ci/miri.sh needs Miri: rustup toolchain install nightly --component miri" >&2
    exit 2
fi
# Some tests leak on purpose (`mem::forget`). Those that are left out yield many thousand times, or
# start processes.
export MIRIFLAGS="-Zmiri-disable-isolation -Zmiri-ignore-leaks ${MIRIFLAGS:-}"
cargo +nightly miri test --target-dir target/miri --test contract --test sweep -- \
    --skip c4_patience --skip c4_a_clock --skip c4_one_waiter --skip foreign_code::f2 --skip a5_tasks --skip s4_a_sequence "$@"
