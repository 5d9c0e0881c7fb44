#!/usr/bin/env bash
# The packages in `crates/`: lints, documentation, tests, models, and guests under QEMU, for which
# it installs QEMU and unpacks a kernel where `apt-get` can. `ci/vhost.sh loom` explores the models
# only.
set -euo pipefail
cd "$(dirname "$0")/.."

models() {
    RUSTFLAGS="--cfg loom ${RUSTFLAGS:-}" CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/loom" \
        cargo test --release -p shootdown-vhost --no-default-features --test loom -- --nocapture
}

if [ "${1:-}" = loom ]; then
    models
    exit
fi
cargo clippy -p shootdown-vhost -p shootdown-guest --all-targets -- -D warnings
cargo clippy -p shootdown-vhost --no-default-features -- -D warnings
RUSTDOCFLAGS="-D warnings" cargo doc --no-deps -p shootdown-vhost
if ! command -v qemu-system-x86_64 >/dev/null 2>&1 && command -v apt-get >/dev/null 2>&1; then
    (apt-get install -y --no-install-recommends qemu-system-x86 || (apt-get update && apt-get install -y --no-install-recommends qemu-system-x86)) \
        >/dev/null 2>&1 || echo "== left out: guests, because QEMU cannot be installed"
fi
crates/shootdown-vhost/guest.sh fetch || echo "== left out: guests, because there is no kernel for them"
SHOOTDOWN_SCHEDULES="${SHOOTDOWN_SCHEDULES:-20000}" cargo test --release -p shootdown-vhost
models
