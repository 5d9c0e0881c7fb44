#!/usr/bin/env bash
# The example on a real card, in at most five minutes: uploads, passes, the price of an import beside a look-up.
#   card.sh prepare   on a machine with a toolchain: builds into target/card, with the Vulkan loader beside it
#   card.sh           on the machine with the card, which needs no network: runs what is there; builds it if nothing is
# What it prints goes to $OUT/vulkan.txt (and .json) as well, if OUT is set.
set -euo pipefail
cd "$(dirname "$0")/../.."
place=target/card

prepare() {
    cargo build --quiet --release --features userfaultfd --example vulkan
    mkdir -p "$place"
    cp "${CARGO_TARGET_DIR:-target}/release/examples/vulkan" "$place/"
    local loader
    loader=$(ldconfig -p | sed -n 's/.*libvulkan\.so\.1 .*=> //p' | head -n 1)
    if [ -n "$loader" ]; then cp -L "$loader" "$place/libvulkan.so.1"; fi
    echo "prepared: $(cd "$place" && echo *)"
}

has_loader() { ldconfig -p | grep 'libvulkan\.so\.1 ' >/dev/null; }

if [ "${1:-}" = prepare ]; then
    prepare
    exit
fi
if [ ! -x "$place/vulkan" ]; then prepare; fi
if ! has_loader; then
    (apt-get install -y libvulkan1 || (apt-get update && apt-get install -y libvulkan1)) >/dev/null 2>&1 || true
fi
# The one that was brought along, where the system has none.
if ! has_loader; then export LD_LIBRARY_PATH="$PWD/$place${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"; fi

# In containers NVIDIA's library is often there without the file that names it.
if ! cat /usr/share/vulkan/icd.d/*.json /etc/vulkan/icd.d/*.json 2>/dev/null | grep -i nvidia >/dev/null; then
    for name in libGLX_nvidia.so.0 libEGL_nvidia.so.0; do
        if ldconfig -p | grep "$name" >/dev/null; then
            printf '{"file_format_version": "1.0.0", "ICD": {"library_path": "%s", "api_version": "1.3.0"}}\n' "$name" >"$place/nvidia.json"
            export VK_DRIVER_FILES="$PWD/$place/nvidia.json" VK_ICD_FILENAMES="$PWD/$place/nvidia.json"
            break
        fi
    done
fi

status=0
run() {
    echo "\$ vulkan $*"
    timeout 60 "$place/vulkan" "$@" || { status=$?; echo "exit code $status"; }
    echo
}

all() {
    if command -v nvidia-smi >/dev/null 2>&1; then nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || true; fi
    uname -sr
    # A processor's driver beside the card would take its turn in the passes.
    local only=()
    if [ -n "${CARD:-}" ]; then only=(--device "$CARD"); fi
    run "${only[@]}" uploads --uploads 20000
    run "${only[@]}" uploads --uploads 2000 --kib 1024 --buffers 16
    run "${only[@]}" passes
    run "${only[@]}" passes --work copy
    run "${only[@]}" uploads --uploads 2000 --fence-fd
    run "${only[@]}" passes --fence-fd
    if [ -n "${OUT:-}" ]; then timeout 60 "$place/vulkan" "${only[@]}" --json >"$OUT/vulkan.json" || true; fi
    return "$status"
}

if [ -n "${OUT:-}" ]; then
    all 2>&1 | tee "$OUT/vulkan.txt"
else
    all
fi
