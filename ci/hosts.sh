#!/usr/bin/env bash
# The packages for memory that other hosts mirror: lints, documentation, tests, the simulation and
# the search of the protocol, real sockets, and an owner's fail-over with etcd, which it installs
# where `apt-get` can.
set -euo pipefail
cd "$(dirname "$0")/.."

# etcd for the test of fail-over, and what building its client needs: `protoc` with its include
# files.
needed="etcd-server protobuf-compiler libprotobuf-dev"
if command -v apt-get >/dev/null 2>&1 && ! dpkg -s $needed >/dev/null 2>&1; then
    (apt-get install -y --no-install-recommends $needed || (apt-get update && apt-get install -y --no-install-recommends $needed)) \
        >/dev/null 2>&1 || echo "== $needed cannot be installed"
fi
command -v etcd >/dev/null 2>&1 || echo "== left out: fail-over, because there is no etcd"
packages=(-p shootdown-lease -p shootdown-grpc)
features=(--features shootdown-lease/engine,shootdown-lease/test-util,shootdown-grpc/tracing,shootdown-grpc/metrics)
if command -v protoc >/dev/null 2>&1; then
    features=(--all-features)
else
    echo "== left out: the feature etcd, because its client cannot be built without protoc"
fi

cargo clippy "${packages[@]}" --all-targets "${features[@]}" -- -D warnings
cargo clippy -p shootdown-grpc --all-targets -- -D warnings
cargo clippy -p shootdown-lease --no-default-features -- -D warnings
RUSTDOCFLAGS="-D warnings" cargo doc --no-deps "${features[@]}" "${packages[@]}"
cargo test --release "${features[@]}" "${packages[@]}"
cargo run --release --quiet -p shootdown-lease --example many_hosts -- --hosts 1,30,300 --invalidations 10
cargo run --release --quiet -p shootdown-grpc --example hosts -- chaos --seconds 6
