#!/usr/bin/env bash
# The documentation, with warnings denied: all features, and none.
set -euo pipefail
cd "$(dirname "$0")/.."
export RUSTDOCFLAGS="-D warnings"
cargo doc --no-deps --all-features
cargo doc --no-deps --no-default-features
