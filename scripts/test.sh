#!/bin/bash
# Every test tier, to the end whatever fails on the way. The last line counts what passed, failed and was skipped.
#
#   scripts/test.sh                all of it
#   scripts/test.sh soak           what takes too long for every day: kills, migrations, upgrades, random sessions, lost
#                                  wake-ups, randomised tests (CONTRIBUTING.md has the numbers)
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

# LOG EXIT-CODE [STEPS]: the skipped and failed tests by name, these with the first lines of why, then the totals of a
# log of `cargo test`: where only the end of a run is kept, it says what there is to know.
# A test binary that says "running" and never "test result" has died, and counts as a failure.
summary() {
    # Colours off; a test's own output may stand between its name and its outcome.
    sed 's/\x1b\[[0-9;]*m//g; s/\r$//' "$1" | awk -v code="$2" -v steps="${3:-/dev/null}" '
        function list(title, items, n, reasons,   i) {
            if (n) { print ""; print title; for (i = 1; i <= n; i++) print "  " items[i] reasons[i] }
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
            open = 1; where = binary; from = nb; of = 0
        }
        /^test result: / {
            open = 0; of = 0
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
        # What the failed ones said: after their own output the panic, which then is all that matters.
        /^failures:$/ { of = 0 }
        /^---- .* ----$/ {
            name = $0; sub(/^---- /, "", name); sub(/( stdout)? ----$/, "", name)
            for (of = nb; of > from && bad[of] != name; of--) {}
            if (of == from) of = 0
            lines = 0; next
        }
        of && / panicked at / && !(of in panicked) { panicked[of] = 1; why[of] = ""; lines = 0 }
        of && /[^ ]/ && lines < 12 && !/^note: run with `RUST_BACKTRACE/ {
            lines++; why[of] = why[of] "\n      " substr($0, 1, 200)
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
            list("failed:", bad, nb, why)
            print ""
            printf "total: %d passed, %d failed, %d skipped\n", passed, failed, skipped
            exit (failed > 0 || ran == 0)
        }'
}

# NAME LIMIT COMMAND...: one part of a soak, with a line that says what became of it. What it printed is shown if it
# failed. Tests of which none ran have not passed.
part() {
    local from=$SECONDS code ran why
    echo "soak: $1 ..."
    timeout --kill-after=10 "$2" "${@:3}" >"$tmp/part" 2>&1
    code=$?
    ran=$(awk '/^test result: / { n += $4; any = 1 } END { print any ? n + 0 : "none" }' "$tmp/part")
    why=$(sed -n 's/.*ignored[, ]*(*\(.*[^)]\))*$/\1/p' "$tmp/part" | grep -v 'measured' | head -n 1)
    if [ $code = 0 ] && [ "$ran" = 0 ] && [ -n "$why" ]; then
        note "skipped $1: $why"
    elif [ $code = 0 ] && [ "$ran" != 0 ]; then
        note "passed $1, in $((SECONDS - from)) s"
    else
        cat "$tmp/part"
        [ $code != 124 ] || echo "soak: it was not over after $2 s"
        [ "$ran" != 0 ] || echo "soak: no test has run"
        note "failed $1, after $((SECONDS - from)) s"
        return 1
    fi
}

build_guest() { cargo build -q --release -p kickless-guest --features bare; }

# SECONDS: half of them for each way of waiting, one request at a time under KVM, until there were ten million of each.
# Where a run stops, the next one goes on.
wakeups() {
    local state=${CARGO_TARGET_DIR:-target}/soak/wakeups poll
    if [ ! -w /dev/kvm ]; then
        note "skipped the search for lost wake-ups: no /dev/kvm"
        return
    fi
    cargo build -q --release -p vhost-blk -p kickless-guest -p kickless-tests --bins --features kickless-guest/bare || return 1
    mkdir -p "${state%/*}"
    for poll in adaptive event; do
        # The harness has deadlines of its own; this one is for the harness.
        part "lost wake-ups, --poll=$poll, towards 10,000,000 requests (kept in $state)" $(($1 / 2 + 300)) \
            "${CARGO_TARGET_DIR:-target}/release/kvm-harness" wakeups \
            --poll $poll --requests 10000000 --state "$state" --seconds $(($1 / 2)) || return 1
    done
}

# SECONDS: all that is made of proptest, again and again; at least once.
randomised() {
    local tests=(--workspace --exclude kickless-tests --exclude kickless-guest --lib --bins --tests)
    local start=$SECONDS round=0 left
    cargo test "${tests[@]}" --no-run || return 1
    while left=$(($1 - (SECONDS - start))) && { [ "$left" -gt 0 ] || [ $round = 0 ]; }; do
        round=$((round + 1))
        # A round that is still running long after its time hangs.
        part "randomised tests, $PROPTEST_CASES cases each, round $round" $((left + 600)) cargo test -q "${tests[@]}" ||
            return 1
    done
}

soak() {
    local minutes=${SOAK_MINUTES:-10} seed=$((RANDOM * 1000003)) start=$SECONDS
    local kills=${SOAK_KILLS:-10000} moves=${SOAK_MIGRATIONS:-100}
    local packets=${SOAK_PACKETS:-10000000}
    local upgrades=${SOAK_UPGRADES:-500} sessions=${SOAK_SESSIONS:-50000} attached=${SOAK_ATTACHED:-50}
    local changes=${SOAK_CHANGES:-120} configs=${SOAK_CONFIGS:-60} images=${SOAK_IMAGES:-500}
    local cuts=${SOAK_CUTS:-1000} calls=${SOAK_CALLS:-100}
    local limit=$((minutes * 60)) tests=(cargo test --workspace --test)
    export PROPTEST_CASES=${PROPTEST_CASES:-4096}
    {
        cargo build -q --workspace --bins --tests && build_guest
    } || { echo "soak: does not build"; return 1; }

    # By count; 0 leaves a part out. One that fails does not keep the others from running.
    [ "$kills" = 0 ] || part "the daemon killed $kills times, half of them with packed rings" $((kills + 600)) \
        env KICKLESS_KILLS=$((kills / 2)) "${tests[@]}" kill -- --nocapture killed_at_random
    [ "$images" = 0 ] || part "images of every kind, $images requests each, and $images damaged ones, and as many hundred in one process" $((images * 6 + 600)) \
        env KICKLESS_IMAGE_REQUESTS="$images" KICKLESS_DAMAGES="$images" KICKLESS_MALFORMED=$((images * 100)) "${tests[@]}" images -- --nocapture
    [ "$cuts" = 0 ] || part "$cuts power cuts, with images of each kind" $((cuts + 600)) \
        env KICKLESS_CUTS="$cuts" "${tests[@]}" power -- --nocapture
    [ "$moves" = 0 ] || part "a bare-metal guest moved $moves times in each way, under load" $((moves * 120 + 600)) \
        env KICKLESS_MIGRATIONS="$moves" "${tests[@]}" kvm -- --nocapture migrates
    [ "$moves" = 0 ] || part "Linux with fio moved $moves times in each way" $((moves * 120 + 600)) \
        env KICKLESS_MIGRATIONS="$moves" "${tests[@]}" qemu -- --nocapture guest_migrates
    [ "$upgrades" = 0 ] || part "$upgrades live upgrades, with split rings and with packed ones" $((upgrades * 4 + 600)) \
        env KICKLESS_TAKEOVERS="$upgrades" "${tests[@]}" takeover -- --nocapture --test-threads=1 twenty
    [ "$packets" = 0 ] || part "$packets packets through the switch, with each ring format" $((packets / 5000 + 600)) \
        env KICKLESS_PACKETS="$packets" "${tests[@]}" kvm -- --nocapture packets_are_exchanged
    [ "$attached" = 0 ] || part "a disk attached and detached $attached times on the vDPA bus" $((attached * 20 + 600)) \
        env KICKLESS_VDPA_ROUNDS="$attached" "${tests[@]}" vdpa -- --nocapture disks
    [ "$changes" = 0 ] || part "disks, reactors and ports changed at random for $changes s under load, and 20,000 calls of any kind" $((changes + 1200)) \
        env KICKLESS_CONTROL_SECONDS="$changes" KICKLESS_CONTROL_CALLS=20000 "${tests[@]}" control -- --nocapture
    [ "$configs" = 0 ] || part "configuration files made at random for $configs s" $((configs + 600)) \
        env KICKLESS_CONFIG_SECONDS="$configs" "${tests[@]}" configs -- --nocapture
    if [ "$calls" != 0 ] && scripts/schemathesis.sh; then
        part "the API of each daemon called by its description, up to $calls cases of each call" $((calls * 10 + 600)) \
            env KICKLESS_SCHEMATHESIS_EXAMPLES="$calls" "${tests[@]}" schemathesis -- --nocapture
    fi
    # Others each time; a failure says which, to be repeated.
    [ "$sessions" = 0 ] || part "$sessions random sessions (KICKLESS_FUZZ_SEED=$seed)" $((sessions / 20 + 600)) \
        env KICKLESS_FUZZ_SEED=$seed KICKLESS_FUZZ_SESSIONS="$sessions" "${tests[@]}" hostile_front_end random

    # By time: half of it, or less when there is nothing left to count; then whatever remains.
    local timed=$SECONDS
    if [ "$limit" != 0 ]; then
        wakeups $((limit / 2)) || note "failed the search for lost wake-ups"
        randomised $((limit - (SECONDS - timed))) || note "failed randomised tests (proptest has written how to repeat it)"
    fi

    echo
    sed 's/^/soak: /' "$tmp/steps"
    if grep -q '^failed ' "$tmp/steps"; then echo "soak: FAILED"; return 1; fi
    if ! grep -q '^passed ' "$tmp/steps"; then echo "soak: nothing has run"; return 1; fi
    echo "soak: all passed, in $((SECONDS - start)) s"
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
    step "cargo clippy of the bare-metal guest" cargo clippy --release -p kickless-guest --features bare -- -D warnings
else
    note "skipped cargo clippy: not installed (rustup component add clippy)"
fi
# The programs that the end-to-end tests start, and with them all tests, so that what both depend on is built once.
step "build" cargo build --workspace --bins --examples --tests
step "build of the bare-metal guest" build_guest
if command -v apt-get >/dev/null; then
    step "guest image" scripts/guest-image.sh
    # A newer kernel and emulator, for what Debian 12 is too old for.
    step "backports" scripts/backports.sh
    step "guest image of the newer kernel" scripts/guest-image.sh target/guest-backports target/backports/linux
else
    note "skipped guest image: made of Debian packages, and there is no apt-get here"
fi
# After the image: its machines are Linux then.
step "first day" scripts/first-day.sh
if reason=$(scripts/units.sh --skipped); then
    note "skipped units under systemd: $reason"
else
    echo "== units under systemd"
    scripts/units.sh
    case $? in
        0) note "passed units under systemd" ;;
        77) note "skipped units under systemd: no root could be made or booted, see above" ;;
        *) note "failed units under systemd" ;;
    esac
fi
# Where it cannot be had, its tests are skipped, and say so.
scripts/schemathesis.sh || true
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
