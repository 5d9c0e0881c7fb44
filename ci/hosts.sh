#!/usr/bin/env bash
# The packages for memory that other hosts mirror: lints, documentation, tests, the simulation and the search of the protocol, real sockets, and an owner's
# fail-over with etcd, which it installs where `apt-get` can.
set -euo pipefail
cd "$(dirname "$0")/.."
packages=(-p shootdown-lease -p shootdown-grpc)
cargo clippy "${packages[@]}" --all-targets --all-features -- -D warnings
cargo clippy -p shootdown-lease --no-default-features -- -D warnings
RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --all-features "${packages[@]}"
if ! command -v etcd >/dev/null 2>&1 && command -v apt-get >/dev/null 2>&1; then
    (apt-get install -y --no-install-recommends etcd-server || (apt-get update && apt-get install -y --no-install-recommends etcd-server)) \
        >/dev/null 2>&1 || echo "== left out: fail-over, because etcd cannot be installed"
fi
cargo test --release --all-features "${packages[@]}"
cargo run --release --quiet -p shootdown-lease --example many_hosts -- --hosts 1,30,300 --invalidations 10
