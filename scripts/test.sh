#!/bin/bash
# Every test tier, to the end whatever fails on the way. The last line counts what passed, failed and was skipped.
#
#   scripts/test.sh                all of it
#   scripts/test.sh soak           the search for lost wake-ups, then the randomised tests again and again, for
#                                  SOAK_MINUTES (default 10) in all
#   scripts/test.sh summary LOG    what the end of a run looks like, for a log of cargo test
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
: >"$tmp/steps"

# Appends "STATUS NAME[: REASON]" for what is counted beside the tests themselves.
note() { echo "$*" >>"$tmp/steps"; }

step() { # NAME COMMAND...: counts as one test
    echo "== $1"
    if "${@:2}"; then note "passed $1"; else note "failed $1"; fi
}

# LOG EXIT-CODE [STEPS]: the skipped and failed tests by name, then the totals of a log of `cargo test`.
# A test binary that says "running" and never "test result" has died, and counts as a failure.
summary() {
    # Colours off; a test's own output may stand between its name and its outcome.
    sed 's/\x1b\[[0-9;]*m//g; s/\r$//' "$1" | awk -v code="$2" -v steps="${3:-/dev/null}" '
        function list(title, items, n,   i) {
            if (n) { print ""; print title; for (i = 1; i <= n; i++) print "  " items[i] }
        }
        BEGIN {
            while ((getline line < steps) > 0) {
                status = line; sub(/ .*/, "", status); sub(/^[a-z]+ /, "", line)
                if (status == "passed") passed++
                if (status == "failed") { failed++; bad[++nb] = line }
                if (status == "skipped") { skipped++; skip[++ns] = line }
            }
        }
        /^ *(Running|Doc-tests) / { binary = $0; sub(/^ */, "", binary) }
        /^running [0-9]+ tests?$/ {
            if (open) { failed++; died++; bad[++nb] = "(died) " where }
            open = 1; where = binary
        }
        /^test result: / {
            open = 0
            for (i = 2; i <= NF; i++) {
                if ($i == "passed;") passed += $(i - 1)
                if ($i == "failed;") { failed += $(i - 1); counted += $(i - 1) }
                if ($i == "ignored;") skipped += $(i - 1)
            }
        }
        /^test .* \.\.\. / {
            name = $0; sub(/^test /, "", name); sub(/ +\.\.\. .*/, "", name)
            rest = $0; sub(/.* \.\.\. /, "", rest)
            last = name
            if (rest ~ /^ignored/) {
                sub(/^ignored[, ]*/, "", rest)
                skip[++ns] = name (rest == "" ? ": no reason given" : ": " rest)
                last = ""
            } else if (rest == "FAILED") { bad[++nb] = name; last = "" }
            else if (rest == "ok") last = ""
        }
        # The outcome of a test that has printed something in between.
        last != "" && /^ignored( \(.*\))?$/ {
            rest = $0; sub(/^ignored */, "", rest)
            skip[++ns] = last (rest == "" ? ": no reason given" : ": " rest); last = ""
        }
        last != "" && /^FAILED$/ { bad[++nb] = last; last = "" }
        END {
            if (open) { failed++; died++; bad[++nb] = "(died) " where }
            # Something that did not compile, say: no test result speaks of it.
            if (code != 0 && !counted && !died) { failed++; bad[++nb] = "cargo test: exit code " code }
            ran = passed + failed
            list("skipped:", skip, ns)
            list("failed:", bad, nb)
            print ""
            printf "total: %d passed, %d failed, %d skipped\n", passed, failed, skipped
            exit (failed > 0 || ran == 0)
        }'
}

# SECONDS: a quarter of them for each way of waiting, one request at a time under KVM, until there were ten million of
# each. Where a run stops, the next one goes on.
wakeups() {
    local state=${CARGO_TARGET_DIR:-target}/soak/wakeups poll
    echo "soak: looking for lost wake-ups; target: 10,000,000 requests each, kept in $state"
    cargo build -q --release -p vhost-blk -p kickless-guest -p kickless-tests --bins || return 1
    mkdir -p "${state%/*}"
    for poll in adaptive event; do
        # The harness has deadlines of its own; this one is for the harness.
        timeout --kill-after=10 $(($1 / 4 + 300)) "${CARGO_TARGET_DIR:-target}/release/kvm-harness" wakeups \
            --poll $poll --requests 10000000 --state "$state" --seconds $(($1 / 4)) || return 1
    done
}

# The daemon killed under load: half of SOAK_KILLS (10,000) times with each ring format, about 20 minutes.
kills() {
    local kills=${SOAK_KILLS:-10000}
    echo "soak: killing the daemon $kills times"
    cargo build -q -p vhost-blk || return 1
    KICKLESS_KILLS=$((kills / 2)) timeout --kill-after=10 $((kills + 600)) \
        cargo test -q -p kickless-tests --test kill -- --nocapture killed_at_random
}

soak() {
    local minutes=${SOAK_MINUTES:-10} cases=${PROPTEST_CASES:-4096} start=$SECONDS round=0 tests=0 left code
    local limit=$((minutes * 60))
    export PROPTEST_CASES=$cases
    kills || { echo "soak: killing the daemon FAILED after $((SECONDS - start)) s"; return 1; }
    start=$SECONDS
    # First, because whatever they leave of their half of the time is the randomised tests'.
    wakeups $limit || { echo "soak: the search for lost wake-ups FAILED after $((SECONDS - start)) s"; return 1; }
    # Other sessions each time; a failure says which, to be repeated with KICKLESS_FUZZ_SEED.
    local seed=$((RANDOM * 1000003)) sessions=${KICKLESS_FUZZ_SESSIONS:-50000}
    echo "soak: $sessions random sessions from seed $seed"
    cargo build -q -p vhost-blk &&
        KICKLESS_FUZZ_SEED=$seed KICKLESS_FUZZ_SESSIONS=$sessions timeout --kill-after=10 1200 \
            cargo test -q -p kickless-tests --test hostile_front_end random || return 1
    echo "soak: 500 hand-overs from daemon to daemon, split and packed"
    cargo build -q -p vhost-blk || return 1
    KICKLESS_TAKEOVERS=500 timeout --kill-after=10 1200 cargo test -q -p kickless-tests --test takeover twenty -- \
        --nocapture --test-threads=1 || { echo "soak: hand-overs FAILED after $((SECONDS - start)) s"; return 1; }
    echo "soak: randomised tests with $cases cases each, for the rest of $minutes minutes"
    cargo test --workspace --exclude kickless-tests --exclude kickless-guest --lib --bins --tests --no-run || return 1
    while left=$((limit - (SECONDS - start))) && { [ "$left" -gt 0 ] || [ $round = 0 ]; }; do
        # A round that is still running long after its time hangs.
        timeout --kill-after=10 $((left + 600)) \
            cargo test -q --workspace --exclude kickless-tests --exclude kickless-guest --lib --bins --tests >"$tmp/round" 2>&1
        code=$?
        round=$((round + 1))
        if [ $code != 0 ]; then
            cat "$tmp/round"
            [ $code != 124 ] || echo "soak: round $round did not end in time"
            echo "soak: round $round FAILED after $((SECONDS - start)) s (proptest has written how to repeat it)"
            return 1
        fi
        tests=$((tests + $(awk '/^test result:/ { n += $4 } END { print n + 0 }' "$tmp/round")))
        if [ "$tests" = 0 ]; then echo "soak: there are no tests"; return 1; fi
        echo "soak: round $round passed, $tests tests in $((SECONDS - start)) s so far"
    done
    echo "soak: $round rounds, $tests tests passed, 0 failed, in $((SECONDS - start)) s"
}

case ${1:-all} in
    all) ;;
    soak) soak; exit ;;
    summary) summary "$2" 0; exit ;;
    *) echo "usage: $0 [soak | summary LOG]" >&2; exit 2 ;;
esac

if cargo fmt --version >/dev/null 2>&1; then
    step "cargo fmt" cargo fmt --all --check
else
    note "skipped cargo fmt: not installed (rustup component add rustfmt)"
fi
if cargo clippy --version >/dev/null 2>&1; then
    step "cargo clippy" cargo clippy --workspace --all-targets -- -D warnings
else
    note "skipped cargo clippy: not installed (rustup component add clippy)"
fi
# The end-to-end tests start the daemon that is built here.
step "build" cargo build --workspace --bins
# And one of them beside it that can be had to die between any two steps of a request.
step "build with fault points" cargo build -p vhost-blk --profile fault-points --features fault-points
if command -v apt-get >/dev/null; then
    step "guest image" scripts/guest-image.sh
else
    note "skipped guest image: made of Debian packages, and there is no apt-get here"
fi
# Counts of one compiler repeat exactly; with another one, or without valgrind, there is nothing to compare.
if ! command -v valgrind >/dev/null; then
    note "skipped instructions of a request: valgrind is not installed (scripts/setup.sh)"
elif reason=$(scripts/instructions.sh --skipped); then
    note "skipped instructions of a request: $reason"
else
    step "instructions of a request" scripts/instructions.sh --check
fi
echo "== tests"
cargo test --workspace --no-fail-fast 2>&1 | tee "$tmp/log"
code=${PIPESTATUS[0]}
summary "$tmp/log" "$code" "$tmp/steps"
