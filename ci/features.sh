#!/usr/bin/env bash
# What only exists with all features: faults on demand, and every example in the documentation.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo test --all-features --test test_util
cargo test --all-features --doc
