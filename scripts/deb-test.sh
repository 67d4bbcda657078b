#!/bin/bash
# Installs the package that scripts/deb.sh has made into a clean root of Debian 12, looks whether all is there and works, and
# removes it. Needs root, mmdebstrap, systemd-nspawn and a Debian mirror; two minutes.
#
#   scripts/deb-test.sh [PACKAGE.deb]
set -euo pipefail
cd "$(dirname "$0")/.."

# What is mounted is gone with this process, whatever becomes of it.
[ -n "${DEB_TEST_MOUNTS:-}" ] || exec env DEB_TEST_MOUNTS=own unshare --mount "$0" "$@"

fail() { echo "deb-test: $*" >&2; exit 1; }
deb=${1:-$(ls -t target/debian/kickless_*.deb 2>/dev/null | head -n 1 || true)}
[ -f "$deb" ] || fail "no package: scripts/deb.sh makes one"
command -v mmdebstrap >/dev/null || fail "mmdebstrap is missing: apt-get install mmdebstrap"

tmp=$(mktemp -d)
root=$tmp/root
trap 'umount -q "$root/proc" || true; rm -rf --one-file-system "$tmp"' EXIT
scripts/debian-root.sh "$root"
mount -t proc proc "$root/proc"
cp "$deb" "$root/kickless.deb"
in_root() { env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive chroot "$root" "$@"; }

(cd "$root" && find etc usr var/lib -xdev -not -path 'var/lib/dpkg/*' -not -path 'var/lib/apt/*' | sort) >"$tmp/before"
in_root apt-get -qq install -y --no-install-recommends /kickless.deb >/dev/null

for program in vhost-blk vhost-net vdpactl sriov; do
    in_root $program --version >/dev/null || fail "$program does not run"
    in_root test -s "/usr/share/man/man1/$program.1.gz" || fail "no manual page of $program"
done
in_root getent passwd kickless >/dev/null || fail "no user kickless"
[ "$(stat -c %U:%a "$root/var/lib/kickless" 2>/dev/null)" != "" ] || fail "no /var/lib/kickless"
for unit in vhost-blk@data.socket vhost-blk@data.service vhost-net@lan.service sriov.service; do
    in_root systemd-analyze verify --man=no --recursive-errors=one "$unit" || fail "$unit"
done
# It serves, as its user: the socket is there once it can be connected to.
truncate -s 16M "$root/var/lib/kickless/data.img"
in_root chown kickless: /var/lib/kickless/data.img
chroot "$root" /usr/bin/vhost-blk --socket-path /run/vhost-blk/data.sock --direct off \
    --blk-file /var/lib/kickless/data.img --user kickless 2>"$tmp/log" &
daemon=$!
for _ in $(seq 200); do
    [ ! -S "$root/run/vhost-blk/data.sock" ] || break
    sleep 0.05
done
[ -S "$root/run/vhost-blk/data.sock" ] || { cat "$tmp/log"; fail "it does not serve"; }
kill "$daemon"
wait "$daemon" || { cat "$tmp/log"; fail "it does not end well"; }
grep -q ' confined: ' "$tmp/log" || { cat "$tmp/log"; fail "it is not confined"; }
rm "$root/var/lib/kickless/data.img"
# A system that has booted leaves more behind than its packages, so this is a copy; it has processes of its own.
cp -ax "$root" "$tmp/booted"
scripts/units.sh "$tmp/booted" || fail "the units do not run"

in_root apt-get -qq purge -y kickless >/dev/null
(cd "$root" && find etc usr var/lib -xdev -not -path 'var/lib/dpkg/*' -not -path 'var/lib/apt/*' | sort) >"$tmp/after"
# The user stays, and with it its home.
left=$(comm -13 "$tmp/before" "$tmp/after" | grep -v -e '^var/lib/kickless$' -e '^etc/\(passwd\|group\|shadow\|gshadow\)-$' || true)
[ -z "$left" ] || fail "left behind: $left"
echo "deb-test: installed, run and removed: $(basename "$deb")"
