#!/usr/bin/env bash
# Every interleaving of the models in tests/loom.rs. Arguments go to the tests, such as the name of
# one.
set -euo pipefail
cd "$(dirname "$0")/.."
export RUSTFLAGS="--cfg loom ${RUSTFLAGS:-}" CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/loom"
cargo test --release --test loom -- --nocapture --test-threads "${LOOM_THREADS:-2}" "$@"
