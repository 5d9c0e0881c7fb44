#!/usr/bin/env bash
# Changes the library in small ways with cargo-mutants and runs the tests that have to notice.
#
#   ci/mutants.sh [BASE]                              the lines that changed since BASE
#   ci/mutants.sh --whole [--shard K/N] [MODULE ...]  everything, or some modules, or one part of N
#
# Without BASE it takes the point where this branch left origin/main, or else the last commit. Of
# more than MUTANTS_MOST mutants of a module (12) it tries a sample and says so. A mutant that the
# cheap tests of its module miss meets further tests. `.cargo/mutants.toml` lists the mutants that
# change nothing that can be seen, each with the reason. cargo-nextest, where it is there, ends a
# run at the first test that fails, and a test that hangs after a minute. The whole takes some ten
# hours on two processors: 3,800 mutants of 9 to 15 s each.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD

modules="protocol index engine mirror cache source"
whole=no shard="" base="" wanted=()
while [ $# != 0 ]; do
    case "$1" in
        --whole) whole=yes ;;
        --shard) shard=${2:?}; shift ;;
        -*) sed -n '4,5s/^# *//p' "$0" >&2; exit 2 ;;
        *) wanted+=("$1") ;;
    esac
    shift
done
if [ "$whole" = no ]; then
    base=${wanted[0]:-}
    if [ -n "$base" ] && ! git rev-parse --quiet --verify "$base^{commit}" >/dev/null; then
        echo "ci/mutants.sh: $base is no commit; --whole goes before the name of a module" >&2
        exit 2
    fi
    wanted=()
fi
for module in "${wanted[@]}"; do
    case " $modules " in
        *" $module "*) ;;
        *) echo "ci/mutants.sh: $module is none of: $modules" >&2; exit 2 ;;
    esac
done

export PATH="$root/target/tools/bin:$PATH"
if ! command -v cargo-mutants >/dev/null 2>&1; then
    # Unoptimized: it is built twice as fast, and waits for cargo most of the time.
    echo "== installing cargo-mutants"
    CARGO_TARGET_DIR=target/tools cargo install --quiet --debug --locked --root target/tools cargo-mutants
fi

work=$root/target/mutants
mkdir -p "$work"
selection=()
if [ "$whole" = no ]; then
    if [ -z "$base" ]; then
        # On the main branch itself, and in a clone of few commits: the last commit.
        base=$(git merge-base origin/main HEAD 2>/dev/null || true)
        [ -n "$base" ] && [ "$base" != "$(git rev-parse HEAD)" ] || base=HEAD^
    fi
    if ! git rev-parse --quiet --verify "$base^{commit}" >/dev/null; then
        echo "== left out: mutants of the lines that changed, because $base is not in this clone"
        exit 0
    fi
    git diff --no-ext-diff "$base" -- src >"$work/diff"
    if [ ! -s "$work/diff" ]; then
        echo "== no line of src has changed since $base"
        exit 0
    fi
    selection+=(--in-diff "$work/diff")
fi

# The copy that is changed lies always at the same place, so that the next build has little to do.
# Its files are new: cargo would take what was built of an earlier copy for up to date.
tree=$work/tree
rm -rf "$tree"
mkdir -p "$tree"
git ls-files -z --cached --others --exclude-standard --deduplicate |
    while IFS= read -r -d '' file; do [ ! -f "$file" ] || printf '%s\0' "$file"; done |
    tar --create --null --files-from=- | tar --extract --touch --directory "$tree"
# `allocations` and others find the build by themselves; dependencies are those of `cargo test`.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$root/target}
export SHOOTDOWN_CASES=${SHOOTDOWN_CASES:-64}

runner=()
last=()
if command -v cargo-nextest >/dev/null 2>&1; then
    cat >"$work/nextest.toml" <<'END'
[profile.default]
# One measures time, so it notices the machine, too; one builds an example in release.
default-filter = "not test(/takes_time_in_proportion|the_proof_on_io_uring/)"
slow-timeout = { period = "60s", terminate-after = 1, grace-period = "1s" }
fail-fast = { max-fail = 1, terminate = "immediate" }
END
    runner=(--test-tool nextest)
    last=(-- --config-file "$work/nextest.toml")
fi

# Mutants in the files $2 against the tests $3, and those that are missed against the tests $4.
status=0
try() {
    local name=$1 files=() cargo=() at code=0 only=("${selection[@]}")
    for at in $2; do files+=("$at"); done
    mutants() {
        cargo mutants --dir "$tree" --output "$work/$name" "${files[@]}" "${only[@]}" "$@"
    }
    local count most=${MUTANTS_MOST:-12}
    count=$(mutants --list | wc -l)
    [ "$count" != 0 ] || return 0
    if [ -n "$shard" ]; then
        only+=(--sharding round-robin --shard "$shard")
    elif [ "$whole" = no ] && [ "$count" -gt "$most" ]; then
        local parts=$(((count + most - 1) / most))
        echo "== $name: one of $parts of $count mutants (MUTANTS_MOST=$count tries all)"
        only+=(--sharding round-robin --shard "0/$parts")
    fi
    rm -rf "${work:?}/$name"
    mkdir -p "$work/$name"
    # Longer than cargo-nextest waits for one test: a test that hangs fails, and so it is noticed.
    local iterate=() limit=180 missed=$work/$name/mutants.out/missed.txt
    for tests in "$3" "$4"; do
        cargo=(--cargo-arg=--config --cargo-arg=profile.dev.package.shootdown.debug=0)
        # Other names than those of what is built here, which cargo would take a mutant for.
        cargo+=(--cargo-arg=--config --cargo-arg=profile.dev.package.shootdown.codegen-units=255)
        for at in $tests; do cargo+=("--cargo-arg=$at"); done
        echo "== $name: $tests"
        code=0
        mutants --in-place --timeout "$limit" "${iterate[@]}" "${runner[@]}" "${cargo[@]}" \
            "${last[@]}" || code=$?
        # 2: some were missed. 3: some took too long, and others may have been missed.
        case "$code" in
            0 | 2 | 3) ;;
            *) exit "$code" ;;
        esac
        [ -s "$missed" ] || return 0
        iterate=(--iterate)
    done
    status=1
    echo "== $name: missed"
    cat "$missed"
}

tests_of() {
    case "$1" in
        cache) echo "--lib --test=cache" ;;
        source) echo "--lib --test=source" ;;
        *) echo "--lib --test=contract" ;;
    esac
}
more_of() {
    case "$1" in
        cache) echo "--test=contract --test=source --test=soak" ;;
        source) echo "--test=cache --test=memory_soak" ;;
        *) echo "--test=stats --test=test_util --test=fuzz --test=sweep --test=cache --test=source" ;;
    esac
}
files_of() {
    printf -- '--file src/%s.rs --file src/%s/**' "$1" "$1"
}

set -f
rest=""
for module in $modules; do rest+=" --exclude src/$module.rs --exclude src/$module/**"; done
if [ ${#wanted[@]} != 0 ]; then
    modules="${wanted[*]}"
elif [ "$whole" = no ]; then
    # The other modules, too, where lines of theirs have changed.
    try others "--file src/** $rest" "$(tests_of others)" "$(more_of others)"
fi
for module in $modules; do
    try "$module" "$(files_of "$module")" "$(tests_of "$module")" "$(more_of "$module")"
done
[ "$status" = 0 ] && echo "== no mutant was missed"
exit "$status"
