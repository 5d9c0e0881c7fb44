#!/usr/bin/env bash
# Compares the public surface with the accepted one, ci/public-api.txt, so that a change of it is
# seen in review. `ci/public-api.sh --accept` takes it as it is. Needs cargo-public-api, which
# `ci/release.sh` installs; the stable compiler writes the description that it reads behind
# RUSTC_BOOTSTRAP.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1-}" in
    "" | --accept) ;;
    *) echo "usage: ci/public-api.sh [--accept]" >&2; exit 2 ;;
esac
mkdir -p target
export RUSTC_BOOTSTRAP=1 RUSTDOCFLAGS="-Z unstable-options --output-format json"
cargo doc --quiet --no-deps --lib --all-features --target-dir target/public-api
unset RUSTDOCFLAGS
cargo public-api --rustdoc-json target/public-api/doc/shootdown.json -sss | LC_ALL=C sort -u > target/public-api.txt
if [ "${1-}" = --accept ]; then
    cp target/public-api.txt ci/public-api.txt
elif ! diff -u ci/public-api.txt target/public-api.txt; then
    echo "the public surface has changed: say so in CHANGELOG.md and run ci/public-api.sh --accept" >&2
    exit 1
fi
