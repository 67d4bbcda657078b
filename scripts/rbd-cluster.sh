#!/bin/bash
# A Ceph cluster of one node on loopback, for tests of RBD: a monitor and an OSD that keeps its objects in memory, out of
# Debian's packages, all of their files in DIR.
#
#   scripts/rbd-cluster.sh up DIR [PORT]     starts it, with a pool `rbd` (PORT: the monitor's, 16789)
#   scripts/rbd-cluster.sh down DIR          ends it
#
# Packages: ceph-mon ceph-osd ceph-common librbd-dev. Needs no root.
set -euo pipefail
export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin"

die() { echo "rbd-cluster: $*" >&2; exit 1; }
what=${1:-} dir=${2:-}
[ -n "$dir" ] || die "up DIR [PORT], or down DIR"

if [ "$what" = down ]; then
    for pid in "$dir"/osd.0.pid "$dir"/mon.a.pid; do
        [ ! -s "$pid" ] || kill -9 "$(cat "$pid")" 2>/dev/null || true
    done
    exit 0
fi
[ "$what" = up ] || die "up or down, not '$what'"
for tool in ceph ceph-mon ceph-osd ceph-authtool monmaptool rbd; do
    command -v "$tool" >/dev/null || die "no $tool: apt-get install --no-install-recommends ceph-mon ceph-osd ceph-common"
done

port=${3:-16789}
mkdir -p "$dir/osd"
cd "$dir"
dir=$PWD
fsid=$(cat /proc/sys/kernel/random/uuid)
osd=$(cat /proc/sys/kernel/random/uuid)
cat >ceph.conf <<CONF
[global]
fsid = $fsid
mon host = 127.0.0.1:$port
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = $dir/keyring
run dir = $dir
log file = $dir/\$name.log
pid file = $dir/\$name.pid
admin socket = $dir/\$name.\$pid.asok
mon data = $dir/mon
mon cluster log file = $dir/cluster.log
mon allow pool size one = true
# A full disk of the machine's is no matter of this one.
mon data avail crit = 0
osd data = $dir/osd
osd objectstore = memstore
memstore device bytes = 1073741824
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd crush chooseleaf type = 0
# How long a client that has died keeps its lock.
osd client watch timeout = 5
CONF
ceph-authtool --create-keyring keyring --gen-key -n mon. --cap mon 'allow *' >/dev/null
ceph-authtool keyring --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
ceph-authtool keyring --gen-key -n osd.0 --cap mon 'allow profile osd' --cap osd 'allow *'
ceph-authtool keyring --gen-key -n client.disk --cap mon 'profile rbd' --cap osd 'profile rbd pool=rbd'
monmaptool --create --add a "127.0.0.1:$port" --fsid "$fsid" monmap >/dev/null
export CEPH_CONF=$dir/ceph.conf
ceph-mon --mkfs -i a --monmap monmap --keyring keyring
ceph-mon -i a
asked() { timeout 60 "$@" >>asked.log 2>&1 || { cat asked.log >&2; die "$* has failed"; }; }
asked ceph osd new "$osd"
asked ceph auth add osd.0 -i keyring
asked ceph auth add client.disk -i keyring
ceph-osd -i 0 --mkfs --osd-uuid "$osd" 2>>asked.log
ceph-osd -i 0 2>>asked.log
asked ceph osd pool create rbd 8
asked rbd pool init rbd
