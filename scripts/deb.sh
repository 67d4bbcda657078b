#!/bin/bash
# Makes the Debian package: scripts/deb.sh [PROFILE], of what `cargo build --profile PROFILE` has built (release). It is
# left in target/debian. Needs cargo-deb (cargo install --locked cargo-deb), and no root.
set -euo pipefail
cd "$(dirname "$0")/.."

profile=${1:-release}
target=${CARGO_TARGET_DIR:-target}
dir=$profile
[ "$profile" != dev ] || dir=debug
if ! command -v cargo-deb >/dev/null; then
    echo "deb: cargo-deb is missing: cargo install --locked cargo-deb" >&2
    exit 1
fi
cargo build --profile "$profile" -p vhost-blk -p vhost-net -p vdpa -p sriov-tools -p vhostctl -p vbench -p packaging --bins
rm -rf "$target/pages"
"$target/$dir/packaging" "$target/pages"
# Pages are packed, as Debian wants them.
gzip -9n "$target"/pages/man/*.1
cargo deb --no-build --profile "$profile" -p packaging
