#!/bin/bash
# The demonstration under KVM: guests without an operating system, all on one vhost-blk process, booted and loaded side
# by side. Installs nothing and needs no QEMU. Everything happens in one temporary directory and is gone afterwards.
#
# Arguments go to `kvm-harness demo` (--guests 8 --seconds 5 --depth 1 --poll adaptive).
set -euo pipefail
export LC_ALL=C
cd "$(dirname "$0")/.."

kvm=/dev/kvm why=
if [ ! -e $kvm ]; then
    why="there is no $kvm: no virtualisation here, or the module kvm_intel or kvm_amd is not loaded"
elif [ ! -r $kvm ] || [ ! -w $kvm ]; then
    why="this user may not open $kvm; its group is $(stat -c %G $kvm)"
fi
if [ -n "$why" ]; then
    echo "demo-kvm: skipped, nothing was run: $why"
    exit 0
fi
command -v cargo >/dev/null || { echo "demo-kvm: cargo is missing: install Rust 1.88 or newer (https://rustup.rs)" >&2; exit 1; }

echo "Building vhost-blk, the guest and the harness (release)."
cargo build --release -p vhost-blk -p kickless-guest -p kickless-tests --bins --features kickless-guest/bare

# A short path, as Unix sockets need; not on a RAM disk if it can be helped, where there is no direct I/O.
tmp=$(mktemp -d -p "${TMPDIR:-/var/tmp}" kickless-demo.XXXXXX)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
echo
code=0
TMPDIR=$tmp "${CARGO_TARGET_DIR:-target}/release/kvm-harness" demo "$@" | tee "$tmp/said" || code=$?
echo
if [ $code != 0 ]; then
    echo "demo-kvm: FAILED (exit code $code)" >&2
    exit $code
fi
if grep -q '^kvm-harness: skipped' "$tmp/said"; then
    echo "demo-kvm: skipped, no guest was run (the line above says why)"
else
    echo "Done: every guest has booted and powered off, no request failed, every verified block was what had been written."
fi
