#!/bin/bash
# Builds the daemon with RBD and runs its tests against a Ceph cluster of one node: a tier of its own, because Ceph is large
# (make rbd-test). Packages: ceph-mon ceph-osd ceph-common librbd-dev.
set -euo pipefail
cd "$(dirname "$0")/.."
die() { echo "rbd-test: $*" >&2; exit 1; }
[ -e /usr/include/rbd/librbd.h ] && command -v ceph-osd >/dev/null ||
    die "no Ceph: apt-get install --no-install-recommends ceph-mon ceph-osd ceph-common librbd-dev"

# Beside the daemon that is built without, whose place cargo would have it take.
cargo clippy -q -p vhost-blk --features rbd --all-targets -- -D warnings
cargo test -q -p vhost-blk --features rbd --lib rbd
cargo build -q -p vhost-blk --features rbd
mkdir -p target/rbd
cp target/debug/vhost-blk target/rbd/vhost-blk
cargo build -q -p vhost-blk -p vbench
KICKLESS_REQUIRE_RBD=1 cargo test -p kickless-tests --test rbd -- --nocapture "$@"
