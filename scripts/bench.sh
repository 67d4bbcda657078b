#!/bin/bash
# Rates, latencies and CPU time of the engine beside its peers, in the same run: vbench drives each back end in turn
# through a real session, without a guest. How to read the figures: docs/performance.md.
#
#   scripts/bench.sh [null|load|ram|tmpfs|disk|net|pacing|idle|guest|ring|all]   BENCH_ROUNDS (5) and BENCH_SECONDS (2) for each run
#   What is compared with what is in bench/matrices. BENCH_PAGES: directory for a page and JSON of each comparison
#   ring: nanoseconds of the steps of a request on the ring, on one CPU; not in "all" (ring FILTER: those so named)
#   guest: with and without a virtual machine, BENCH_ROUNDS (11) of 200,000 requests; needs /dev/kvm
#   BENCH_DISK: where the image for "disk" is made (default: /var/tmp), BENCH_FLOOR: another floor to run beside ours
#   BENCH_SPDK: SPDK's vhost, to run beside us in "null"
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-all}
rounds=${BENCH_ROUNDS:-5}
seconds=${BENCH_SECONDS:-2}

if [ "$what" = ring ]; then
    exec cargo bench -p poll-engine --bench ring -- "${@:2}"
fi
cargo build --release -p vhost-blk -p vhost-net -p vbench -p kickless-guest -p kickless-tests --bins --features kickless-guest/bare
bin=${CARGO_TARGET_DIR:-target}/release
tmp=$(mktemp -d)
daemon=
end() { [ -z "$daemon" ] || { kill "$daemon" 2>/dev/null || true; wait "$daemon" 2>/dev/null || true; }; rm -rf "$tmp"; }
trap end EXIT

# Two CPUs that this process may use: one for the device, one for the driver.
read -r device driver _ < <(taskset -cp $$ | sed 's/.*: //' | tr ',' '\n' |
    awk -F- '{ for (i = $1; i <= ($2 == "" ? $1 : $2); i++) printf "%d ", i } END { print "" }')
[ -n "${driver:-}" ] || { echo "bench: needs two CPUs" >&2; exit 1; }

[ -z "${BENCH_PAGES:-}" ] || mkdir -p "$BENCH_PAGES"
compare() { # NAME MATRIX OPTION...
    local pages=()
    [ -z "${BENCH_PAGES:-}" ] || pages=(--html "$BENCH_PAGES/$1.html" --json "$BENCH_PAGES/$1.json")
    "$bin/vbench" compare "bench/matrices/$2.toml" --rounds "$rounds" --runtime "$seconds" --cpu "$driver" "${pages[@]}" "${@:3}"
}

if [ "$what" = null ] || [ "$what" = all ]; then
    compare null null --workload "null disk" ${BENCH_SPDK:+--spdk "$BENCH_SPDK"} ${BENCH_FLOOR:+--backend "other=$BENCH_FLOOR {socket}"}
fi
if [ "$what" = load ] || [ "$what" = all ]; then
    compare load null --workload load --only floor,qsd,qsd-iothread,busy,adaptive
fi
if [ "$what" = ram ] || [ "$what" = all ]; then
    compare ram ram
fi
if [ "$what" = tmpfs ] || [ "$what" = all ]; then
    compare tmpfs tmpfs
fi
if [ "$what" = disk ] || [ "$what" = all ]; then
    echo "== on $(stat -f -c %T "${BENCH_DISK:-/var/tmp}")"
    compare disk disk --image-dir "${BENCH_DISK:-/var/tmp}"
fi
if [ "$what" = net ] || [ "$what" = all ]; then
    compare net net
    compare net-switch net-switch
fi
if [ "$what" = pacing ] || [ "$what" = all ]; then
    compare pacing null --only busy,adaptive
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
