#!/bin/bash
# Formatting, clippy and the dependency policy of deny.toml. Goes on after a failure; fails if anything did.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

failed=0
step() { # NAME COMMAND...
    echo "== $1"
    "${@:2}" || { echo "lint: $1 failed" >&2; failed=1; }
}
step fmt cargo fmt --all --check
step clippy cargo clippy --workspace --all-targets -- -D warnings
step "clippy of the bare-metal guest" cargo clippy --release -p kickless-guest --features bare -- -D warnings
if cargo deny --version >/dev/null 2>&1; then
    step deny cargo deny check
else
    echo "== deny: skipped, cargo-deny is not installed (cargo install --locked cargo-deny)"
fi
exit $failed
