#!/bin/bash
# Builds the daemon with RBD and runs its tests against a Ceph cluster of one node: a tier of its own, because Ceph is large
# (make rbd-test). Packages: ceph-mon ceph-osd ceph-common librbd-dev.
set -euo pipefail
cd "$(dirname "$0")/.."
die() { echo "rbd-test: $*" >&2; exit 1; }
[ -e /usr/include/rbd/librbd.h ] && command -v ceph-osd >/dev/null ||
    die "no Ceph: apt-get install --no-install-recommends ceph-mon ceph-osd ceph-common librbd-dev"

cargo clippy -q -p vhost-blk --features rbd --all-targets -- -D warnings
cargo test -q -p vhost-blk --features rbd --lib rbd
# Beside the daemon that is built without, whose place cargo has it take, and which gets that back.
target=${CARGO_TARGET_DIR:-target}
cargo build -q -p vhost-blk --features rbd
cargo build -q -p vbench
mkdir -p "$target/rbd"
cp "$target/debug/vhost-blk" "$target/debug/vbench" "$target/rbd/"
cargo build -q -p vhost-blk
KICKLESS_BIN_DIR=$(realpath "$target/rbd") KICKLESS_REQUIRE_RBD=1 cargo test -p kickless-tests --test rbd -- --nocapture "$@"
