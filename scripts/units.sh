#!/bin/bash
# Starts the units of a Debian root, in which the package or what scripts/install.sh puts there is, by its own systemd: in a
# container (systemd-nspawn), which boots in seconds. What is found there is printed, and must be well to the end. Needs root.
#
#   scripts/units.sh ROOT          with this root, which is changed
#   scripts/units.sh               with a new one, made by scripts/debian-root.sh and scripts/install.sh of what is built (dev)
#   scripts/units.sh --skipped     why it cannot be done here, if it cannot
#
# Exits with 77 if no root can be made here, or systemd does not boot in it.
set -euo pipefail
cd "$(dirname "$0")/.."

skipped() {
    if [ "$(id -u)" != 0 ]; then
        echo "containers are for root"
    elif ! command -v systemd-nspawn >/dev/null; then
        echo "systemd-nspawn is missing (package systemd-container)"
    elif ! command -v mmdebstrap >/dev/null; then
        echo "mmdebstrap is missing"
    elif ! unshare --mount --cgroup mount -t cgroup2 none /sys/fs/cgroup 2>/dev/null; then
        echo "no cgroup2 can be mounted here"
    else
        return 1
    fi
}
if [ "${1:-}" = --skipped ]; then skipped; exit; fi
if reason=$(skipped); then echo "units: $reason" >&2; exit 1; fi

# Mounts go with this process, whatever becomes of it.
[ -n "${UNITS_MOUNTS:-}" ] || exec env UNITS_MOUNTS=own unshare --mount "$0" "$@"

tmp=$(mktemp -d)
trap 'rm -rf --one-file-system "$tmp"' EXIT
root=${1:-$tmp/root}
if [ -z "${1:-}" ]; then
    scripts/debian-root.sh "$root" 2>"$tmp/log" || { cat "$tmp/log" >&2; echo "units: no root could be made" >&2; exit 77; }
    scripts/install.sh "$root" dev
    # What the package's script does.
    systemd-sysusers --root="$root" kickless.conf
    mkdir -p "$root/etc/vhost-blk" "$root/etc/vhost-net"
    chroot "$root" install -d -o kickless -g kickless -m 750 /var/lib/kickless
fi

cat >"$root/units-test" <<'TEST'
#!/bin/bash
# Runs as a service, after the boot.
set -euo pipefail
exec 2>&1
trap 'echo "units: failed in line $LINENO"; systemctl --no-pager status "*vhost*" || true; journalctl --no-pager -n 60 || true' ERR
say() { echo "units: $*"; }
within() { # SECONDS COMMAND...
    local until=$((SECONDS + $1))
    until "${@:2}" >/dev/null 2>&1; do
        [ $SECONDS -lt $until ] || { say "not within $1 s: ${*:2}"; return 1; }
        sleep 0.1
    done
}
load() { vbench run --socket-path /run/vhost-blk/data.sock --rw=randwrite --bs=4k --iodepth=8 --number-ios=2000 --verify=crc32c >/dev/null; }
is() { [ "$(systemctl show -P "$2" "$1")" = "$3" ]; }
restarted() { is vhost-blk@data NRestarts "$1" && is vhost-blk@data ActiveState active; }
# Not grep -q, which does not read to the end: journalctl would fail.
journal() { journalctl --no-pager -u "$1" | grep -i "$2" >/dev/null; }
pid() { systemctl show -P MainPID vhost-blk@data; }

truncate -s 16M /var/lib/kickless/data.img
chown kickless: /var/lib/kickless/data.img
printf 'BLK_FILE=/var/lib/kickless/data.img\nOPTIONS=--direct off --num-queues 2 --poll event\n' >/etc/vhost-blk/data.conf
systemctl enable --now vhost-blk@data.socket
is vhost-blk@data ActiveState inactive
load
is vhost-blk@data ActiveState active
is vhost-blk@data NRestarts 0
within 30 journal vhost-blk@data ' confined: '
[ "$(ps -o user= -p "$(pid)")" = kickless ]
say "the first front end has the disk started, which serves as kickless and is confined"

truncate -s 32M /var/lib/kickless/data.img
systemctl reload vhost-blk@data
within 30 journal vhost-blk@data 33554432
say "reloaded, it has seen that the image has grown"

kill -KILL "$(pid)"
within 30 restarted 1
load
say "killed, it was started again"

# A process that is stopped turns no more.
kill -STOP "$(pid)"
within 60 restarted 2
within 30 journal vhost-blk@data watchdog
load
say "hung, it was ended by the watchdog and started again"

systemctl stop vhost-blk@data.socket vhost-blk@data
is vhost-blk@data Result success
[ ! -e /run/vhost-blk/data.sock ]
say "stopped, it has ended well and left no socket"

cat >/etc/vhost-net/lan.toml <<'END'
switch = true
poll = "event"
[[port]]
socket-path = "/run/vhost-net-lan/a.sock"
[[port]]
socket-path = "/run/vhost-net-lan/b.sock"
END
systemctl start vhost-net@lan
[ -S /run/vhost-net-lan/a.sock ]
vbench net --socket-path /run/vhost-net-lan/a.sock --socket-path /run/vhost-net-lan/b.sock --runtime 1 >/dev/null
systemctl stop vhost-net@lan
is vhost-net@lan Result success
say "a switch has started, passed packets, and stopped"

echo nonsense = 1 >/etc/vhost-net/lan.toml
if systemctl start vhost-net@lan 2>/dev/null; then false; fi
within 30 journal vhost-net@lan nonsense
say "with a file that is wrong, it has said so"
say "all well"
TEST
chmod +x "$root/units-test"
mkdir -p "$root/etc/systemd/system/multi-user.target.wants"
cat >"$root/etc/systemd/system/units-test.service" <<'UNIT'
[Unit]
After=multi-user.target
SuccessAction=exit
FailureAction=exit
[Service]
Type=oneshot
ExecStart=/units-test
StandardOutput=file:/units-test.log
TimeoutStartSec=300
UNIT
ln -sf ../units-test.service "$root/etc/systemd/system/multi-user.target.wants/"

# Whatever of it is there is of the older version.
umount -R /sys/fs/cgroup 2>/dev/null || true
mount -t cgroup2 none /sys/fs/cgroup
timeout --kill-after=10 400 systemd-nspawn --quiet --register=no --keep-unit --directory="$root" --boot --console=pipe \
    --system-call-filter='@aio seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self' \
    </dev/null >"$tmp/console" 2>&1 || true
log=$(cat "$root/units-test.log" 2>/dev/null) || { cat "$tmp/console"; echo "units: systemd does not boot in a container here" >&2; exit 77; }
echo "$log"
rm -f "$root/units-test" "$root/units-test.log" "$root/etc/systemd/system/units-test.service" \
    "$root/etc/systemd/system/multi-user.target.wants/units-test.service"
[[ $log == *"units: all well" ]]
