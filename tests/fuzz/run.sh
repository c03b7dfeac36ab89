#!/usr/bin/env bash
# usage: run.sh [--target NAME]... [--seconds N] [--seed N] [--minimise]
# Fuzzes in the build folder .build/fuzz (preset fuzz), two targets at once, config in .venv. A finding ends its target, is kept as
# .build/fuzz/findings/<target>/..., and makes this fail: replay it with .build/fuzz/tests/fuzz/fuzz_<target> FILE, and once it is
# fixed add it to tests/fuzz/regressions/<target>/.
# --seed: the run depends on N (not 0), the program and what is committed alone (rendezvous: on its owner's thread too). A second
# one does the same, as far as its time goes; nothing is kept but a finding. Otherwise each run explores anew, and what is new is
# kept in .build/fuzz/corpus/<target>; --minimise makes the committed corpus anew from that instead of fuzzing.
source "$(dirname "${BASH_SOURCE[0]}")/../env/common.sh"
cd "$REPO" || exit

programs=.build/fuzz/tests/fuzz
seconds=600
seed=
minimise=0
targets=()
while (($#)); do
  case $1 in
  --target) targets+=("${2:?--target NAME}") && shift 2 ;;
  --seconds) seconds=${2:?--seconds N} && shift 2 ;;
  --seed) seed=${2:?--seed N} && shift 2 ;;
  --minimise) minimise=1 && shift ;;
  *) die "unknown argument $1" ;;
  esac
done
if [[ -n $seed && ! $seed =~ ^[1-9][0-9]*$ ]]; then die "--seed is $seed, must be a number from 1"; fi  # libFuzzer: 0 is any
if ((${#targets[@]} == 0)); then
  for source in tests/fuzz/fuzz_*.cpp; do
    name=${source##*/fuzz_}
    targets+=("${name%.cpp}")
  done
  targets+=(config)
fi

memory=/tmp
[[ -w /dev/shm ]] && memory=/dev/shm
TMPDIR=$(mktemp -d -p "$memory" lmcn_fuzz_XXXXXX)
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
seeds=.build/fuzz/seeds
rm -rf "$seeds"
"$programs/make_corpus" "$seeds"

# With addresses that change, the values that are compared change, which libFuzzer mutates with.
same_addresses=()
if [[ -n $seed ]] && setarch --addr-no-randomize true 2>/dev/null; then same_addresses=(setarch --addr-no-randomize); fi

# What is committed reaches every edge that the whole corpus reaches, with few files (edges, not how often each is taken).
minimise_one() {
  local target=$1 new
  new=$(mktemp -d)
  mkdir -p "tests/fuzz/corpus/$target"
  "$programs/fuzz_$target" -set_cover_merge=1 -use_counters=0 -max_len=9000 "$new" "$seeds/$target" "tests/fuzz/corpus/$target" \
    ".build/fuzz/corpus/$target" 2>&1 | tail -n 1
  rm -f "tests/fuzz/corpus/$target"/*
  cp "$new"/* "tests/fuzz/corpus/$target/"
  rm -rf "$new"
}

# -timeout is of the wall: a machine with too much to do is no finding.
fuzz_one() {
  local target=$1 log=.build/fuzz/$1.log findings=.build/fuzz/findings/$1 corpus=.build/fuzz/corpus/$1
  local arguments=(-max_total_time="$seconds" -timeout=120 -artifact_prefix="$findings/")
  if [[ -n $seed ]]; then
    corpus=$(mktemp -d)
    arguments+=(-seed="$seed" -reload=0)
  fi
  mkdir -p "$corpus" "$findings"
  if [[ $target == config ]]; then
    PYTHONHASHSEED=${seed:-random} "${same_addresses[@]}" .venv/bin/python tests/fuzz/fuzz_config.py "${arguments[@]}" >"$log" 2>&1
    return
  fi
  arguments+=(-rss_limit_mb=2048 -malloc_limit_mb=64 -max_len=20000 -print_final_stats=1)
  if [[ -z $seed ]]; then
    arguments+=("$corpus" "tests/fuzz/corpus/$target" "$seeds/$target")
  else
    # A folder's files come in an order of the file system's.
    find "tests/fuzz/corpus/$target" "$seeds/$target" -type f | LC_ALL=C sort | paste -sd, | tr -d '\n' >"$corpus.list"
    arguments+=(-seed_inputs="@$corpus.list" "$corpus")
  fi
  "${same_addresses[@]}" "$programs/fuzz_$target" "${arguments[@]}" >"$log" 2>&1
}

report() {
  local target=$1 code=$2
  if ((code == 0)); then
    echo "$target: nothing found, $(grep '^Done' ".build/fuzz/$target.log" | tail -n 1)"
  else
    echo "$target: FAILED ($code)"
    tail -n 40 ".build/fuzz/$target.log"
  fi
}

if ((minimise)); then
  for target in "${targets[@]}"; do [[ $target == config ]] || minimise_one "$target"; done
  exit
fi

failed=0
for ((i = 0; i < ${#targets[@]}; i += 2)); do
  pids=()
  for target in "${targets[@]:i:2}"; do
    fuzz_one "$target" &
    pids+=($!)
  done
  for j in "${!pids[@]}"; do
    code=0
    wait "${pids[j]}" || code=$?
    report "${targets[i + j]}" "$code"
    ((code == 0)) || failed=1
  done
done
exit $failed
