#!/usr/bin/env bash
# Whether the library compiles for other systems: their standard libraries are downloaded if they
# can be.
set -euo pipefail
cd "$(dirname "$0")/.."
check() {
    local target=$1
    shift
    if rustup target list --installed 2>/dev/null | grep -qx "$target" || rustup target add "$target" >/dev/null 2>&1; then
        cargo check --quiet --lib --target "$target" "$@"
        echo "compiles for $target $*"
    else
        echo "left out: $target, which is not installed and cannot be downloaded"
    fi
}
check aarch64-apple-darwin --all-features
check x86_64-unknown-freebsd --all-features
check x86_64-pc-windows-msvc --features cache,tracing,metrics,test-util
check aarch64-unknown-linux-gnu --all-features
check x86_64-unknown-none --no-default-features
