#!/usr/bin/env bash
# usage: test.sh full|quick|tsan|lint    Runs the stages one after another, all of them even when one fails, then says how each went.
# quick leaves out the sanitizers and the engine.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$REPO" || exit

mode=${1:?usage: test.sh full|quick|tsan|lint}
names=() results=() seconds=()
failed=0

# stage NAME COMMAND...: in a bash of its own, so that `set -e` holds inside functions too.
stage() {
  local name=$1 begin=$SECONDS result=passed
  shift
  printf '\n===== %s  %s\n' "$(date +%H:%M:%S)" "$name"
  if ! bash -c 'set -euo pipefail; source tests/env/stages.sh; "$@"' stage "$@"; then
    result=FAILED
    failed=$((failed + 1))
  fi
  names+=("$name") results+=("$result") seconds+=($((SECONDS - begin)))
  printf -- '----- %s: %s after %d s\n' "$name" "$result" $((SECONDS - begin))
  [[ $result == passed ]]
}

# A stage whose ground is missing is a failure, said as what it is.
not_run() {
  names+=("$1") results+=("NOT RUN") seconds+=(0)
  failed=$((failed + 1))
}

summary() {
  printf '\n===== summary: make test (%s), %d s\n' "$mode" "$SECONDS"
  local i
  for i in "${!names[@]}"; do printf '%-9s %5d s  %s\n' "${results[i]}" "${seconds[i]}" "${names[i]}"; done
  printf 'stages: %d passed, %d failed\n' $((${#names[@]} - failed)) "$failed"
  exit $((failed > 0))
}

cpp() {
  if stage "C++ build, $1" build_cpp "$1"; then
    stage "C++ tests, $1" test_cpp "$1" || true
  else
    not_run "C++ tests, $1"
  fi
}

[[ $mode =~ ^(full|quick|tsan|lint)$ ]] || die "unknown mode $mode"
stage "system packages" tests/env/system_packages.sh || summary
stage "tools" tests/env/dev.sh || summary

case $mode in
lint)
  stage "format, lint, types" lint || true
  summary
  ;;
tsan)
  cpp tsan
  cpp cuda-on-cpu-tsan
  summary
  ;;
esac

wheel=0 with=()
if [[ $mode == quick ]]; then
  cpp release
  stage "wheel" build_wheel && wheel=1
else
  mkdir -p .build
  # What goes wrong there is seen in the stage that needs it: it tries again.
  setsid bash -c 'source tests/env/stages.sh; environments' >.build/environments.log 2>&1 &
  # shellcheck disable=SC2064  # of now
  trap "kill -TERM -- -$! 2>/dev/null || true" EXIT
  cpp release
  cpp asan-all
  stage "wheel with CUDA, kernel resources" build_cuda_wheel && wheel=1
  with=(--cuda)
fi
if ((wheel)); then
  stage "wheel contents" check_wheel "${with[@]}" || true
  stage "Python tests" test_python || true
  if [[ $mode == full ]]; then stage "fuzzing" fuzz_ci || true; fi
else
  not_run "wheel contents"
  not_run "Python tests"
  if [[ $mode == full ]]; then not_run "fuzzing"; fi
fi
stage "format, lint, types" lint || true
if [[ $mode == full ]]; then
  built=0
  stage "build of gpu-check by nvcc" cuda_build && built=1
  wait
  if ((wheel)) && stage "engine environment and models" prepare_engine; then
    if ((built)); then stage "steps of gpu-check on the CPU" gpu_check_on_cpu || true; else not_run "steps of gpu-check on the CPU"; fi
    stage "end-to-end tests with vLLM" test_e2e || true
    stage "the oldest vLLM that can be used" compat_ci || true
  else
    not_run "end-to-end tests with vLLM"
    not_run "the oldest vLLM that can be used"
  fi
fi
summary
