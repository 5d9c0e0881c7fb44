#!/usr/bin/env bash
# The tests under AddressSanitizer (leaks included). Needs the sanitizers of an unstable compiler; a
# stable one has them behind RUSTC_BOOTSTRAP, which is good enough for a check. Says so and stops
# when this compiler has none.
set -euo pipefail
cd "$(dirname "$0")/.."
host=$(rustc -vV | sed -n 's/^host: //p')
export RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address ${RUSTFLAGS:-}" CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/asan"
if ! echo 'fn main() {}' | rustc -Zsanitizer=address --target "$host" --crate-name probe -o "$(mktemp -d)/probe" - 2>/dev/null; then
    echo "skipped: this compiler has no AddressSanitizer for $host"
    exit 0
fi
# Some tests leak on purpose (`mem::forget`).
export ASAN_OPTIONS="${ASAN_OPTIONS:-detect_leaks=0}"
# Without `tracing` and `metrics`: they turn the quick ways off.
cargo test --target "$host" --features test-util,cache,lease,userfaultfd --lib --test contract --test conformance --test futurelock --test fuzz --test test_util --test soak "$@"
