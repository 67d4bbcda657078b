#!/bin/bash
# Fetches what Debian 12 itself is too old for out of its backports, and unpacks it without installing anything:
#   OUTDIR/qemu-system-x86_64   QEMU 10, which emulates SR-IOV network cards (igb) and disks (nvme)
#   OUTDIR/linux/               Linux 6.12, which has vDPA: boot/ and lib/modules/
#
#   scripts/backports.sh [OUTDIR]        (default: target/backports)
#
# A second call with the same packages does nothing. Needs no root. What the programs are linked with comes from
# qemu-system-x86 of Debian 12 (scripts/setup.sh).
set -euo pipefail
export LC_ALL=C

here=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-$here/target/backports}
say() { echo "backports: $*" >&2; }
die() { say "$*"; exit 1; }
command -v apt-get >/dev/null && command -v dpkg >/dev/null || die "not a Debian system: no apt-get"
# shellcheck disable=SC1091
suite=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
[ -n "$suite" ] || die "/etc/os-release has no VERSION_CODENAME"

mkdir -p "$out"
out=$(cd "$out" && pwd)
tmp=$(mktemp -d "$out/fetch.XXXXXX")
trap 'rm -rf "$tmp"' EXIT

# The mirror that apt is set to, with the key it trusts for it, in an apt of our own.
mirror() { # NAME: a field of the suite's main component
    # shellcheck disable=SC2016 # apt's own
    apt-get indextargets --format "\$($1)" 'Created-By: Packages' "Codename: $suite" 'Component: main' | head -n 1
}
uri=$(mirror REPO_URI)
[ -n "$uri" ] || die "apt has no source for $suite: add one, then run apt-get update"
key=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb [signed-by=$key] $uri $suite-backports main" >"$tmp/sources"
mkdir -p "$tmp/lists/partial"
apt=(-o "Dir::Etc::sourcelist=$tmp/sources" -o Dir::Etc::sourceparts=/dev/null -o "Dir::State::lists=$tmp/lists"
    -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o APT::Sandbox::User= -o Debug::NoLocking=1 -q)
apt-get "${apt[@]}" update >"$tmp/log" 2>&1 || {
    [ ! -s "$out/stamp" ] || { say "no package lists; keeping $out as it is"; exit 0; }
    cat "$tmp/log" >&2
    die "cannot read $suite-backports"
}
kernel=$(apt-cache "${apt[@]}" depends linux-image-amd64 2>/dev/null | sed -n 's/^ *Depends: *\(linux-image-[0-9].*\)$/\1/p' | head -n 1)
[ -n "$kernel" ] || die "$suite-backports has no linux-image-amd64"
packages=(qemu-system-x86 qemu-system-common qemu-system-data seabios)

stamp=$({ cat "$0"; apt-cache "${apt[@]}" show "$kernel" "${packages[@]}" | grep -E '^(Package|Version|SHA256):'; } | sha256sum | cut -d' ' -f1)
if [ "$(cat "$out/stamp" 2>/dev/null)" = "$stamp" ]; then
    say "$out is up to date"
    exit 0
fi

say "downloading $kernel and QEMU"
mkdir "$tmp/debs"
(cd "$tmp/debs" && apt-get "${apt[@]}" download "$kernel" "${packages[@]/%//$suite-backports}" >"$tmp/log" 2>&1) || {
    cat "$tmp/log" >&2
    die "download failed"
}
rm -rf "$out/stamp" "$out/qemu" "$out/linux"
dpkg -x "$tmp"/debs/linux-image-*.deb "$out/linux"
for deb in "$tmp"/debs/{qemu,seabios}*.deb; do dpkg -x "$deb" "$out/qemu"; done

# It looks for its files where Debian's own would have them.
modules=$(echo "$out"/qemu/usr/lib/*/qemu)
cat >"$out/qemu-system-x86_64" <<QEMU
#!/bin/sh
export QEMU_MODULE_DIR='$modules'
exec '$out/qemu/usr/bin/qemu-system-x86_64' -L '$out/qemu/usr/share/qemu' -L '$out/qemu/usr/share/seabios' -L /usr/lib/ipxe/qemu "\$@"
QEMU
chmod 755 "$out/qemu-system-x86_64"
missing=$(ldd "$out/qemu/usr/bin/qemu-system-x86_64" | awk '/not found/ { print $1 }')
[ -z "$missing" ] || die "QEMU lacks $missing: apt-get install qemu-system-x86"
echo "$stamp" >"$out/stamp"
say "$out: $("$out/qemu-system-x86_64" --version | head -n 1), $kernel"
