#!/bin/bash
# Rates, latencies and CPU time of the engine beside its peers, in the same run: vbench drives each back end in turn
# through a real session, without a guest. How to read the figures: docs/performance.md.
#
#   scripts/bench.sh [null|tmpfs|disk|pacing|idle|guest|all]   BENCH_ROUNDS (5) and BENCH_SECONDS (2) for each line
#   guest: with and without a virtual machine, BENCH_ROUNDS (11) of 200,000 requests; needs /dev/kvm
#   BENCH_DISK: where the image for "disk" is made (default: /var/tmp), BENCH_FLOOR: another floor to run beside ours
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-all}
rounds=${BENCH_ROUNDS:-5}
seconds=${BENCH_SECONDS:-2}

cargo build --release -p vhost-blk -p vbench -p kickless-guest -p kickless-tests --bins
bin=${CARGO_TARGET_DIR:-target}/release
tmp=$(mktemp -d)
shm=$(mktemp -d /dev/shm/kickless-XXXXXX)
disk=$(mktemp -d "${BENCH_DISK:-/var/tmp}/kickless-XXXXXX")
daemon=
end() { [ -z "$daemon" ] || { kill "$daemon" 2>/dev/null || true; wait "$daemon" 2>/dev/null || true; }; rm -rf "$tmp" "$shm" "$disk"; }
trap end EXIT

# Two CPUs that this process may use: one for the device, one for the driver.
read -r device driver _ < <(taskset -cp $$ | sed 's/.*: //' | tr ',' '\n' |
    awk -F- '{ for (i = $1; i <= ($2 == "" ? $1 : $2); i++) printf "%d ", i } END { print "" }')
[ -n "${driver:-}" ] || { echo "bench: needs two CPUs" >&2; exit 1; }

compare() { # DEPTH NAME=COMMAND...: the first is the reference
    local depth=$1 args=(); shift
    for backend in "$@"; do args+=(--backend "$backend"); done
    "$bin/vbench" compare --rounds "$rounds" --runtime "$seconds" --cpu "$driver" --iodepth "$depth" "${args[@]}"
}
ours() { echo "$bin/vhost-blk --cpus $device --log error --socket-path {socket} $*"; }
# qemu-storage-daemon, as it comes (its main loop does not poll) or with an I/O thread (which polls adaptively).
qsd() { # BLOCKDEV [iothread]
    command -v qemu-storage-daemon >/dev/null || return 0
    echo "qsd${2:+-$2}=taskset -c $device qemu-storage-daemon ${2:+--object iothread,id=t0} --blockdev $1,node-name=f --export" \
        "type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={socket},writable=on,num-queues=1${2:+,iothread=t0}"
}
image() { # PATH MIB: random content, all of it allocated
    head -c "$2M" /dev/urandom >"$1"; sync "$1"
}

if [ "$what" = null ] || [ "$what" = all ]; then
    for depth in 1 32; do
        echo "== null disk, depth $depth"
        peer=$(qsd driver=null-co,size=1073741824)
        polling=$(qsd driver=null-co,size=1073741824 iothread)
        compare $depth "floor=$bin/vbench floor --cpu $device --socket-path {socket}" \
            ${BENCH_FLOOR:+"other=$BENCH_FLOOR {socket}"} ${peer:+"$peer"} \
            ${polling:+"$polling"} "kickless=$(ours --backend null:1G --poll busy)"
    done
fi
if [ "$what" = tmpfs ] || [ "$what" = all ]; then
    echo "== 512 MiB file on tmpfs, depth 32"
    image "$shm/disk.img" 512
    peer=$(qsd "driver=file,filename=$shm/disk.img,aio=io_uring,cache.direct=off" iothread)
    compare 32 ${peer:+"$peer"} "kickless=$(ours --blk-file "$shm/disk.img" --poll busy)"
    rm "$shm/disk.img"
fi
if [ "$what" = disk ] || [ "$what" = all ]; then
    echo "== 1 GiB file on $(stat -f -c %T "$disk"), O_DIRECT, depth 32"
    image "$disk/disk.img" 1024
    peer=$(qsd "driver=file,filename=$disk/disk.img,aio=io_uring,cache.direct=on" iothread)
    compare 32 ${peer:+"$peer"} \
        "busy=$(ours --blk-file "$disk/disk.img" --poll busy)" \
        "adaptive=$(ours --blk-file "$disk/disk.img" --poll adaptive)" \
        "event=$(ours --blk-file "$disk/disk.img" --poll event)"
fi
if [ "$what" = pacing ] || [ "$what" = all ]; then
    for depth in 1 32; do
        echo "== adaptive beside busy, null disk, depth $depth"
        compare $depth "busy=$(ours --backend null:1G --poll busy)" "adaptive=$(ours --backend null:1G --poll adaptive)"
    done
fi
if [ "$what" = idle ] || [ "$what" = all ]; then
    for poll in adaptive event; do
        echo "== 256 idle disks on one reactor, --poll $poll"
        disks=()
        for i in {1..256}; do
            truncate -s 64M "$tmp/$i.img"
            disks+=(--disk "socket-path=$tmp/$i.sock,blk-file=$tmp/$i.img")
        done
        "$bin/vhost-blk" "${disks[@]}" --cpus "$device" --poll $poll --log error &
        daemon=$!
        until [ -S "$tmp/256.sock" ]; do sleep 0.05; done
        # Sixteen of them with a front end that is connected, has its queue running, and is then stopped itself.
        fronts=()
        for i in {1..16}; do
            "$bin/vbench" run --socket-path "$tmp/$i.sock" --rw randread --iodepth 1 --time-based --runtime 60 >/dev/null 2>&1 &
            fronts+=($!)
        done
        sleep 2; kill -STOP "${fronts[@]}"; sleep 1
        cpu() { cat /proc/$daemon/task/*/schedstat | awk '{ s += $1 } END { print s }'; }
        before=$(cpu); sleep 5; after=$(cpu)
        echo "   $(awk '/VmRSS/ { print $2, $3 }' /proc/$daemon/status) resident," \
            "$(awk "BEGIN { printf \"%.4f\", ($after - $before) / 5e7 }") % of a CPU over 5 s, 16 front ends attached"
        kill -KILL "${fronts[@]}"; wait "${fronts[@]}" 2>/dev/null || true
        kill $daemon; wait $daemon || true; daemon=
        rm -f "$tmp"/*
    done
fi
if [ "$what" = guest ] || [ "$what" = all ]; then
    echo "== what the virtual machine costs"
    "$bin/kvm-harness" latency --rounds "${BENCH_ROUNDS:-11}" --device-cpu "$device" --driver-cpu "$driver"
fi
