#!/usr/bin/env bash
# Random schedules of the whole engine, tests/shuttle.rs. `SHUTTLE_ITERATIONS=100000` makes it long.
set -euo pipefail
cd "$(dirname "$0")/.."
export RUSTFLAGS="--cfg shuttle ${RUSTFLAGS:-}" CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/shuttle"
cargo test --release --test shuttle -- --nocapture "$@"
