#!/bin/sh
# Runs one of the scripts beside it on a running daemon, until Ctrl-C:
#
#   scripts/bpf/run.sh latency|depth|exits|bursts PID [PID of the virtual machine, for exits]
#
# It needs root and bpftrace (0.17 of Debian 12 is enough). Without it, the daemon has no more to do than a nop for each probe.
set -eu
here=$(dirname "$0")
[ $# -ge 2 ] && [ $# -le 3 ] && [ -f "$here/$1.bt" ] || { sed -n 's/^#   /usage: /p' "$0" >&2; exit 2; }
program=$(readlink -f "/proc/$2/exe") || program=
if [ ! -f "$program" ]; then
    echo "$0: no process $2 of yours, or its program was replaced (an upgrade): look at the one that runs now" >&2
    exit 1
fi
text=$(sed "s|PROGRAM|$program|g" "$here/$1.bt")
# It is said when all is attached.
exec bpftrace -B line -p "$2" -e "BEGIN { printf(\"looking on; Ctrl-C ends it\\n\"); } $text" "${3:-0}"
