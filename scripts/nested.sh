#!/bin/bash
# Runs tests that need a KVM which runs kernels natively where there is none: inside a machine that QEMU emulates,
# processor, virtualisation extensions and all (AMD's SVM). Slow, and the same everywhere.
#
#   scripts/nested.sh linux [ARGUMENT...]      tests of tests/tests/linux.rs: all, or what the arguments say (a part of a name)
#   scripts/nested.sh tracing [ARGUMENT...]    those of tests/tests/tracing.rs, which need bpftrace
#
# NESTED_LIMIT is how long it may take in seconds (default 600); NESTED_LOG keeps what the machine's console says.
# Needs what the QEMU tests need. Prints the tests' output; the exit code is theirs.
set -euo pipefail
export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin"
cd "$(dirname "$0")/.."

guest=${KICKLESS_GUEST_DIR:-target/guest}
limit=${NESTED_LIMIT:-600}
say() { echo "nested: $*" >&2; }
die() { say "$*"; exit 1; }

test=${1:-}
tools=(qemu-system-x86_64 cpio setpriv timeout)
case $test in
    linux) bins=(vhost-blk kickless-guest) ;;
    tracing) bins=(vhost-blk vhost-net vbench kickless-guest) tools+=(bpftrace) ;;
    *) sed -n 's/^#   /usage: /p' "$0" >&2; exit 2 ;;
esac
shift
for tool in "${tools[@]}"; do
    command -v "$tool" >/dev/null || die "no $tool: run scripts/setup.sh"
done
{ [ -s "$guest/vmlinux" ] && [ -d "$guest/kvm" ]; } || die "no guest in $guest: run scripts/guest-image.sh"

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
say "building"
# What cargo has built, it says itself.
built() { sed -n 's/.*"name":"'"$1"'".*"executable":"\([^"]*\)".*/\1/p' "$tmp/messages" | tail -n 1; }
cargo build -q --workspace --bins --test "$test" --message-format=json >"$tmp/messages"
cargo build -q --release -p kickless-guest --features bare --message-format=json >>"$tmp/messages"

root=$tmp/root
mkdir -p "$root"/{dev,etc,kickless/guest,kickless/bin,proc,sys,tmp}
install_prog() { # PATH DIR: the program and the libraries it is linked with
    local lib
    cp -L "$1" "$2/"
    for lib in $(ldd "$1" 2>/dev/null | grep -o '/[^ ]*'); do
        mkdir -p "$root$(dirname "$lib")"
        cp -L "$lib" "$root$lib"
    done
}
for name in "${bins[@]}" "$test"; do
    path=$(built "$name")
    [ -x "$path" ] || die "cargo has not built $name"
    install_prog "$path" "$root/kickless/bin"
    strip --strip-debug "$root/kickless/bin/$(basename "$path")"
done
mv "$root/kickless/bin/$(basename "$path")" "$root/kickless/test"
install_prog "$(command -v setpriv)" "$root/kickless/bin"
if [ "$test" = tracing ]; then
    install_prog "$(command -v bpftrace)" "$root/kickless/bin"
    # Where the test looks for them.
    mkdir -p "$root$PWD"/{scripts,docs,tests}
    cp -r scripts/bpf "$root$PWD/scripts/"
    cp docs/tracing.md "$root$PWD/docs/"
fi
cp "$guest/vmlinux" "$guest/initramfs" "$root/kickless/guest/"
cp -r "$guest/kvm" "$root/kickless/kvm"

cat >"$root/init" <<INIT
#!/bin/busybox sh
export PATH=/kickless/bin:/bin HOME=/ TERM=dumb LC_ALL=C
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t debugfs debugfs /sys/kernel/debug
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
mkdir -p /dev/shm
ulimit -n 4096
cd /kickless/kvm
while read -r m; do insmod "\$m" 2>/dev/null; done <list
cd /
export KICKLESS_BIN_DIR=/kickless/bin KICKLESS_GUEST_DIR=/kickless/guest RUST_BACKTRACE=1
export KICKLESS_REQUIRE_BPFTRACE=1
/kickless/test $* >/dev/ttyS1 2>&1
echo "nested-exit \$?" >/dev/ttyS1
poweroff -f
INIT
chmod 755 "$root/init"
# Later archives win.
{ cat "$guest/initramfs"; (cd "$root" && find . | cpio --quiet -o -H newc -R 0:0); } >"$tmp/initramfs"

# Of what QEMU 7.2 emulates, nested paging is not reliable (triple faults in guests, now and then), and the sizes of
# XSAVE areas that a guest's guest is told do not add up.
console=${NESTED_LOG:-$tmp/console}
say "booting ($(du -h "$tmp/initramfs" | cut -f1) of files, at most $limit s)"
start=$SECONDS
timeout --kill-after=10 "$limit" qemu-system-x86_64 -nodefaults -display none -no-reboot \
    -machine pc -accel tcg,thread=multi -cpu max,-la57,-xsave,-npt -smp 2 -m 3G \
    -kernel "$guest/vmlinux" -initrd "$tmp/initramfs" \
    -append "console=ttyS0 loglevel=6 panic=-1 mitigations=off nokaslr no_timer_check nowatchdog audit=0" \
    -serial "file:$console" -serial "file:$tmp/output" || say "QEMU has ended with $?"
sed '/^nested-exit /d; s/\r$//' "$tmp/output"
code=$(sed -n 's/^nested-exit \([0-9]*\).*/\1/p' "$tmp/output")
if [ -z "$code" ]; then
    say "no answer after $((SECONDS - start)) s; the end of the console:"
    tail -n 25 "$console" >&2
    exit 1
fi
say "exit code $code after $((SECONDS - start)) s"
exit "$code"
