#!/usr/bin/env bash
# Lints with warnings denied: all features, the default ones, and none.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo clippy --all-targets --all-features -- -D warnings
cargo clippy --all-targets -- -D warnings
cargo clippy --lib --no-default-features -- -D warnings
