#!/usr/bin/env bash
# Data races, as ThreadSanitizer sees them. By hand, not in `.ci/run`.
#
# Needs a nightly toolchain with the sources of the standard library, which is built with the
# sanitizer, too (`-Zbuild-std`): `rustup toolchain install nightly --component rust-src`. Without
# that the sanitizer does not see what the locks and channels of `std` order, and reports races that
# are none. Takes about half an hour on 2 cores, the build included. `ci/tsan.sh NAME` runs the
# tests with NAME in theirs.
#
# Runs: the contract, with `r1_a_fast_reader_sees_what_was_written_before_the_end_watched_or_not`
# (the neighbour of loom's model of a fast reader beside the end of a watched notifier); dropped,
# leaked and forgotten futures; a soak with and without the cache; the cache; `source`.
#
# Cannot run:
# - tests of `source` that fork: the sanitizer does not support threads in a child of a process with
#   several threads;
# - tests that count what the process has mapped, or use up its mappings: the sanitizer has its own;
# - tests that compare times: everything takes ten times as long.
#
# It does not know fences, of which `engine::gate` and `timeline` have some: loom has models of
# these.
set -euo pipefail
cd "$(dirname "$0")/.."
host=$(rustc +nightly -vV 2>/dev/null | sed -n 's/^host: //p' || true)
if [ -z "$host" ] || [ ! -d "$(rustc +nightly --print sysroot)/lib/rustlib/src/rust/library" ]; then
    echo "ci/tsan.sh needs: rustup toolchain install nightly --component rust-src" >&2
    exit 2
fi
export RUSTFLAGS="-Zsanitizer=thread ${RUSTFLAGS:-}"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/tsan"
# The first report ends a run. A test that hangs has more time before it is named.
export TSAN_OPTIONS="halt_on_error=1 ${TSAN_OPTIONS:-}" SHOOTDOWN_HANG_SECONDS=1800
tsan() {
    cargo +nightly test -Zbuild-std --target "$host" "$@"
}
# Names of what it cannot run (above).
slow=(takes_time_in_proportion cost_no_product whoever_is_fenced_meanwhile growth::k4_a_)
forks=(fork m4_ in_the_child filtered inside_madvise by_default)
mapped=(mappings without_room no_mapping_left the_proof_on_io_uring huge mapping_of)
skipped=()
for name in "${slow[@]}"; do
    skipped+=(--skip "$name")
done
# Without `tracing` and `metrics`: they turn the quick ways off.
if [ $# = 0 ]; then
    tsan --test soak
    tsan --features test-util,cache,lease,userfaultfd --test soak
fi
tsan --features test-util,cache,lease,userfaultfd --test contract --test futurelock --test cache -- "${skipped[@]}" "$@"
for name in "${forks[@]}" "${mapped[@]}"; do
    skipped+=(--skip "$name")
done
tsan --features test-util,cache,lease,userfaultfd --test source -- "${skipped[@]}" "$@"
