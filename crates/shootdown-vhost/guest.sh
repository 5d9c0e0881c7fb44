#!/usr/bin/env bash
# A guest for the back-end: its kernel, the program that is its first process, and QEMU's command
# line. `--help` says more.
set -euo pipefail

usage() {
    cat <<'TEXT'
guest.sh fetch              puts the guest's kernel into target/guest/kernel (apt-get download, dpkg -x; needs no root)
guest.sh image              builds the guest's program, packs it, and prints the paths of the kernel and the initramfs
guest.sh boot [OPTION...]   boots the guest, which does one job, prints lines `GUEST {...}` on its console, and ends

One device for each of these, in their order:
  --socket PATH    a vhost-user-blk back-end that listens there
  --own FILE       QEMU's own virtio-blk on this file, to compare with
Options:
  --job JOB        disk: writes and reads every disk, and compares (the default)
                   speed: reads per second
                   vfio: unmaps memory while a read into it is in flight, and looks for foreign words
                   vfio-pair: the same with two devices in one IOMMU group; needs --shared-slot
                   vfio-exit: a process is killed with a read in flight, and another one gets its memory
  --set NAME=VALUE what the job reads: mib, seed, threads (disk); ms (speed); rounds, kib, seed, delay_ms, settle_ms (vfio...);
                   neighbour_mib, watch_ms (vfio-exit). The jobs vfio... need a disk that the job disk has filled with that seed.
  --strict         the guest unmaps at once; without it, lazily, which is Linux's default
  --no-iommu       no IOMMU at all
  --queues N       queues of each device (1); its back-end needs as many
  --cpus N         processors of the guest (1)
  --shared-slot    all devices are functions of one slot, and so in one IOMMU group; without it each has its own
  --throttle N     QEMU's own disks do so many operations per second at most
  --monitor PATH   QEMU's monitor listens there (`stop`, `cont`, `info mtree`)
  --image KERNEL INITRAMFS
                   what `image` has printed, which is then not done again

SHOOTDOWN_GUEST_KERNEL is the root of an unpacked kernel package, if target/guest/kernel is not wanted.

QEMU says "vtd_iommu_translate: detected translation failure" and the guest "DMAR: ... PTE Read access is not set" once at each
boot: the firmware's last look at the disk, not a fault of the back-end. The exit status is 0 when the guest has come to its end and no
word was wrong; "foreign" words of the jobs vfio... are for you to look at.

An example, with the back-end in another terminal:
  truncate -s 64M /tmp/disk
  cargo run --release -p shootdown-vhost --example blk -- --socket /tmp/blk.sock --file /tmp/disk --latency-ms 5
  crates/shootdown-vhost/guest.sh boot --socket /tmp/blk.sock
and, when that has filled the disk, a program that unmaps memory under a read (with `blk --latency-ms 100`; add --fault answer-early to see
the read land in memory that is somebody else's: "foreign" is not 0):
  crates/shootdown-vhost/guest.sh boot --socket /tmp/blk.sock --job vfio
TEXT
}

fail() {
    echo "guest.sh: $*" >&2
    exit 1
}

here=$(cd "$(dirname "$0")" && pwd)
folder=$(realpath -m "${CARGO_TARGET_DIR:-$here/../../target}/guest")
kernel=${SHOOTDOWN_GUEST_KERNEL:-$folder/kernel}

fetch() {
    if compgen -G "$folder/kernel/boot/vmlinuz-*" >/dev/null; then
        return
    fi
    local package unfinished
    package=$(apt-cache depends linux-image-cloud-amd64 | awk '$1 == "Depends:" && $2 ~ /^linux-image-/ { print $2; exit }')
    [ -n "$package" ] || fail "apt knows no linux-image-cloud-amd64 (apt-get update?)"
    mkdir -p "$folder"
    unfinished=$(mktemp -d "$folder/fetch.XXXXXX")
    # The path of now: the variable is gone at the exit.
    # shellcheck disable=SC2064
    trap "rm -rf '$unfinished'" EXIT
    # As root, apt gives its right away, and then cannot write here.
    (cd "$unfinished" && apt-get -o APT::Sandbox::User=root -q download "$package" >&2)
    dpkg -x "$unfinished"/*.deb "$unfinished/kernel"
    mv "$unfinished/kernel" "$folder/kernel"
}

image() {
    local found target=x86_64-unknown-linux-gnu
    found=$(compgen -G "$kernel/boot/vmlinuz-*" | head -n 1) || fail "there is no kernel in $kernel: guest.sh fetch"
    # Nothing of what the tests themselves are built with.
    (
        cd "$here"
        unset CARGO_ENCODED_RUSTFLAGS
        RUSTFLAGS="-C target-feature=+crt-static -C strip=symbols" "${CARGO:-cargo}" build --quiet --release -p shootdown-guest \
            --target "$target" --target-dir "$folder" >&2
    )
    "$folder/$target/release/image" "$kernel" "$folder/$target/release/init" "$folder/initramfs"
    printf '%s\n' "$found" "$folder/initramfs"
}

boot() {
    local devices=() sets=() job=disk strict=0 iommu=1 queues=1 cpus=1 shared=0 throttle=0 monitor='' image=()
    while [ $# -gt 0 ]; do
        case $1 in
            --socket | --own) devices+=("$1" "${2:?$1 needs a path}") && shift 2 ;;
            --job) job=${2:?} && shift 2 ;;
            --set) sets+=("guest.${2:?}") && shift 2 ;;
            --strict) strict=1 && shift ;;
            --no-iommu) iommu=0 && shift ;;
            --queues) queues=${2:?} && shift 2 ;;
            --cpus) cpus=${2:?} && shift 2 ;;
            --shared-slot) shared=1 && shift ;;
            --throttle) throttle=${2:?} && shift 2 ;;
            --monitor) monitor=${2:?} && shift 2 ;;
            --image) image=("${2:?}" "${3:?}") && shift 3 ;;
            *) fail "$1 is not understood (--help)" ;;
        esac
    done
    [ ${#devices[@]} -gt 0 ] || fail "which device? (--help)"
    case $job in
        disk | speed) ;;
        vfio | vfio-exit) [ "$iommu" = 1 ] || fail "the job $job needs the IOMMU" ;;
        vfio-pair) [ "$iommu$shared" = 11 ] || fail "the job $job needs the IOMMU, and --shared-slot" ;;
        *) fail "the guest has no job $job (--help)" ;;
    esac
    local given=1
    if [ ${#image[@]} -eq 0 ]; then
        given=0
        local built
        built=$(image)
        mapfile -t image <<<"$built"
    fi

    local append="console=ttyS0 quiet panic=-1 oops=panic guest.job=$job ${sets[*]}" platform="" qemu=()
    if [ "$iommu" = 1 ]; then
        append+=" intel_iommu=on iommu.strict=$strict"
        platform=,iommu_platform=on,ats=on
        # Interrupts are not remapped: back-ends are handed plain event descriptors.
        qemu+=(-device "intel-iommu,intremap=off,device-iotlb=on")
    fi
    # Devices are behind root ports: on the root bus QEMU ignores `ats=on` silently.
    local index=0 place
    while [ $((index * 2)) -lt ${#devices[@]} ]; do
        local port=$index path=${devices[index * 2 + 1]}
        place=
        if [ "$shared" = 1 ]; then
            port=0
            place=,addr=0.$index,multifunction=on
        fi
        if [ "$index" = "$port" ]; then
            qemu+=(-device "pcie-root-port,id=port$port,chassis=$((port + 1)),slot=$((port + 1))")
        fi
        place="bus=port$port$place$platform,disable-legacy=on,num-queues=$queues"
        if [ "${devices[index * 2]}" = --own ]; then
            local drive="if=none,id=disk$index,format=raw,discard=unmap,file=$path"
            [ "$throttle" = 0 ] || drive+=",throttling.iops-total=$throttle"
            qemu+=(-drive "$drive" -device "virtio-blk-pci,drive=disk$index,$place")
        else
            qemu+=(-chardev "socket,id=disk$index,path=$path" -device "vhost-user-blk-pci,chardev=disk$index,$place")
        fi
        index=$((index + 1))
    done
    [ -z "$monitor" ] || qemu+=(-monitor "unix:$monitor,server,nowait")
    # A back-end maps the guest's memory, so that is a shared file.
    local command=(qemu-system-x86_64 -machine q35,accel=tcg,kernel-irqchip=split -cpu qemu64 -m 512 -smp "$cpus" \
        -object memory-backend-memfd,id=memory,size=512M,share=on -machine memory-backend=memory "${qemu[@]}" \
        -kernel "${image[0]}" -initrd "${image[1]}" -append "$append" \
        -nographic -no-reboot -nodefaults -serial stdio)
    # Who has given the image looks at the lines himself.
    [ "$given" = 0 ] || exec "${command[@]}"
    local said
    said=$(mktemp)
    trap "rm -f '$said'" EXIT
    "${command[@]}" | tee "$said"
    grep -q 'GUEST {"end":true}' "$said" || fail "the guest has not come to its end"
    ! grep -q '"wrong":[1-9]' "$said" || fail "words that were read are wrong"
}

case ${1:-} in
    fetch) fetch ;;
    image) image ;;
    boot) shift && boot "$@" ;;
    -h | --help) usage ;;
    *) usage >&2 && exit 2 ;;
esac
