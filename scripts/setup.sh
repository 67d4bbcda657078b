#!/bin/bash
# Installs the Debian packages that the demo and the tests need, and says why. Quick when nothing is missing.
# Root is only needed for installing; nothing else is changed on this machine.
set -euo pipefail

# PACKAGE WHAT FOR
needs='qemu-system-x86 the virtual machine that the demo and the end-to-end tests boot
qemu-utils makes, checks and compares qcow2 images
cryptsetup-bin makes and reads LUKS volumes, and the library that opens ours
busybox-static the user space of the guest
cpio packs the initramfs of the guest
dash the shell of the guest
fio verified load inside the guest
iperf3 load on the network inside the guest
ethtool offloads and queues of network cards in the guest
iproute2 network namespaces of the tests, and what they compare with
pciutils what lspci says of devices in the guest
tcpdump what arrives at a tap
dpdk-dev testpmd, a peer of the network devices
librte-net-vhost23 the vhost-user ports of testpmd
librte-net-virtio23 a driver of network devices in testpmd
librte-mempool-ring23 the packet buffers of testpmd
e2fsprogs file systems in the guest, and checking them from outside
util-linux setpriv, blkdiscard and blockdev
systemd checks the units
systemd-container runs the units, by a systemd of their own
mmdebstrap makes the root they run in
binutils prepares kernel modules and programs for the guest
xz-utils unpacks kernels and their modules
zstd unpacks kernels
gcc links Rust programs
libc6-dev links Rust programs
make runs the Makefile
valgrind counts the instructions of a request
bpftrace looks at probes under load
python3-venv schemathesis, which calls the API by its description
python3-prometheus-client reads metrics as Prometheus does
chromium looks at the status page'

say() { echo "setup: $*"; }

if ! command -v cargo >/dev/null; then
    say "cargo is missing: install Rust 1.88 or newer (https://rustup.rs)" >&2
    exit 1
fi
rust=$(rustc --version | awk '{ print $2 }')
if [ "$(printf '%s\n' 1.88.0 "${rust%%-*}" | sort -V | head -n 1)" != 1.88.0 ]; then
    say "Rust $rust is too old: 1.88 or newer is needed (rustup update stable)" >&2
    exit 1
fi
if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
    say "not a Debian system, so nothing is installed here. What is needed:"
    # shellcheck disable=SC2001 # a prefix for each line
    echo "$needs" | sed 's/^/  /'
    exit 0
fi

missing=()
while read -r package why; do
    if [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" != installed ]; then
        say "missing: $package ($why)"
        missing+=("$package")
    fi
done <<<"$needs"
lists=
# The kernel of the guest is a package too; it is downloaded and unpacked by guest-image.sh, never installed.
if [ -z "$(apt-cache show --no-all-versions linux-image-amd64 2>/dev/null)" ]; then
    here=$(cd "$(dirname "$0")/.." && pwd)
    [ -s "${KICKLESS_GUEST_DIR:-$here/target/guest}/vmlinuz" ] || lists=1
fi
if [ ${#missing[@]} = 0 ] && [ -z "$lists" ]; then
    say "everything is there"
    exit 0
fi

as_root=()
if [ "$(id -u)" != 0 ]; then
    if ! command -v sudo >/dev/null; then
        say "cannot become root (no sudo). As root, run: apt-get update && apt-get install ${missing[*]}" >&2
        exit 1
    fi
    as_root=(sudo)
    say "installing needs root, so sudo may ask for a password"
fi
say "fetching the package lists"
"${as_root[@]}" apt-get -q update
if [ ${#missing[@]} != 0 ]; then
    say "installing ${missing[*]}"
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get -q install -y --no-install-recommends "${missing[@]}"
fi
say "done"
