#!/usr/bin/env bash
# The tests on real memory: as the user who calls this, and if that is root once more as an ordinary
# one, with the same promises.
set -euo pipefail
cd "$(dirname "$0")/.."
tests=(--all-features --test source --test memory_soak)
cargo test "${tests[@]}"
if [ "$(id -u)" != 0 ] || ! command -v setpriv >/dev/null 2>&1; then
    echo "== left out: the same as an ordinary user, because this is one or there is no setpriv"
    exit 0
fi
# As copies where anybody may read them.
programs=$(mktemp -d)
trap 'rm -rf "$programs"' EXIT
chmod 755 "$programs"
cargo test "${tests[@]}" --no-run 2>&1 | sed -n 's/^ *Executable .*(\(.*\))$/\1/p' | while read -r program; do
    copy="$programs/$(basename "$program" | sed 's/-[0-9a-f]*$//')"
    install -m 755 "$program" "$copy"
done
for test in source memory_soak; do
    echo "== as an ordinary user: $test"
    (cd "$programs" && setpriv --reuid=65534 --regid=65534 --clear-groups --inh-caps=-all "./$test")
done
