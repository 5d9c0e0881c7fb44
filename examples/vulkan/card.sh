#!/usr/bin/env bash
# The example on a real card, in at most five minutes: uploads, passes, the price of an import
# beside a look-up.
#
#   card.sh prepare   on a machine with a toolchain: builds into target/card, with the Vulkan loader
#   beside it card.sh           on the machine with the card: runs what is there (no network
#   needed), or builds it if it is not there or is older than its sources and there is cargo
#
# CARD=NAME chooses the device. Without it the first card is taken; where there is a processor's
# driver only, it exits with 3. What it prints goes to $OUT/vulkan.txt (and .json) as well, if OUT
# is set.
set -euo pipefail
self="$(cd "$(dirname "$0")" && pwd)/$(basename "$0")"
cd "$(dirname "$self")/../.."
PATH="$PATH:/usr/sbin:/sbin"
place=target/card

if [ "${1:-}" = prepare ]; then
    cargo build --quiet --release --features cache,userfaultfd --example vulkan
    mkdir -p "$place"
    cp "${CARGO_TARGET_DIR:-target}/release/examples/vulkan" "$place/"
    loader=$(ldconfig -p | awk '/libvulkan\.so\.1 / && !found++ { print $NF }')
    if [ -n "$loader" ]; then cp -L "$loader" "$place/libvulkan.so.1"; fi
    echo "prepared: $(cd "$place" && echo *)"
    exit
fi

# One limit for all of it.
if [ "${1:-}" != limited ]; then
    status=0
    timeout --kill-after=5 290 "$self" limited || status=$?
    if [ "$status" = 124 ]; then echo "the five minutes are over" >&2; fi
    exit "$status"
fi

stale() { [ -n "$(find src examples/vulkan Cargo.toml Cargo.lock -newer "$place/vulkan" 2>/dev/null)" ]; }
if [ ! -x "$place/vulkan" ]; then
    "$self" prepare
elif stale && command -v cargo >/dev/null 2>&1; then
    "$self" prepare || echo "it cannot be built anew: the one of $(date -r "$place/vulkan") is run" >&2
fi

# The system's loader, the one that was brought along, or the network's.
has_loader() { ldconfig -p | grep 'libvulkan\.so\.1 ' >/dev/null; }
if has_loader; then
    :
elif [ -e "$place/libvulkan.so.1" ]; then
    export LD_LIBRARY_PATH="$PWD/$place${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
elif command -v apt-get >/dev/null 2>&1; then
    (timeout 60 apt-get install -y libvulkan1 || (timeout 60 apt-get update && timeout 60 apt-get install -y libvulkan1)) >/dev/null 2>&1 || true
fi

# In containers NVIDIA's library is often there without the file that names it. The one for EGL
# needs no X.
names_nvidia() {
    local file
    for file in /usr/share/vulkan/icd.d/*.json /usr/local/share/vulkan/icd.d/*.json /etc/vulkan/icd.d/*.json; do
        if [ -e "$file" ] && grep -i nvidia "$file" >/dev/null; then return 0; fi
    done
    return 1
}
if [ -z "${VK_DRIVER_FILES:-}${VK_ICD_FILENAMES:-}" ] && ! names_nvidia; then
    for name in libEGL_nvidia.so.0 libGLX_nvidia.so.0; do
        if ldconfig -p | grep "$name" >/dev/null; then
            printf '{"file_format_version": "1.0.0", "ICD": {"library_path": "%s", "api_version": "1.3.0"}}\n' "$name" >"$place/nvidia.json"
            export VK_DRIVER_FILES="$PWD/$place/nvidia.json" VK_ICD_FILENAMES="$PWD/$place/nvidia.json"
            break
        fi
    done
fi

# A processor's driver beside the card would take its turn in the passes: the first card is named.
# Cards come before processors.
if [ -z "${CARD:-}" ]; then
    cards=$("$place/vulkan" passes --devices 1 --repeats 1 --work-ms 1 --json) || { code=$?; [ "$code" = 1 ] || exit "$code"; }
    if ! grep '"processor":false' <<<"$cards" >/dev/null; then
        echo "there is no card, but a processor's driver only (CARD=NAME runs on it)" >&2
        exit 3
    fi
    CARD=$(sed -n 's/^{"cards":\[{"name":"\([^"]*\)".*/\1/p' <<<"$cards")
fi

status=0
run() {
    echo "\$ vulkan $*"
    "$place/vulkan" "$@" || { status=$?; echo "exit code $status"; }
    echo
}

all() {
    if command -v nvidia-smi >/dev/null 2>&1; then nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || true; fi
    uname -sr
    local only=(--device "$CARD")
    run "${only[@]}" uploads --uploads 20000
    run "${only[@]}" uploads --uploads 2000 --kib 1024 --buffers 16
    run "${only[@]}" passes
    run "${only[@]}" passes --work copy
    run "${only[@]}" uploads --uploads 2000 --fence-fd
    run "${only[@]}" passes --fence-fd
    if [ -n "${OUT:-}" ]; then "$place/vulkan" "${only[@]}" --json >"$OUT/vulkan.json" || true; fi
    return "$status"
}

if [ -n "${OUT:-}" ]; then
    all 2>&1 | tee "$OUT/vulkan.txt"
else
    all
fi
