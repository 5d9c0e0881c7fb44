#!/usr/bin/env bash
# The example without `std`: nothing in its dependency tree has a feature `std`, it builds for a
# machine without an operating system, and it runs.
set -euo pipefail
cd "$(dirname "$0")/../examples/no_std"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-../../target}/no-std"

tree=$(cargo tree --edges normal,features --no-dedupe --prefix none | sort -u)
# Macros run in the compiler: what they depend on is not in the program.
if grep -E '(feature "std"|feature "default" .*futures)' <<<"$tree"; then
    echo "a dependency of the example has std turned on" >&2
    exit 1
fi

if [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ]; then
    cargo run --quiet --release
else
    echo "left out: the run of the example, which enters without a C library on Linux, x86-64, only"
fi
# The target is downloaded if it can be.
if rustup target list --installed 2>/dev/null | grep -q x86_64-unknown-none || rustup target add x86_64-unknown-none 2>/dev/null; then
    cargo build --quiet --release --target x86_64-unknown-none
    echo "built for x86_64-unknown-none"
else
    echo "left out: the build for x86_64-unknown-none, which is not installed and cannot be downloaded"
fi
