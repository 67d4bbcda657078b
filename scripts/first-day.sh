#!/bin/bash
# The first day with a daemon, as docs/operations.md tells it, at one go: install, two virtual machines, watch, limit, grow,
# upgrade, recover. The machines are Linux in QEMU where there is one (scripts/guest-image.sh), else vbench's drivers; all
# that they write is verified. Everything is in one temporary directory, and gone afterwards. A minute; no root.
#
#   scripts/first-day.sh [PROFILE]     of what `cargo build --profile PROFILE --workspace --bins` has built (dev)
set -euo pipefail
export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin"
cd "$(dirname "$0")/.."

guest=${KICKLESS_GUEST_DIR:-target/guest}
dir=$(mktemp -d -p "${TMPDIR:-/var/tmp}" kickless-first-day.XXXXXX)
pids=()
cleanup() {
    [ ${#pids[@]} = 0 ] || { kill -9 "${pids[@]}" && wait; } 2>/dev/null || true
    rm -rf "$dir"
}
trap cleanup EXIT

step() { echo "== [$SECONDS s] $*"; }
fail() {
    echo "first-day: $*" >&2
    tail -n 20 "$dir"/*.log >&2
    exit 1
}
# WHAT COMMAND...: waits until the command succeeds.
until_true() {
    for _ in $(seq 600); do
        if "${@:2}" >/dev/null 2>&1; then return; fi
        sleep 0.1
    done
    fail "$1: not within a minute"
}
# LOG [OPTION...]: a daemon that serves what the file says, in the background.
serve() {
    vhost-blk --config "$dir/disks.toml" --control "$dir/control" "${@:2}" >>"$dir/statistics" 2>"$dir/$1.log" &
    daemon=$!
    pids+=("$daemon")
}
says() { grep -q "$2" "$dir/$1.log"; }
ask() { vhostctl --api "$dir/api" "$@"; }
has() { ask "${@:2}" | grep -q -- "$1"; }
requests_of() { ask metrics | awk -v disk="disk=\"$1\"" '/^vhost_blk_requests_total/ && index($0, disk) { n += $NF } END { print n + 0 }'; }
# More of it than when it was first asked for.
is_loaded() {
    local now
    now=$(requests_of "$1")
    if [ "${loaded:=$now}" -lt "$now" ]; then unset loaded; else false; fi
}

# What a virtual machine does, by its name.
if [ -f "$guest/vmlinuz" ] && command -v qemu-system-x86_64 >/dev/null; then
    machines="Linux in QEMU"
    accel=tcg,thread=multi cpu=Nehalem
    # What the tests have found out about this machine.
    if [ "$(head -n 1 "$guest/accel" 2>/dev/null)" = kvm ]; then accel=kvm cpu=host,arch-capabilities=off; fi
    declare -A to from sum qemu

    await() { # NAME PREFIX: reads what the machine says up to a line with this prefix, which is left in $line
        local end=$((SECONDS + 120))
        out=''
        while [ $SECONDS -lt $end ]; do
            if IFS= read -r -t 1 -u "${from[$1]}" line; then
                line=${line%$'\r'}
                [[ $line != "$2"* ]] || return 0
                out+=$line$'\n'
            elif ! kill -0 "${qemu[$1]}" 2>/dev/null; then
                fail "the machine of $1 has ended"
            fi
        done
        fail "no answer from $1 within two minutes: $out"
    }
    in_guest() { # NAME COMMAND: its output is left in $out
        local id=${EPOCHREALTIME/./}
        # A line for a command.
        echo "$id ${2//$'\n'/ }" >&"${to[$1]}"
        await "$1" "@@END $id "
        [ "$line" = "@@END $id 0@@" ] || fail "failed in $1: $2"$'\n'"$out"
        out=${out%$'\n'}
    }
    boot() {
        mkfifo "$dir/$1.in" "$dir/$1.out"
        exec {fd}<>"$dir/$1.in"
        to[$1]=$fd
        exec {fd}<>"$dir/$1.out"
        from[$1]=$fd
        qemu-system-x86_64 -accel $accel -cpu $cpu -smp 2 -m 384M -nodefaults -display none -no-reboot \
            -object memory-backend-memfd,id=mem,size=384M,share=on -machine q35,memory-backend=mem \
            -chardev "socket,id=disk,path=$dir/$1.sock,reconnect=1" -device vhost-user-blk-pci,chardev=disk \
            -kernel "$guest/vmlinuz" -initrd "$guest/initramfs" \
            -append "console=ttyS0 loglevel=5 panic=-1 mitigations=off no_timer_check cryptomgr.notests" \
            -serial "file:$dir/$1-kernel.log" -chardev "pipe,id=agent,path=$dir/$1" \
            -device virtio-serial-pci -device virtserialport,chardev=agent,nr=1 >"$dir/$1-qemu.log" 2>&1 &
        qemu[$1]=$!
        pids+=($!)
    }
    is_up() { await "$1" '@@AGENT READY@@'; }
    fill() {
        in_guest "$1" 'mkfs.ext4 -q -F /dev/vda && mount /dev/vda /mnt &&
            dd if=/dev/urandom of=/mnt/file bs=1M count=4 2>/dev/null && sync && sha256sum /mnt/file'
        sum[$1]=$out
    }
    # Verified reads and writes, until they are told to end.
    begin_load() {
        in_guest "$1" "(until test -e /tmp/stop; do
                fio --name=load --directory=/mnt --size=8m --rw=randrw --bs=4k --ioengine=libaio --direct=1 \
                    --iodepth=16 --verify=crc32c --verify_fatal=1 --verify_backlog=256 --time_based --runtime=1 \
                    --fallocate=native --eta=never --output=/tmp/fio || { touch /tmp/failed; break; };
            done; touch /tmp/done) >/dev/null 2>&1 &"
    }
    end_load() {
        in_guest "$1" 'touch /tmp/stop; until test -e /tmp/done; do sleep 0.1; done; rm /tmp/stop /tmp/done;
            test ! -e /tmp/failed || { cat /tmp/fio; false; }'
    }
    check() {
        in_guest "$1" 'umount /mnt && mount /dev/vda /mnt && sha256sum /mnt/file'
        [ "$out" = "${sum[$1]}" ] || fail "$1 finds other data"
    }
    sees_size() { in_guest "$1" "until test \$(blockdev --getsize64 /dev/vda) = $2; do sleep 0.1; done"; }
else
    machines="vbench's drivers, for want of QEMU or scripts/guest-image.sh"
    drive() { vbench run --socket-path "$dir/$1.sock" --bs 4k --iodepth 8 --verify crc32c "${@:2}" >"$dir/$1-guest.log" 2>&1; }
    boot() { :; }
    is_up() { drive "$1" --rw randwrite --size 64k; }
    fill() { drive "$1" --rw randwrite --size 8M; }
    begin_load() {
        rm -f "$dir/stop"
        (until [ -e "$dir/stop" ]; do drive "$1" --rw randread --size 8M --time-based --runtime 1 || exit 1; done) &
        load=$!
        pids+=("$load")
    }
    end_load() {
        touch "$dir/stop"
        wait $load || fail "$1 has noticed"
    }
    check() { drive "$1" --rw randread --size 8M; }
    sees_size() { vbench run --socket-path "$dir/$1.sock" --rw read --bs 4k --number-ios 1 --offset $(($2 - 4096)); }
fi

step "install"
scripts/install.sh "$dir/root" "${1:-dev}"
PATH="$dir/root/usr/bin:$PATH"
for program in vhost-blk vhost-net vdpactl sriov vhostctl vbench; do
    [ "$(command -v $program)" = "$dir/root/usr/bin/$program" ] || fail "$program is not installed"
    $program --version >/dev/null
    gunzip -c "$dir/root/usr/share/man/man1/$program.1.gz" | grep -q '^\.TH' || fail "$program has no manual page"
done

step "two disks, and a file that says so"
truncate -s 64M "$dir/a.img" "$dir/b.img"
cat >"$dir/disks.toml" <<EOF
api = "$dir/api"
num-queues = 2
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
vhost-blk --config "$dir/disks.toml" --check
serve first
until_true "the daemon" ask info

step "two virtual machines, $machines, which write and read back"
boot a
boot b
for name in a b; do
    is_up $name
    fill $name
    check $name
done

step "watch"
ask list
for name in a b; do
    [ "$(requests_of $name)" -gt 100 ] || fail "too few requests of $name are counted"
done
kill -USR1 $daemon
until_true "statistics of both" grep -q "b 67108864 bytes" "$dir/statistics"

step "limit b"
ask limit b iops-total=2000
until_true "the limit" has 2000 limit b
check b

step "grow a"
ask grow a 96M >/dev/null
sees_size a $((96 << 20)) || fail "a does not see the new size"

step "save, and upgrade under load"
ask save
grep -q 'iops-total' "$dir/disks.toml" || fail "the limit is not in the file"
begin_load a
until_true "load" is_loaded a
old=$daemon
serve second --takeover "$dir/control"
wait $old || fail "the old daemon did not end well"
says first "handed over" || fail "nothing was handed over"
until_true "the limit, in the new one" has 2000 limit b
until_true "load after the upgrade" is_loaded a
end_load a
check b

step "recover from a crash under load"
begin_load a
until_true "load" is_loaded a
# vbench's driver does not connect again.
[[ $machines == Linux* ]] || end_load a
kill -9 $daemon
wait $daemon 2>/dev/null || true
serve third
until_true "the daemon" ask info
if [[ $machines == Linux* ]]; then
    until_true "load after the crash" is_loaded a
    end_load a
fi
check a
check b

step "stop"
kill -TERM $daemon
wait $daemon || fail "it did not end well"
[ ! -e "$dir/a.sock" ] || fail "a socket is left behind"
echo "first-day: all of it went well, in $SECONDS s, with $machines"
