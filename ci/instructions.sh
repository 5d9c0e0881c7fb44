#!/usr/bin/env bash
# Counts the library's instructions with callgrind and compares them with the counts of the last
# accepted run, benches/instructions.json: fails where one is more than 5 % higher.
# `ci/instructions.sh --accept` replaces them: after a change that is meant to cost more, or that
# saved something.
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1-}" in
    "" | --accept) ;;
    *) echo "usage: ci/instructions.sh [--accept]" >&2; exit 2 ;;
esac
if ! command -v valgrind >/dev/null 2>&1; then
    # valgrind is a package of the system: where there is apt and the right to use it, it is
    # installed.
    apt-get install -y valgrind >/dev/null 2>&1 || (apt-get update && apt-get install -y valgrind) >/dev/null 2>&1 \
        || { echo "ci/instructions.sh needs valgrind: install it with your system's package manager" >&2; exit 2; }
fi
# The runner must have the version of the library.
version=$(cargo pkgid gungraun | sed 's/.*[#@]//')
if ! gungraun-runner --version 2>/dev/null | grep -qF "$version"; then
    cargo install --quiet --locked --root target/tools "gungraun-runner@$version"
    export PATH="$PWD/target/tools/bin:$PATH"
fi

if [ "${1-}" = --accept ]; then
    counts=$(ACCEPT=1 cargo bench --quiet --bench instructions | tee /dev/stderr | awk '
        /^instructions::/ { sub(/^instructions::instructions::/, ""); sub(/:.*/, ""); name = $0 }
        /Instructions:/ { split($2, counts, "|"); printf "%s  \"%s\": %s", separator, name, counts[1]; separator = ",\n" }')
    printf '{\n%s\n}\n' "$counts" > benches/instructions.json
else
    cargo bench --quiet --bench instructions
fi
