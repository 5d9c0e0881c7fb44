#!/usr/bin/env bash
# Comments and documents in lines of at most 100 columns. Code is rustfmt's, which leaves alone what
# it cannot break. Exempt are
# rows of tables and lines without a space (a link). Files that documents name are there. DESIGN.md
# has at most 250 lines, and a file of a `src` folder fewer than 500.
set -euo pipefail
cd "$(dirname "$0")/.."
export LC_ALL=C.UTF-8
failed=no

long() {
    git ls-files -z -- "$@" | xargs -0 grep -nE '^.{101,}' /dev/null || true
}
# `file:line:` in front of the text is taken off before it is looked at.
found=$(
    long '*.md' | grep -vE '^[^:]+:[0-9]+:( *\||.*│|# |\[[^]]+\]: )' | grep -E '^[^:]+:[0-9]+: *[^ ]+ +[^ ]' || true
    long '*.sh' '*.py' '.ci/run' 'Cargo.toml' 'crates/*/Cargo.toml' | grep -E '^[^:]+:[0-9]+: *#' || true
    long '*.rs' | grep -E '^[^:]+:[0-9]+: *//' | grep -vE '^[^:]+:[0-9]+: *//[/!]? *(\||# )' \
        | grep -E '^[^:]+:[0-9]+: *//[/!]? *[^ ]+ +[^ ]' || true
)
if [ -n "$found" ]; then
    echo "$found" | cut -c1-160
    echo "these lines have more than 100 columns" >&2
    failed=yes
fi
# Files that documents name in backticks or link to are there.
missing=$(
    git ls-files -z -- '*.md' ':!CHANGELOG.md' \
        | xargs -0 grep -noE '[`(](src|tests|crates|ci|examples|benches|docs)/[A-Za-z0-9_./-]+[`)#]' \
        | while IFS=: read -r document line path; do
            path=${path#?}; path=${path%?}; path=${path%/}
            [ -e "$path" ] || [ -e "$(dirname "$document")/$path" ] || echo "$document:$line: $path"
        done
)
if [ -n "$missing" ]; then
    echo "$missing"
    echo "these files are not there" >&2
    failed=yes
fi
lines=$(wc -l < DESIGN.md)
if [ "$lines" -gt 250 ]; then
    echo "DESIGN.md has $lines lines, more than 250: what was measured belongs into docs/measurements.md" >&2
    failed=yes
fi
while read -r lines file; do
    [ "$file" = total ] || [ "$lines" -lt 500 ] || { echo "$file has $lines lines, not fewer than 500" >&2; failed=yes; }
done < <(git ls-files -z -- 'src/*.rs' 'crates/*/src/*.rs' | xargs -0 wc -l)
[ "$failed" = no ]
