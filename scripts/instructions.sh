#!/bin/bash
# Instructions that a request takes in the device, counted by callgrind: the steps on the ring, for each ring format,
# form of chain and batch. Counts of one compiler repeat exactly, on any machine, however busy it is. What they say and
# what not: docs/performance.md, "Instructions".
#
#   scripts/instructions.sh            prints the table
#   scripts/instructions.sh --check    compares it with bench/instructions.tsv: fails if a count is more than 0.5 % higher
#   scripts/instructions.sh --update   writes it to bench/instructions.tsv
#   scripts/instructions.sh --skipped  why --check would compare nothing; fails if it would
#
# It needs valgrind. `make test` runs the check (some minutes, nearly all of it the build).
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-}
case $what in
    '' | --check | --update | --skipped) ;;
    *) echo "usage: $0 [--check | --update | --skipped]" >&2; exit 2 ;;
esac
table=bench/instructions.tsv
# Requests of a run; another one has twice as many, and the difference has no setting up in it.
requests=1024
columns=(pop validate complete publish null device)
functions=(Pair::pop Pair::validate Pair::complete Pair::publish Pair::null Device::round)

compiler="$(rustc --version), $(rustc -vV | sed -n 's/^host: //p')"
if [ "$what" = --check ] || [ "$what" = --skipped ]; then
    [ -f $table ] || { echo "instructions: there is no $table; make it with $0 --update" >&2; exit 1; }
    counted=$(sed -n 's/^# compiler: //p' $table)
    other="other compiler ($table is of $counted; this is $compiler)"
    case $what in
        --skipped) [ "$counted" != "$compiler" ] || exit 1; echo "$other"; exit 0 ;;
        --check) [ "$counted" = "$compiler" ] || { echo "instructions: skipped: $other"; exit 0; } ;;
    esac
fi
command -v valgrind >/dev/null || { echo "instructions: needs valgrind, which is not installed (apt-get install valgrind)" >&2; exit 1; }

cargo build --profile counted --quiet -p poll-engine --example instructions
program=${CARGO_TARGET_DIR:-target}/counted/examples/instructions
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

# REQUESTS FORMAT SHAPE BATCH: what the calls of each function have cost in all, in the order of the columns.
count() {
    valgrind --tool=callgrind --compress-strings=no --callgrind-out-file="$tmp/out" \
        "$program" "$2" "$3" "$4" "$1" >"$tmp/log" 2>&1 || { cat "$tmp/log" >&2; return 1; }
    # "cfn=" names who is called; the line after "calls=" ends in what it cost, with all that it called.
    awk -v functions="${functions[*]}" '
        /^cfn=/ { name = substr($0, 5) }
        /^calls=/ { getline; cost[name] += $NF }
        END {
            n = split(functions, wanted, " ")
            for (i = 1; i <= n; i++) {
                name = "instructions::pair::" wanted[i]
                if (!(name in cost)) { print "instructions: no calls of " name " in the profile" > "/dev/stderr"; exit 1 }
                printf "%d ", cost[name]
            }
        }' "$tmp/out"
}

measure() {
    local format shape batch once twice line
    echo "# Instructions a request, counted by scripts/instructions.sh; after a change that is meant: --update"
    echo "# compiler: $compiler"
    (IFS=$'\t'; echo "ring	chain	batch	${columns[*]}")
    "$program" >"$tmp/cases"
    while read -r format shape batch; do
        once=$(count $requests "$format" "$shape" "$batch")
        twice=$(count $((2 * requests)) "$format" "$shape" "$batch")
        line=$(awk -v once="$once" -v twice="$twice" -v n=$requests 'BEGIN {
            k = split(once, a, " "); split(twice, b, " ")
            for (i = 1; i <= k; i++) printf "\t%.2f", (b[i] - a[i]) / n
        }')
        printf '%s\t%s\t%s%s\n' "$format" "$shape" "$batch" "$line"
    done <"$tmp/cases"
}

measure >"$tmp/table"
case $what in
    '') column -t -s $'\t' <(grep -v '^#' "$tmp/table") ;;
    --update) cp "$tmp/table" $table; column -t -s $'\t' <(grep -v '^#' $table) ;;
    --check)
        awk -F '\t' '
            /^#/ { next }
            $1 == "ring" { if (FNR == NR) split($0, old); else split($0, column); next }
            { key = $1 "/" $2 "/" $3 }
            FNR == NR { for (i = 4; i <= NF; i++) before[key, old[i]] = $i; cases[key] = 1; next }
            {
                seen[key] = 1
                for (i = 4; i <= NF; i++) {
                    if (!((key, column[i]) in before)) { printf "not in the table yet: %s %s: %s\n", key, column[i], $i; fresh++; continue }
                    was = before[key, column[i]] + 0
                    change = was > 0 ? 100 * ($i - was) / was : ($i > 0 ? 100 : 0)
                    all++
                    if ($i + 0 == was) continue
                    how = change > 0.5 ? "HIGHER" : (change > 0 ? "higher" : "lower")
                    printf "%s: %s %s: %s, was %s (%+.2f %%)\n", how, key, column[i], $i, was, change
                    if (change > 0.5) worse++; else other++
                }
            }
            END {
                for (key in cases) if (!(key in seen)) { printf "MISSING: %s\n", key; worse++ }
                printf "instructions: %d counts, %d more than 0.5 %% higher (or missing), %d others differ\n", all, worse, other
                if (other + fresh > 0) print "instructions: refresh the table with scripts/instructions.sh --update"
                exit (worse > 0 || all == 0)
            }' $table "$tmp/table"
        ;;
esac
