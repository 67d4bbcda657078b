#!/bin/bash
# Builds the guest the tests boot, out of Debian packages: OUTDIR/vmlinuz and OUTDIR/initramfs; OUTDIR/vmlinux, the
# same kernel unpacked; and OUTDIR/kvm, its modules for a host of further guests (scripts/nested.sh).
#
#   scripts/guest-image.sh [OUTDIR [KERNEL]]        (default: target/guest)
#
# The kernel is downloaded with apt-get and unpacked, never installed, or is the one unpacked in KERNEL
# (scripts/backports.sh), which then comes with the modules of vDPA, SR-IOV and NVMe as well; everything else is copied from
# this system. A second call with the same packages and the same script does nothing. Needs no root.
#
# Packages: busybox-static cpio fio e2fsprogs util-linux iperf3 iproute2 ethtool pciutils binutils xz-utils zstd gcc
# (and qemu-system-x86 to boot it).
set -euo pipefail
export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin"

here=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-$here/target/guest}
given=${2:-}
say() { echo "guest-image: $*" >&2; }
die() { say "$*"; exit 1; }

for tool in busybox cpio dash fio mkfs.ext4 e2fsck blockdev blkdiscard iperf3 ip vdpa ethtool lspci nm readelf xz zstd gcc apt-get dpkg; do
    command -v "$tool" >/dev/null || die "no $tool: apt-get install busybox-static cpio fio e2fsprogs util-linux iperf3 iproute2 ethtool pciutils binutils xz-utils zstd gcc"
done
busybox=$(command -v busybox)
! readelf -l "$busybox" | grep -q INTERP || die "$busybox is not static: apt-get install busybox-static"

# The package that linux-image-amd64 stands for today, and a stamp of all that goes into the image.
if [ -n "$given" ]; then
    kernel=$(cat "$given/../stamp") || die "no kernel in $given: run scripts/backports.sh first"
    given=$(cd "$given" && pwd)
else
    kernel=$(apt-cache depends linux-image-amd64 2>/dev/null | sed -n 's/^ *Depends: *\(linux-image-[0-9].*\)$/\1/p' | head -n 1)
fi
if [ -z "$kernel" ]; then
    [ -s "$out/vmlinuz" ] && [ -s "$out/initramfs" ] && { say "no package lists; keeping $out as it is"; exit 0; }
    die "apt knows no linux-image-amd64: run apt-get update first"
fi
stamp=$({
    cat "$0"
    if [ -n "$given" ]; then echo "$kernel"; else apt-cache show --no-all-versions "$kernel" | grep -E '^(Package|Version):'; fi
    dpkg-query -W busybox-static dash fio e2fsprogs util-linux iperf3 libiperf0 iproute2 ethtool pciutils libc6
} | sha256sum | cut -d' ' -f1)
if [ -s "$out/vmlinuz" ] && [ -s "$out/vmlinux" ] && [ -s "$out/initramfs" ] && [ "$(cat "$out/stamp" 2>/dev/null)" = "$stamp" ]; then
    say "$out is up to date"
    exit 0
fi

mkdir -p "$out"
out=$(cd "$out" && pwd)
tmp=$(mktemp -d "$out/build.XXXXXX")
trap 'rm -rf "$tmp"' EXIT

pkg=$given
if [ -z "$pkg" ]; then
    say "downloading $kernel"
    # (As root, apt warns that its sandbox user may not write here; it then downloads without the sandbox.)
    (cd "$tmp" && apt-get -q download "$kernel" >"$tmp/apt.log" 2>&1) || { cat "$tmp/apt.log" >&2; die "download failed"; }
    pkg=$tmp/pkg
    dpkg -x "$tmp"/linux-image-*.deb "$pkg"
fi
version=$(basename "$(echo "$pkg"/lib/modules/*)")

root=$tmp/root
mkdir -p "$root"/{bin,dev,etc,lib64,mnt,proc,run,sys,tmp,usr/lib,"lib/modules/$version"}

say "picking the modules of $version"
# Modules by name; what they need is found in the `depends` of each, as modprobe would. Those of /etc/modules are loaded
# at boot, the others are there for `modprobe`, which finds in modules.dep what goes before each.
mods=$pkg/lib/modules/$version/kernel
index=$tmp/index # NAME PATH, with '-' written as '_' in the names
find "$mods" -name '*.ko*' | awk -F/ '{ n = $NF; sub(/\.ko.*/, "", n); gsub(/-/, "_", n); print n, $0 }' >"$index"
: >"$root/etc/modules"
add_module() { # NAME [DIR LIST]: into DIR, and appended to LIST in the order in which to load
    local name=${1//-/_} dir=${2:-$root/lib/modules/$version} list=${3:-$root/etc/modules} path dep before
    ! grep -sqx "$name.ko" "$list" || return 0
    path=$(awk -v n="$name" '$1 == n { print $2; exit }' "$index")
    if [ -z "$path" ]; then
        grep -q "/${name//_/[-_]}\.ko" "$pkg/lib/modules/$version/modules.builtin" && return
        die "kernel has no module $name"
    fi
    case $path in
        *.xz) xz -dc "$path" >"$tmp/$name.ko" ;;
        *.zst) zstd -qdc "$path" >"$tmp/$name.ko" ;;
        *) cp "$path" "$tmp/$name.ko" ;;
    esac
    # .modinfo is a list of NUL-terminated key=value strings.
    before=
    for dep in $(objcopy -O binary --only-section=.modinfo "$tmp/$name.ko" /dev/stdout | tr '\0' '\n' |
        sed -n 's/^depends=//p' | tr ',' '\n'); do
        add_module "$dep" "$dir" "$list"
        before="$before $(sed -n "s/^\(${dep//-/_}\.ko\):/\1/p" "$dir/modules.dep")"
    done
    echo "$name.ko:$before" >>"$dir/modules.dep"
    strip --strip-debug -o "$dir/$name.ko" "$tmp/$name.ko"
    echo "$name.ko" >>"$list"
}
for m in crc32c_generic virtio_pci virtio_mmio virtio_console virtio_blk virtio_net 8021q ext4; do add_module "$m"; done
if [ -n "$given" ]; then
    cp "$root/etc/modules" "$tmp/all"
    for m in vduse virtio_vdpa vhost_vdpa nvme nvme_tcp nvmet_tcp igb igbvf vfio_pci vfio_iommu_type1 tun veth; do
        add_module "$m" "$root/lib/modules/$version" "$tmp/all"
    done
fi
mkdir "$tmp/kvm"
add_module kvm_amd "$tmp/kvm" "$tmp/kvm/list"

# The kernel as an ELF file: where a bzImage has it, its header says (Documentation/arch/x86/boot.rst). Booting it
# spares the guest the unpacking.
bzimage=$pkg/boot/vmlinuz-$version
word() { od -A n -t "u$1" -j "$2" -N "$1" "$bzimage" | tr -d ' '; }
start=$((($(word 1 497) + 1) * 512 + $(word 4 584)))
# The last four bytes are the size afterwards, which is not part of what was compressed.
case $(od -A n -t x1 -j $start -N 4 "$bzimage") in
    *' fd 37 7a 58') unpack=(xz -dc) ;;
    *' 28 b5 2f fd') unpack=(zstd -qdc) ;;
    *) die "the kernel is packed with something else than xz or zstd" ;;
esac
dd if="$bzimage" bs=64K iflag=skip_bytes,count_bytes skip=$start count=$(($(word 4 588) - 4)) status=none |
    "${unpack[@]}" >"$tmp/vmlinux" || die "cannot unpack the kernel"

say "copying programs"
cp "$busybox" "$root/bin/busybox"
for a in $("$busybox" --list); do [ "$a" = busybox ] || ln -s busybox "$root/bin/$a"; done
ln -s ../bin "$root/usr/bin"; ln -s ../bin "$root/usr/sbin"; ln -s bin "$root/sbin"
cp /etc/mke2fs.conf "$root/etc/"
ln -s /proc/mounts "$root/etc/mtab"

install_lib() { # PATH: the library under its soname's path
    [ -e "$root$1" ] && return
    mkdir -p "$root$(dirname "$1")"
    cp -L "$1" "$root$1"
}
install_prog() { # NAME: the program and the libraries it is linked with
    local path lib
    path=$(command -v "$1")
    rm -f "$root/bin/$(basename "$path")"
    cp -L "$path" "$root/bin/"
    for lib in $(ldd "$path" | grep -o '/[^ ]*'); do
        install_lib "$lib"
    done
}
for p in dash mkfs.ext4 e2fsck blockdev blkdiscard ethtool; do install_prog "$p"; done
if [ -n "$given" ]; then for p in ip vdpa devlink lspci; do install_prog "$p"; done; fi
# busybox's own shell would take its built-in blkdiscard and blockdev, which can do less.
ln -sf dash "$root/bin/sh"

libdir=$(dirname "$(ldd "$(command -v fio)" | grep -o '/[^ ]*libc\.so\.6')")
mkdir -p "$root$libdir"
# FILE LIBRARY...: empty libraries in the place of these, with all that FILE takes from them
stub_libs() {
    local file=$1 lib script
    # VERSION LIBRARY, as the file's version table has it
    readelf -W -V "$file" | sed -n '/Version needs/,$p' |
        awk '/File:/ { f = $5 } /Name:/ { print $3, f }' >"$tmp/versions"
    # NAME VERSION of what it takes from elsewhere; VERSION is empty for libraries without one
    nm -D --undefined-only --with-symbol-versions "$file" | awk '{ print $2 }' | tr '@' ' ' |
        awk '{ print $1, $2 }' >"$tmp/symbols"
    for lib in "${@:2}"; do
        awk -v lib="$lib" '
            NR == FNR { if ($2 == lib) want[$1] = 1; next }
            ($2 in want) || ($2 == "" && lib ~ /^librados/ && $1 ~ /^rados_/) || ($2 == "" && lib ~ /^librbd/ && $1 ~ /^rbd_/) {
                print ".globl " $1 "\n.type " $1 ",@function\n" $1 ": ud2" > asm
                if ($2 != "") syms[$2] = syms[$2] " " $1 ";"
            }
            END {
                for (v in want) print v " {" syms[v] " };" > map
                print ".section .note.GNU-stack,\"\",@progbits" > asm
            }' asm="$tmp/stub.s" map="$tmp/stub.map" "$tmp/versions" "$tmp/symbols"
        script=; [ -s "$tmp/stub.map" ] && script=-Wl,--version-script="$tmp/stub.map"
        gcc -shared -nostdlib -Wl,-soname,"$lib" $script -o "$root$libdir/$lib" "$tmp/stub.s"
        rm -f "$tmp/stub.s" "$tmp/stub.map"
    done
}
needed() { readelf -d "$1" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p'; }
install_with_stubs() { # PROGRAM FILE: the program, and what FILE is linked with unless it is there in empty
    local lib path
    rm -f "$root/bin/$(basename "$1")"
    cp -L "$1" "$root/bin/"
    for lib in $(needed "$2"); do
        [ -e "$root$libdir/$lib" ] && continue
        path=$(ldd "$2" | awk -v l="$lib" '$1 == l { print $3 }')
        [ -z "$path" ] || install_lib "$path"
    done
}

# fio is linked with RBD, Gluster, RDMA, NBD and PMDK, whose closure is 75 MB that the guest would unpack at
# boot and relocate at every start of fio. It gets empty libraries in their place: nothing here calls them.
fio=$(command -v fio)
# shellcheck disable=SC2046 # a word each
stub_libs "$fio" $(needed "$fio" | grep -E '^lib(gfapi|nbd|ibverbs|rdmacm|rados|rbd|pmem[a-z]*)\.')
install_with_stubs "$fio" "$fio"
# iperf3 has OpenSSL for passwords only, and SCTP for SCTP.
iperf3=$(command -v iperf3)
libiperf=$(ldd "$iperf3" | grep -o '/[^ ]*libiperf[^ ]*')
unused='^lib(crypto|sctp)\.'
[ -z "$given" ] || unused='^libsctp\.' # lspci does call libcrypto
# shellcheck disable=SC2046
stub_libs "$libiperf" $(needed "$libiperf" | grep -E "$unused")
install_with_stubs "$iperf3" "$libiperf"
install_lib "$libiperf"

# The agent: in comes a command line on a port; out come its output and a marker with the exit code.
cat >"$root/init" <<'INIT'
#!/bin/busybox sh
export PATH=/bin HOME=/ TERM=dumb LC_ALL=C
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
cd /lib/modules/*/
while read -r m; do insmod "$m" || echo "init: cannot load $m" >/dev/console; done </etc/modules
cd /
ip link set lo up
# Memory plugged in later goes on line by itself (the kernel's command line may already say so).
[ -w /sys/devices/system/memory/auto_online_blocks ] &&
    echo online_movable >/sys/devices/system/memory/auto_online_blocks
# What a test has added to the image and wants run at each boot.
[ ! -x /etc/start ] || /etc/start >/dev/console 2>&1
# The port is a serial one if the command line says which, or one of a virtio console. It is opened once, and all
# that runs inherits it: a console's port can be open once only.
port=$(sed -n 's/.*kickless\.agent=\([^ ]*\).*/\/dev\/\1/p' /proc/cmdline)
if [ -n "$port" ]; then
    stty -F "$port" raw -echo
else
    # The first number is the device's among all virtio devices, disks included.
    until set -- /dev/vport*p1 && [ -c "$1" ]; do usleep 10000; done
    port=$1
fi
exec 3<>"$port"
echo "@@AGENT READY@@" >&3
while read -r id line <&3; do
    /bin/sh -c "$line" </dev/null >&3 2>&1 3>&-
    echo "@@END $id $?@@" >&3
done
echo "init: lost the agent port" >/dev/console
exec sh </dev/console >/dev/console 2>&1
INIT
chmod 755 "$root/init"

say "testing the programs"
if [ "$(id -u)" = 0 ] && chroot "$root" /bin/busybox true 2>/dev/null; then
    chroot "$root" /bin/fio --version >/dev/null || die "fio does not start in the image"
    chroot "$root" /bin/iperf3 --version >/dev/null || die "iperf3 does not start in the image"
    chroot "$root" /bin/ethtool --version >/dev/null || die "ethtool does not start in the image"
    [ -z "$given" ] || chroot "$root" /bin/lspci --version >/dev/null || die "lspci does not start in the image"
    chroot "$root" /bin/e2fsck -V >/dev/null 2>&1 || die "e2fsck does not start in the image"
fi

say "packing"
(cd "$root" && find . | cpio --quiet -o -H newc -R 0:0) >"$tmp/initramfs"
cp "$pkg/boot/vmlinuz-$version" "$tmp/vmlinuz"
rm -rf "$out/kvm"
mv "$tmp/vmlinuz" "$tmp/vmlinux" "$tmp/initramfs" "$tmp/kvm" "$out/"
rm -f "$out/accel"
echo "$stamp" >"$out/stamp"
say "$out: Linux $version, initramfs $(du -h "$out/initramfs" | cut -f1)"
