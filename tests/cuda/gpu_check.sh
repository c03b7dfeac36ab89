#!/usr/bin/env bash
# shellcheck disable=SC2317  # functions are called by step
# usage: gpu_check.sh [--on-cpu]    Builds, proves and measures the CUDA copier on this machine's GPU; docs/gpu.md says what it needs.
# All steps run, also after one that fails; the exit code is 0 when all passed. No network is used, and nothing is installed.
# --on-cpu: the same steps with the programs on the fake runtime and small numbers, to prove the steps; nothing goes to docs/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source tests/env/common.sh

suffix="" small=() out=docs/benchmarks label=gpu as=()
if [[ ${1:-} == --on-cpu ]]; then
  suffix=_on_cpu small=(--small) out=.build/gpu/report label=unit as=(--name fake --fake)
elif ! { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; } && ! compgen -G '/dev/nvidia[0-9]*' >/dev/null \
  && [[ ! -e /dev/dxg ]]; then
  die "no GPU: nothing proven (no nvidia-smi that lists one, no /dev/nvidia0, no /dev/dxg)"
fi
python=${LMCN_GPU_PYTHON:-python3}
build=.build/gpu
measured=$build/measured
checks=$measured/checks.tsv
failed=0
# Calibrations are made anew: none of another build or day counts.
rm -rf "$measured"
mkdir -p "$measured"
export XDG_CACHE_HOME=$PWD/$measured/cache
: >"$checks"

# step NAME COMMAND...: 77 is "not run", which is no success either.
step() {
  local name=$1 begin=$SECONDS code=0 state=passed
  shift
  printf '\n===== %s  %s\n' "$(date +%H:%M:%S)" "$name"
  "$@" || code=$?
  if ((code == 77)); then
    state="NOT RUN"
  elif ((code != 0)); then
    state=FAILED
  fi
  [[ $state == passed ]] || failed=$((failed + 1))
  printf -- '----- %s: %s after %d s\n' "$name" "$state" $((SECONDS - begin))
  printf '%s\t%s\n' "$state" "$name" >>"$checks"
  ((code == 0))
}

build() {
  local generator=()
  command -v ninja >/dev/null || generator=(-G "Unix Makefiles")
  cmake --preset gpu "${generator[@]}" -DPython_EXECUTABLE="$(command -v "$python")" >"$measured/configure.log" 2>&1 ||
    { tail -n 30 "$measured/configure.log" >&2; return 1; }
  cmake --build --preset gpu -j "${JOBS:-$(nproc)}"
}

# ctest's answer, and whether anything was left out.
tests() {
  local log=$measured/ctest.log
  ctest --test-dir "$build" -L "^$label\$" --output-on-failure --no-tests=error >"$log" 2>&1 || { cat "$log"; return 1; }
  grep -E 'Passed|Skipped' "$log"
  ! grep -q 'Skipped' "$log" || return 77
}

sanitizers() {
  grep -q '^LMCN_COMPUTE_SANITIZER:FILEPATH=.*-NOTFOUND' "$build/CMakeCache.txt" || return 0
  echo "compute-sanitizer is not here: memcheck and racecheck did not run"
  return 77
}

step "build" build || { echo "stopped: nothing proven" >&2; exit 1; }
step "kernel resources" "$python" tests/cuda/kernel_resources.py "$build" --json "$measured/kernels.json" || true
step "tests against the copier suite, random plans, order, reuse" tests || true
if [[ -z $suffix ]]; then step "compute-sanitizer" sanitizers || true; fi
step "torch's indexing" "$python" tests/cuda/gpu_check_torch.py --library "$build/tests/cuda/libcopier_c$suffix.so" || true
torch=()
if step "measuring" "$build/benchmarks/gpu/gpu_bench$suffix" --out "$measured/bench.jsonl" --path "${LMCN_GPU_PATH:-$measured}" "${small[@]}"; then
  if step "measuring torch" "$python" benchmarks/gpu/torch_baseline.py --out "$measured/torch.jsonl" "${small[@]}"; then
    torch=(--torch "$measured/torch.jsonl")
  fi
  code=0
  "$python" benchmarks/gpu/report.py --bench "$measured/bench.jsonl" "${torch[@]}" --checks "$checks" --out "$out" "${as[@]}" \
    --command "make gpu-check" || code=$?
  # On the fake runtime the report is to be written; what it says of speed means nothing.
  if [[ -n $suffix ]]; then ((code <= 2)) && [[ -s $out/gpu-fake.md ]] || failed=$((failed + 1)); else ((code == 0)) || failed=$((failed + 1)); fi
fi
printf '\n'
cat "$checks"
printf 'gpu-check%s: %s in %d s\n' "${suffix:+ on the fake runtime (no GPU)}" "$( ((failed == 0)) && echo passed || echo "NOT PASSED, $failed steps or targets")" "$SECONDS"
exit $((failed > 0))
