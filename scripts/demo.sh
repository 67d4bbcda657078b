#!/bin/bash
# The demonstration: serves a disk image with vhost-blk, boots a Linux guest on it with QEMU, makes a file system,
# loads it with fio (which verifies every block), and shows what the guest and the daemon have measured.
# Everything happens in one temporary directory and is gone afterwards. Needs no root.
#
# KICKLESS_ACCEL=kvm or =tcg says how to run the guest, DEMO_SECONDS (default 15) how long to load it.
set -euo pipefail
export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin"
cd "$(dirname "$0")/.."

seconds=${DEMO_SECONDS:-15}
guest=${KICKLESS_GUEST_DIR:-target/guest}
bin=${CARGO_TARGET_DIR:-target}/release/vhost-blk
say() { printf '\n[%3d s] %s\n' "$SECONDS" "$*"; }
tmp='' daemon='' qemu=''

stop() { # PID: ends one of ours, by force if need be
    [ -n "$1" ] && kill "$1" 2>/dev/null || return 0
    for _ in {1..50}; do kill -0 "$1" 2>/dev/null || break; sleep 0.1; done
    kill -9 "$1" 2>/dev/null || true
    wait "$1" 2>/dev/null || true
}
cleanup() {
    local code=$?
    trap - EXIT
    stop "$qemu"
    stop "$daemon"
    if [ $code != 0 ] && [ -n "$tmp" ]; then
        for log in kernel qemu daemon; do
            [ ! -s "$tmp/$log.log" ] || { echo "---- end of $log.log"; tail -n 15 "$tmp/$log.log"; }
        done
        echo "demo: FAILED (exit code $code)"
    fi >&2
    [ -z "$tmp" ] || rm -rf "$tmp"
    exit $code
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
fail() { echo "demo: $*" >&2; exit 1; }

say "Building vhost-blk (release)."
cargo build --release -p vhost-blk
say "Making the guest: Debian's kernel, an initramfs of this system's programs."
scripts/guest-image.sh "$guest"

# A short path, as Unix sockets need; not on a RAM disk if it can be helped, where there is no direct I/O.
tmp=$(mktemp -d -p "${TMPDIR:-/var/tmp}" kickless-demo.XXXXXX)

say "Creating a sparse image of 1 GiB, its first 8 MiB random."
truncate -s 1G "$tmp/disk.img"
dd if=/dev/urandom of="$tmp/disk.img" bs=1M count=8 conv=notrunc status=none
host_sum=$(head -c 8M "$tmp/disk.img" | sha256sum | cut -d' ' -f1)

say "Starting the daemon:"
args=(--socket-path "$tmp/blk.sock" --blk-file "$tmp/disk.img" --num-queues 4 --poll adaptive)
echo "        vhost-blk ${args[*]}"
"$bin" "${args[@]}" >>"$tmp/stats" 2>"$tmp/daemon.log" &
daemon=$!
for _ in {1..100}; do
    [ -S "$tmp/blk.sock" ] && break
    kill -0 $daemon 2>/dev/null || fail "the daemon has ended at once"
    sleep 0.1
done
[ -S "$tmp/blk.sock" ] || fail "the daemon does not listen"

# The guest's init takes commands on a virtio-serial port, whose other end is a pair of FIFOs.
mkfifo "$tmp/agent.in" "$tmp/agent.out"
exec 3<>"$tmp/agent.in" 4<>"$tmp/agent.out"
id=0
out=''

await() { # SECONDS PREFIX: reads what the guest says up to a line with this prefix, which is left in $line
    local end=$((SECONDS + $1))
    out=''
    while [ $SECONDS -lt $end ]; do
        if IFS= read -r -t 1 line <&4; then
            line=${line%$'\r'}
            [[ $line != "$2"* ]] || return 0
            out+=$line$'\n'
        elif ! kill -0 "$qemu" 2>/dev/null; then
            return 1
        fi
    done
    return 1
}
in_guest() { # LIMIT COMMAND: runs it in the guest; its output is left in $out
    id=$((id + 1))
    printf '%s %s\n' "$id" "$2" >&3
    await "$1" "@@END $id " || fail "no answer from the guest within $1 s to: $2"$'\n'"$out"
    [ "$line" = "@@END $id 0@@" ] || fail "failed in the guest: $2"$'\n'"$out"
    out=${out%$'\n'}
}

boot() { # ACCELERATOR LIMIT
    local cpu=Nehalem accel=tcg,thread=multi
    [ "$1" = tcg ] || { cpu=host,arch-capabilities=off accel=kvm; }
    qemu-system-x86_64 -accel $accel -cpu $cpu -smp 4 -m 1G -nodefaults -display none -no-reboot \
        -object memory-backend-memfd,id=mem,size=1G,share=on -machine q35,memory-backend=mem \
        -chardev "socket,id=disk,path=$tmp/blk.sock" -device vhost-user-blk-pci,chardev=disk,num-queues=4 \
        -kernel "$guest/vmlinuz" -initrd "$guest/initramfs" \
        -append "console=ttyS0 loglevel=5 panic=-1 mitigations=off no_timer_check cryptomgr.notests" \
        -serial "file:$tmp/kernel.log" -chardev "pipe,id=agent,path=$tmp/agent" \
        -device virtio-serial-pci -device virtserialport,chardev=agent,nr=1 \
        >"$tmp/qemu.log" 2>&1 3>&- 4>&- &
    qemu=$!
    await "$2" '@@AGENT READY@@'
}

# As the tests do: /dev/kvm may be there and yet be far too slow (nested, emulated), so the first boot tells.
case ${KICKLESS_ACCEL:-} in
    kvm | tcg) accel=$KICKLESS_ACCEL ;;
    '') accel=tcg
        if [ -r /dev/kvm ] && [ -w /dev/kvm ]; then
            accel=try
            [ ! -s "$guest/accel" ] || accel=$(head -n 1 "$guest/accel")
        fi ;;
    *) fail "KICKLESS_ACCEL is kvm or tcg" ;;
esac
if [ $accel = try ]; then
    say "Booting the guest under KVM."
    start=$SECONDS
    if boot kvm 12; then
        accel=kvm
        printf 'kvm\na guest boots in %d s under KVM\n' $((SECONDS - start)) >"$guest/accel" || true
    else
        say "KVM does not boot the guest within 12 s on this machine; using emulation (TCG) instead."
        stop "$qemu"
        qemu='' accel=tcg
        printf 'tcg\nKVM is there, but a guest does not boot within 12 s under it\n' >"$guest/accel" || true
    fi
fi
if [ -z "$qemu" ]; then
    say "Booting the guest (QEMU, $accel, 4 CPUs, vhost-user-blk-pci with 4 queues)."
    boot $accel 90 || fail "the guest does not boot"
fi

say "The guest is up. It reads what the host has put on the disk:"
in_guest 60 'dd if=/dev/vda bs=1M count=8 iflag=direct 2>/dev/null | sha256sum'
[ "${out%% *}" = "$host_sum" ] || fail "the guest reads ${out%% *}, the host wrote $host_sum"
echo "        sha256 ${host_sum:0:16}... on both sides"

say "Making an ext4 file system in the guest, with a file of 16 MiB that is read back after remounting."
in_guest 90 'mkfs.ext4 -q -F /dev/vda && mount /dev/vda /mnt'
in_guest 90 'dd if=/dev/urandom of=/mnt/file bs=1M count=16 2>/dev/null && sha256sum /mnt/file'
file_sum=$out
in_guest 90 'umount /mnt && mount /dev/vda /mnt && sha256sum /mnt/file'
[ "$out" = "$file_sum" ] || fail "the file has changed: $file_sum, now $out"
echo "        sha256 ${file_sum:0:16}... before and after"

statistics() { # waits for the report that SIGUSR1 asks for, and leaves it in $report
    : >"$tmp/stats"
    kill -USR1 $daemon
    for _ in {1..50}; do
        report=$(<"$tmp/stats")
        # The report of a disk ends with the line of all queues, or errors after it, and an empty line.
        ! grep -q '^all ' <<<"$report" || return 0
        sleep 0.1
    done
    fail "the daemon does not answer SIGUSR1"
}
column() { # NAME: of the line of all queues in $report
    awk -v name="$1" '$1 == "queue" { for (i = 1; i <= NF; i++) at[$i] = i }
        $1 == "all" { print (name in at) ? $at[name] : "-" }' <<<"$report"
}

say "Loading it for about $seconds s: fio, 4 jobs, 64 requests in flight each, 4 KiB random reads and writes, all verified."
statistics
before=$(column requests)
in_guest $((seconds * 4 + 60)) "cd /mnt && fio --name=load --size=48m --rw=randrw --bs=4k --ioengine=libaio --direct=1 \
--iodepth=64 --numjobs=4 --verify=crc32c --verify_fatal=1 --verify_backlog=512 --time_based --runtime=$seconds \
--fallocate=native --eta=never --group_reporting --percentile_list=50:99:99.9 --output-format=terse --terse-version=3 --output=/tmp/fio && cat /tmp/fio"
terse=$(grep '^3;' <<<"$out") || fail "fio says: $out"
statistics
after=$(column requests)
errors=$(column errors)
[ "$(cut -d';' -f5 <<<"$terse")" = 0 ] || fail "fio reports an error: $terse"
[ "$errors" = 0 ] || fail "the daemon has counted $errors errors:"$'\n'"$report"

echo
awk -F';' -v secs="$seconds" -v requests=$((after - before)) -v p50="$(column p50-us)" -v p99="$(column p99-us)" \
    -v p999="$(column p99.9-us)" -v max="$(column max-us)" '
    function percentile(from, which,   i, part) { # of the 20 fields "50.000000%=123" from field `from` on
        for (i = from; i < from + 20; i++) if (split($i, part, "%=") == 2 && part[1] + 0 == which) return part[2]
        return "-"
    }
    function row(what, a, b, c) { printf "        %-22s %14s %14s %16s\n", what, a, b, c }
    {
        row("", "guest reads", "guest writes", "daemon, all")
        row("IOPS", int($8), int($49), int(requests * 1000 / ($9 > $50 ? $9 : $50)))
        row("latency us, median", percentile(18, 50), percentile(59, 50), p50)
        row("latency us, 99 %", percentile(18, 99), percentile(59, 99), p99)
        row("latency us, 99.9 %", percentile(18, 99.9), percentile(59, 99.9), p999)
        row("latency us, worst", int($39), int($80), max)
    }' <<<"$terse"
echo "        Guest: as fio sees it, queueing in the guest included; verification reads count as reads."
echo "        Daemon: from taking a request off the ring to giving it back; latencies since it was started."
[ $accel = kvm ] || echo "        The guest is emulated (TCG), so its own figures say nothing about a real one's."
say "What the daemon has counted (kill -USR1), by queue; docs/operations.md explains the columns:"
# shellcheck disable=SC2001 # a prefix for each line
sed 's/^/        /' <<<"$report"

say "Shutting the guest down."
in_guest 60 'cd / && umount /mnt && e2fsck -fn /dev/vda'
printf '%s poweroff -f\n' $((id + 1)) >&3
for _ in {1..200}; do kill -0 $qemu 2>/dev/null || break; sleep 0.1; done
! kill -0 $qemu 2>/dev/null || fail "QEMU does not end"
wait $qemu || fail "QEMU has ended with exit code $?"
qemu=''
say "Stopping the daemon (SIGTERM)."
kill $daemon
code=0
wait $daemon || code=$?
daemon=''
[ $code = 0 ] || fail "the daemon has ended with exit code $code"
[ ! -e "$tmp/blk.sock" ] || fail "the daemon has left its socket behind"
e2fsck -fn "$tmp/disk.img" >"$tmp/fsck.log" 2>&1 || fail "the file system is not clean: $(cat "$tmp/fsck.log")"
say "Done: every block verified, no errors, file system clean as the guest and the host see it."
