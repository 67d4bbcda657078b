#!/bin/bash
# Rates and latencies of the engine on this machine: vbench drives vhost-blk through a real session, without a guest.
# BENCH_SECONDS (default 5) for each line. How to read the figures: docs/performance.md.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo build --release -p vhost-blk -p vbench
bin=${CARGO_TARGET_DIR:-target}/release
tmp=$(mktemp -d)
daemon=
end() { [ -z "$daemon" ] || { kill "$daemon" 2>/dev/null || true; wait "$daemon" 2>/dev/null || true; }; rm -rf "$tmp"; }
trap end EXIT

# Two CPUs that this process may use: one for the device, one for the driver.
read -r device driver _ < <(taskset -cp $$ | sed 's/.*: //' | tr ',' '\n' |
    awk -F- '{ for (i = $1; i <= ($2 == "" ? $1 : $2); i++) printf "%d ", i } END { print "" }')
[ -n "${driver:-}" ] || { echo "bench: needs two CPUs" >&2; exit 1; }

for backend in null:1G ram:256M; do
    "$bin/vhost-blk" --socket-path "$tmp/sock" --backend $backend --poll busy --cpus "$device" --log warn &
    daemon=$!
    for _ in {1..100}; do [ -S "$tmp/sock" ] && break; sleep 0.05; done
    for depth in 1 32; do
        echo "== $backend, queue depth $depth, device on CPU $device, driver on CPU $driver"
        "$bin/vbench" run --socket-path "$tmp/sock" --rw randread --bs 4k --iodepth $depth --cpu "$driver" \
            --runtime "${BENCH_SECONDS:-5}"
    done
    kill $daemon; wait $daemon; daemon=
done
