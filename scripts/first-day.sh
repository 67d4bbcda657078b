#!/bin/bash
# The first day with a daemon, as docs/operations.md tells it, at one go: two guests, watch, grow, limit, upgrade, recover.
# The guests are vbench's drivers, which verify what they read. Half a minute; needs no root. KICKLESS_BIN_DIR says where
# the programs are (target/debug).
set -euo pipefail
cd "$(dirname "$0")/.."

bin=${KICKLESS_BIN_DIR:-${CARGO_TARGET_DIR:-target}/debug}
dir=$(mktemp -d)
pids=()
cleanup() {
    [ ${#pids[@]} = 0 ] || kill -9 "${pids[@]}" 2>/dev/null || true
    rm -rf "$dir"
}
trap cleanup EXIT

step() { echo "== $*"; }
fail() {
    echo "first-day: $*" >&2
    tail -n 20 "$dir"/*.log >&2
    exit 1
}
# WHAT COMMAND...: waits until the command succeeds.
until_true() {
    for _ in $(seq 600); do
        if "${@:2}" 2>/dev/null; then return; fi
        sleep 0.1
    done
    fail "$1: not within a minute"
}
# LOG [OPTION...]: a daemon that serves what the file says, in the background.
serve() {
    "$bin/vhost-blk" --config "$dir/disks.toml" --control "$dir/control" "${@:2}" >>"$dir/statistics" 2>"$dir/$1.log" &
    daemon=$!
    pids+=("$daemon")
}
says() { grep -q "$2" "$dir/$1.log"; }
# NAME OPTION...: a guest on the disk of this name.
guest() { "$bin/vbench" run --socket-path "$dir/$1.sock" --bs 4k --iodepth 8 "${@:2}" >"$dir/$1-guest.log" 2>&1; }

step "two disks, and a file that says so"
truncate -s 8M "$dir/a.img" "$dir/b.img"
cat >"$dir/disks.toml" <<EOF
direct = "off"
[[disk]]
name = "a"
socket-path = "$dir/a.sock"
blk-file = "$dir/a.img"
[[disk]]
name = "b"
socket-path = "$dir/b.sock"
blk-file = "$dir/b.img"
EOF
"$bin/vhost-blk" --config "$dir/disks.toml" --check
serve first
until_true "the sockets" test -S "$dir/b.sock" -a -S "$dir/control"

step "two guests, which write and read back"
guest a --rw randwrite --verify crc32c || fail "guest a"
guest b --rw randwrite --verify crc32c || fail "guest b"

step "watch"
kill -USR1 $daemon
until_true "statistics of both" grep -q "b 8388608 bytes" "$dir/statistics"
awk '$1 == "all" && $2 < 2048 { exit 1 }' "$dir/statistics" || fail "too few requests are counted"

step "grow"
truncate -s 16M "$dir/a.img"
kill -HUP $daemon
until_true "the new size" says first "a has grown to 16777216 bytes"

step "limit b, by an upgrade under load"
sed -i '$a limit = "iops-total=2000"' "$dir/disks.toml"
guest a --rw randread --verify crc32c --size 8M --time-based --runtime 4 &
load=$!
pids+=("$load")
sleep 1
old=$daemon
serve second --takeover "$dir/control"
wait $old || fail "the old daemon did not end well"
says first "handed over" || fail "nothing was handed over"
wait $load || fail "guest a has noticed"

step "recover from a crash"
kill -9 $daemon
wait $daemon 2>/dev/null || true
rm -f "$dir/a.sock" "$dir/b.sock"
serve third
until_true "the sockets" test -S "$dir/b.sock"
guest a --rw randread --verify crc32c --size 8M || fail "guest a finds other data"
guest b --rw randread --verify crc32c || fail "guest b finds other data"

step "stop"
kill -TERM $daemon
wait $daemon || fail "it did not end well"
[ ! -e "$dir/a.sock" ] || fail "a socket is left behind"
echo "first-day: all of it went well"
