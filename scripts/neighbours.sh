#!/bin/bash
# What a busy guest costs its neighbours: disks of one daemon on one CPU, all driven by one thread of vbench on another.
#
#   scripts/neighbours.sh null|ram|file|luks   nine guests with one request each, alone and beside a tenth with DEEP (256) of
#                                         DEEP_BS (4k), DEEP_RW (randread); luks: volumes in sectors of BENCH_SECTOR (4096)
#   scripts/neighbours.sh crowd           a thousand disks added over the API: how long that takes and what is resident; then
#                                         twenty guests with one request each, of a daemon that has only these ("alone") and of
#                                         the one that has 980 more with guests that are idle; BENCH_CROWD (1000): how many disks
#   BENCH_ROUNDS (7) of BENCH_SECONDS (1) each way, after BENCH_RAMP (0.2) seconds that do not count; BENCH_POLL (adaptive);
#   BENCH_DISK: where images are made (/var/tmp); volumes on /dev/shm are read and written at once
#   BENCH_ARGS: more of the daemon's options, such as --shared-depth 16
#   BENCH_BIN: where programs are that are built already
#
# Each figure is the median of the guests'; lines are minimum / median / maximum of the rounds, of which every other one
# begins with the second way. So two runs of one way follow each other between rounds: "of one way" is how much those differ,
# for what is to be told from noise.
set -euo pipefail
cd "$(dirname "$0")/.."
kind=${1:-null}
rounds=${BENCH_ROUNDS:-7} seconds=${BENCH_SECONDS:-1}
bin=${BENCH_BIN:-}
if [ -z "$bin" ]; then
    cargo build --release -p vhost-blk -p vbench
    bin=${CARGO_TARGET_DIR:-target}/release
fi
tmp=$(mktemp -d -p "${BENCH_DISK:-/var/tmp}")
pids=()
end() {
    [ ! -s "$tmp/idler" ] || kill -KILL "$(cat "$tmp/idler")" 2>/dev/null || true
    [ ${#pids[@]} = 0 ] || { kill "${pids[@]}" 2>/dev/null || true; wait "${pids[@]}" 2>/dev/null || true; }
    rm -rf "$tmp"
}
trap end EXIT
read -r device driver _ < <(taskset -cp $$ | sed 's/.*: //' | tr ',' '\n' |
    awk -F- '{ for (i = $1; i <= ($2 == "" ? $1 : $2); i++) printf "%d ", i } END { print "" }')
[ -n "${driver:-}" ] || { echo "neighbours: needs two CPUs" >&2; exit 1; }
guests=9 disks=10
[ "$kind" != crowd ] || guests=20 disks=${BENCH_CROWD:-1000}
poll=${BENCH_POLL:-adaptive}
# Both daemons are on one CPU: the one that is not asked has to sleep.
[ "$kind $poll" != "crowd busy" ] || { echo "neighbours: a crowd cannot be compared with --poll busy" >&2; exit 2; }

# shellcheck disable=SC2206 # words
args=(--poll "$poll" --cpus "$device" --log error ${BENCH_ARGS:-})
mkdir "$tmp/alone" "$tmp/beside"
disk() { # WAY NUMBER
    case $kind in
    null | crowd) what=backend=null:1G ;;
    ram) what=backend=ram:16M ;;
    file) # Of 256 MiB each, written: holes would be read without the disk.
        dd if=/dev/urandom of="$tmp/$2.img" bs=1M count=256 status=none
        what=blk-file=$tmp/$2.img,direct=on ;;
    luks)
        dd if=/dev/urandom of="$tmp/$2.img" bs=1M count=80 status=none
        cryptsetup luksFormat -q --type luks2 --sector-size "${BENCH_SECTOR:-4096}" --pbkdf pbkdf2 \
            --pbkdf-force-iterations 1000 "$tmp/$2.img" - <<<key
        printf 'key\n' >"$tmp/key"
        what=blk-file=$tmp/$2.img,direct=on,format=luks,key-file=$tmp/key ;;
    *) echo "neighbours: $kind is none of null, ram, file, luks, crowd" >&2; exit 2 ;;
    esac
    named+=(--disk "socket-path=$tmp/$1/$2.sock,$what")
}
named=()
way=beside
[ "$kind" != crowd ] || way=alone
first=$disks
[ "$kind" != crowd ] || first=$guests
for ((i = 0; i < first; i++)); do disk "$way" "$i"; done
sync
"$bin/vhost-blk" "${args[@]}" "${named[@]}" & pids+=($!)
if [ "$kind" = crowd ]; then
    "$bin/vhost-blk" "${args[@]}" --api "$tmp/api" & pids+=($!)
    until [ -S "$tmp/api" ]; do sleep 0.05; done
    python3 - "$tmp" "$disks" <<'END'
import http.client, json, socket, sys, time
tmp, disks = sys.argv[1], int(sys.argv[2])
api = http.client.HTTPConnection("vhost-blk")
api.sock = socket.socket(socket.AF_UNIX)
api.sock.connect(tmp + "/api")
begun = time.monotonic()
for i in range(disks):
    disk = {"name": f"d{i}", "socket-path": f"{tmp}/beside/{i}.sock", "backend": "null:1G"}
    api.request("POST", "/v1/disks", json.dumps(disk), {"Content-Type": "application/json"})
    answer = api.getresponse()
    said = answer.read()
    assert answer.status == 201, said
print(f"{disks} disks added in {time.monotonic() - begun:.2f} s")
END
else
    # One daemon serves both ways.
    rmdir "$tmp/alone"
    ln -s beside "$tmp/alone"
fi
resident() { awk -v when="$1" '/^VmRSS/ { printf "%.0f MiB resident %s\n", $2 / 1024, when }' "/proc/${pids[1]}/status"; }
[ "$kind" != crowd ] || resident "without guests"
until [ -S "$tmp/beside/$((disks - 1)).sock" ] && [ -S "$tmp/alone/$((guests - 1)).sock" ]; do sleep 0.05; done

jobs() { # WAY FIRST LAST DEPTH BS RW
    for ((i = $2; i <= $3; i++)); do
        printf '[%s-%d]\nsocket_path=%s\niodepth=%d\nbs=%s\nrw=%s\n' "$([ "$4" = 1 ] && echo small || echo deep)" "$i" "$tmp/$1/$i.sock" "$4" "$5" "${6:-randread}"
    done
}
head="[global]
norandommap
time_based
ramp_time=${BENCH_RAMP:-0.2}
runtime=$seconds
one_thread
cpus_allowed=$driver
"
for way in alone beside; do { echo "$head"; jobs $way 0 $((guests - 1)) 1 4k; } >"$tmp/$way.fio"; done
[ "$kind" = crowd ] || jobs beside 9 9 "${DEEP:-256}" "${DEEP_BS:-4k}" "${DEEP_RW:-randread}" >>"$tmp/beside.fio"

# p50 and p99 in µs, the median of the guests', and the IOPS of the deep one.
run() {
    "$bin/vbench" run "$tmp/$1.fio" --json=- | awk -v way="$1" '
        /"jobname":/ { split($2, n, "\""); name = n[2] }
        /"read": \{/ { reads = 1 } /"(trim|write)": \{/ { reads = 0 }
        reads && /"clat_ns":/ { clat = 1 } /"lat_ns":/ && !/"clat_ns":/ { clat = 0 }
        reads && clat && /"50.000000":/ && name ~ /^small/ { a[++na] = $2 + 0 }
        reads && clat && /"99.000000":/ && name ~ /^small/ { b[++nb] = $2 + 0 }
        /"iops":/ && name ~ /^deep/ { deep += $2 }
        function median(v, n,   i, j, t) {
            for (i = 1; i <= n; i++) for (j = i + 1; j <= n; j++) if (v[j] < v[i]) { t = v[i]; v[i] = v[j]; v[j] = t }
            return v[int((n + 1) / 2)]
        }
        END { printf "%s %.1f %.1f %d\n", way, median(a, na) / 1000, median(b, nb) / 1000, deep }'
}
idle() { # Connects the rest, each with its queue running; they ask for nothing more, and are stopped themselves: in idler.
    { echo "${head/cpus_allowed=$driver/completion=interrupt}"; jobs beside $guests $((disks - 1)) 1 4k; } |
        sed -e '/one_thread/d' -e 's/^runtime=.*/runtime=600\nrate_iops=1/' >"$tmp/idle.fio"
    "$bin/vbench" run "$tmp/idle.fio" >/dev/null 2>&1 &
    idler=$!
    echo $idler >"$tmp/idler"
    until [ "$(ls /proc/$idler/task | wc -l)" -gt $((disks - guests)) ]; do sleep 0.1; done
    sleep 2
    kill -STOP $idler
}
if [ "$kind" = crowd ]; then
    idle
    resident "with all guests"
fi
for ((r = 0; r < rounds; r++)); do
    if ((r % 2)); then run beside; run alone; else run alone; run beside; fi
done | tee "$tmp/out"
awk '
    function sort(v, n,   i, j, t) {
        for (i = 2; i <= n; i++) {
            t = v[i]
            for (j = i - 1; j >= 1 && v[j] > t; j--) v[j + 1] = v[j]
            v[j + 1] = t
        }
    }
    function say(what, v, n) {
        sort(v, n)
        printf "%-26s %8.2f / %8.2f / %8.2f\n", what, v[1], v[int((n + 1) / 2)], v[n]
    }
    # Between which ranks the median of all such pairs is, 19 times of 20 (the sign test); how many pairs are within 10 %.
    function pairs(what, v, n,   i, low, within) {
        say(what, v, n)
        low = int((n + 1) / 2 - 0.98 * sqrt(n))
        for (i = 1; i <= n; i++) within += v[i] <= 1.1
        if (low >= 1) printf "%-26s %8.2f to %8.2f; %d of %d pairs within 1.1\n", "  the median, at 95 %", v[low], v[n + 1 - low], within, n
    }
    $1 == last { same[++ns] = $3 / before }
    { last = $1; before = $3 }
    $1 == "alone" { a50[++n] = $2; a99[n] = $3 }
    $1 == "beside" { b50[++m] = $2; b99[m] = $3; deep[m] = $4 }
    END {
        for (i = 1; i <= m; i++) ratio[i] = b99[i] / a99[i]
        pairs("p99 beside to alone", ratio, m)
        if (ns) pairs("p99 of one way", same, ns)
        say("p50 alone, us", a50, n); say("p99 alone, us", a99, n)
        say("p50 beside, us", b50, m); say("p99 beside, us", b99, m)
        say("IOPS of the deep one", deep, m)
    }' "$tmp/out"
