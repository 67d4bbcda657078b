#!/bin/bash
# Puts everything where the Debian package has it: scripts/install.sh [ROOT [PROFILE]], of what `cargo build --profile
# PROFILE` has built (release). The list of it is that of the package (packaging/Cargo.toml).
set -euo pipefail
root=$(realpath -m "${1:-/}")
cd "$(dirname "$0")/.."
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
cd packaging

profile=${2:-release}
bin=$target/$profile
[ "$profile" != dev ] || bin=$target/debug
if [ ! -x "$bin/packaging" ]; then
    echo "install: $bin/packaging is missing: cargo build --profile $profile --workspace --bins" >&2
    exit 1
fi
pages=$(mktemp -d)
trap 'rm -rf "$pages"' EXIT
"$bin/packaging" "$pages"
gzip -9n "$pages"/man/*.1

# Each line of the list: what (maybe several), where, and its mode.
sed -n 's/^ *\["\(.*\)", "\(.*\)", "\(.*\)"\],$/\1 \2 \3/p' Cargo.toml | while read -r what where mode; do
    what=${what/#target\/release/$bin}
    what=${what/#..\/target\/pages/$pages}
    case $where in
        # shellcheck disable=SC2086 # may be several
        */) install -D -m "$mode" -t "$root/$where" $what ;;
        # shellcheck disable=SC2086
        *) install -D -m "$mode" $what "$root/$where" ;;
    esac
done
