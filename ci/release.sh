#!/usr/bin/env bash
# The checks before a release whose tools take long to install. Without arguments it installs what
# is missing and runs all; with --present it runs those whose tools are there and names the others,
# as `.ci/run` does, which runs `ci/mutants.sh` by itself. cargo-mutants changes the lines that the
# last commits have changed; with --mutants everything (hours).
set -euo pipefail
cd "$(dirname "$0")/.."

present=no mutants=no
for argument in "$@"; do
    case "$argument" in
        --present) present=yes ;;
        --mutants) mutants=yes ;;
        *) echo "usage: ci/release.sh [--present] [--mutants]" >&2; exit 2 ;;
    esac
done
export PATH="$PWD/target/tools/bin:$PATH"

# Whether the tool is there, after an attempt to install it.
tool() {
    if ! command -v "$1" >/dev/null 2>&1 && [ "$present" = no ]; then
        echo "== installing $1"
        CARGO_TARGET_DIR=target/tools cargo install --quiet --locked --root target/tools "$1"
    fi
    command -v "$1" >/dev/null 2>&1 || { echo "== left out: $1 is not installed (ci/release.sh installs it)"; return 1; }
}
step() {
    echo "== $*"
    "$@"
}

if tool cargo-hack; then
    step cargo hack check --quiet --feature-powerset --no-dev-deps --lib
fi
if tool cargo-public-api; then
    step ci/public-api.sh
fi
if tool cargo-deny; then
    step cargo deny --log-level error check licenses bans sources
    # The advisories are a repository that has to be downloaded.
    if timeout 120 cargo deny --log-level error fetch db >/dev/null 2>&1; then
        step cargo deny --log-level error check advisories
    else
        echo "== left out: advisories, because their database cannot be downloaded"
    fi
fi
# No crate is in the library's own tree twice; what macros are built with does not count.
step cargo tree --edges normal,no-proc-macro --all-features --duplicates --depth 0
if [ -n "$(cargo tree --edges normal,no-proc-macro --all-features --duplicates --depth 0)" ]; then
    echo "a crate is in the library's dependencies twice" >&2
    exit 1
fi
# Builds what it packs.
step cargo package --quiet --allow-dirty
# The changes by hand still fit the code.
if command -v python3 >/dev/null 2>&1; then
    step ci/mutations.py --check
    step ci/planted.py --check
fi
if [ "$mutants" = yes ]; then
    step ci/mutants.sh --whole
elif [ "$present" = no ]; then
    step ci/mutants.sh
fi
echo "== release checks done"
