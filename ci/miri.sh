#!/usr/bin/env bash
# The tests of the contract under Miri, which looks for undefined behaviour in `src/entry.rs`: some seven minutes. Needs a nightly toolchain with Miri
# (`rustup toolchain install nightly --component miri`). `ci/miri.sh NAME` runs the tests with NAME in theirs.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! cargo +nightly miri --version >/dev/null 2>&1; then
    echo "ci/miri.sh needs Miri: rustup toolchain install nightly --component miri" >&2
    exit 2
fi
# Some tests leak on purpose (`mem::forget`). The one that is left out yields many thousand times.
export MIRIFLAGS="-Zmiri-disable-isolation -Zmiri-ignore-leaks ${MIRIFLAGS:-}"
cargo +nightly miri test --target-dir target/miri --test contract -- --skip c4_patience "$@"
