# shellcheck shell=bash
# The steps that test.sh and the Makefile run. Sourced, in the repository root. Wherever one says `local x` and then sets it,
# that is so that a failing command in $() ends the script.
source tests/env/common.sh

JOBS=${JOBS:-$(nproc)}
export CTEST_OUTPUT_ON_FAILURE=1
# A run must not depend on what the shell that started it holds.
unset PYTHONPATH PYTHONHOME

# build_cpp PRESET [CMAKE ARGUMENTS...]
build_cpp() {
  local toolkit kvikio
  if [[ $1 =~ ^(gpu|asan-all|cuda-on-cpu|cuda-on-cpu-tsan|cuda-coverage)$ ]]; then
    toolkit=$(cuda_toolkit)
    set -- "$@" "$toolkit"
  fi
  if [[ $1 == asan-all ]]; then
    kvikio=$(tests/env/gds.sh)
    set -- "$@" "-DLMCN_GDS_PYTHON=$kvikio/bin/python"
  fi
  quietly cmake --preset "$@"
  cmake --build --preset "$1" -j "$JOBS"
}

# The CMake argument that leads to a CUDA toolkit: the machine's own where it has one.
cuda_toolkit() {
  local toolkit
  if command -v nvcc >/dev/null || [[ -n ${CUDACXX:-}${CUDA_HOME:-}${CUDA_PATH:-} ]]; then
    echo -DLMCN_CUDA=ON
  else
    toolkit=$(tests/env/cuda.sh)
    echo "-DPython_EXECUTABLE=$toolkit/bin/python"
  fi
}

test_cpp() {
  ctest --preset "$1" --quiet --no-label-summary --output-log ".build/$1-ctest.log" || { grep -v '   Passed ' ".build/$1-ctest.log" || true; return 1; }
  tail -n 5 ".build/$1-ctest.log"
}

# Which lines of cpp/ the C++ tests run: each file, the lines that none runs, the total. Fails below COVERAGE_PERCENT.
coverage() {
  build_cpp coverage
  find .build/coverage -name '*.gcda' -delete
  test_cpp coverage
  .venv/bin/gcovr --root . --object-directory .build/coverage --filter cpp/ --exclude-throw-branches -j "$JOBS" \
    --txt - --txt-summary --fail-under-line "${COVERAGE_PERCENT:-90}"
}

# The same of cuda/ and cpp/src/copy, by the tests that need no GPU.
cuda_coverage() {
  build_cpp cuda-coverage
  find .build/cuda-coverage -name '*.gcda' -delete
  test_cpp cuda-coverage
  .build/cuda-coverage/tests/cpp/test_copy --gtest_brief=1
  .venv/bin/gcovr --root . --object-directory .build/cuda-coverage --filter cuda/ --filter cpp/src/copy/ --exclude-throw-branches \
    -j "$JOBS" --txt - --txt-summary --fail-under-line "${CUDA_COVERAGE_PERCENT:-95}"
}

# fuzz SECONDS [ARGUMENTS of tests/fuzz/run.sh...]
fuzz() {
  wheel_is_current || build_wheel
  install_wheel .venv/bin/python
  build_cpp fuzz
  tests/fuzz/run.sh --seconds "$@"
}

# Those of tests with vLLM (make_models.py); sets LMCN_MODEL_NAME of each.
make_models() {
  local name path
  for name in smollm2 tiny-qwen3 tiny-llama tiny-gemma3 tiny-llama4 tiny-deepseek; do
    path=$(tests/env/model.sh "$name")
    echo "$path"
    name=${name//-/_}
    export "LMCN_MODEL_${name^^}=$path"
  done
}

# What the stages to come install, while the first ones compile.
environments() {
  tests/env/cuda.sh
  tests/env/gds.sh
  tests/env/engine.sh
  make_models
  tests/compat/release.sh 0.29.0
}

# The same run each time: what fails it is the change. `make fuzz` explores.
fuzz_ci() {
  fuzz 30 --seed 1
}

# build_wheel [ARGUMENTS of pip...]
build_wheel() {
  rm -rf dist
  .venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist "$@" .
  ls -l dist
}

# With CUDA from the toolkit wheels, as it is given to users: the kernels for every architecture, warnings and spilled registers
# being errors.
build_cuda_wheel() {
  local toolkit build=.build/cuda-wheel
  toolkit=$(tests/env/cuda.sh)
  CUDACXX=$(echo "$toolkit"/lib/python3*/site-packages/nvidia/cu*/bin/nvcc) LMCN_CUDA=ON build_wheel \
    --config-settings=build-dir="$build" --config-settings=cmake.define.LMCN_CUDA_RESOURCES=ON
  .venv/bin/python tests/cuda/kernel_resources.py "$build" --json "$build/kernels.json"
}

the_wheel() {
  local wheels=(dist/lmcache_native-*.whl)
  [[ ${#wheels[@]} == 1 && -f ${wheels[0]} ]] || die "expected one wheel in dist/, found: ${wheels[*]}"
  echo "${wheels[0]}"
}

wheel_is_current() {
  local wheel
  wheel=$(the_wheel 2>/dev/null) || return 1
  [[ -z $(find CMakeLists.txt pyproject.toml cmake cpp cuda gds bindings python -newer "$wheel" -type f -not -name '*.pyc' -print -quit) ]]
}

# The version does not change between builds, so what is there goes first.
install_wheel() {
  local python=$1 wheel
  wheel=$(the_wheel)
  quietly "$python" -m pip uninstall -y lmcache-native
  quietly "$python" -m pip install "$wheel"
}

# The wheel beside the engine environment, not in it: the environment is shared by all checkouts of this user, and stays as made.
use_engine_site() {
  local python=$1 site=$REPO/.build/engine-site
  rm -rf "$site"
  quietly "$python" -m pip install --no-warn-conflicts --target "$site" "$(the_wheel)"
  export PYTHONPATH=$site
}

# What it holds, and that it works where no driver is.
check_wheel() {
  .venv/bin/python tests/python/check_wheel.py --wheel "$(the_wheel)" --allow-missing "$@"
}

test_python() {
  install_wheel .venv/bin/python
  .venv/bin/python -m pytest tests/python examples/demo --timeout 300 -q -rs
}

prepare_engine() {
  local engine
  engine=$(tests/env/engine.sh)
  make_models >/dev/null
  use_engine_site "$engine/bin/python"
  "$engine/bin/python" -c 'import lmcache_native; print(lmcache_native.__file__)'
}

# For tests with vLLM: sets ENGINE, and what they read from the environment.
engine_tests() {
  ENGINE=$(tests/env/engine.sh)/bin/python
  export PYTHONPATH=$REPO/.build/engine-site
  make_models >/dev/null
}

# Tests that start servers beside those that hold an engine in their own process: each of them waits more than it works.
test_e2e() {
  local servers=() rest=() file log=.build/e2e-servers.log pid code=0
  engine_tests
  for file in tests/e2e/test_*.py; do
    if grep -q 'VllmServer' "$file"; then servers+=("$file"); else rest+=("$file"); fi
  done
  # A command in the background ignores SIGINT, and so would what it starts.
  setsid env --default-signal=INT "$ENGINE" -m pytest "${servers[@]}" -o cache_dir=.build/pytest-servers --timeout 900 -q -rs --durations 10 >"$log" 2>&1 &
  pid=$!
  # shellcheck disable=SC2064  # of now
  trap "kill -INT -- -$pid 2>/dev/null || true" EXIT
  # Those tests of the package that need torch, which the tools environment lacks.
  "$ENGINE" -m pytest tests/python/test_hashing.py tests/python/test_store.py --timeout 300 -q -rs || code=$?
  "$ENGINE" -m pytest "${rest[@]}" tests/python/vllm_integration --timeout 900 -q -rs --durations 10 || code=$?
  wait "$pid" || code=$?
  trap - EXIT
  cat "$log"
  return "$code"
}

sources() {
  local folders=() folder
  for folder in cpp cuda gds bindings tests benchmarks examples; do [[ -d $folder ]] && folders+=("$folder"); done
  find "${folders[@]}" -type f \( -name '*.cpp' -o -name '*.hpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) -print0
}

# All of them, even when the first complains.
lint() {
  local bad=0
  sources | xargs -0 .venv/bin/clang-format --dry-run --Werror || bad=1
  .venv/bin/ruff check . || bad=1
  .venv/bin/ruff format --check --exclude '*.md' . || bad=1
  .venv/bin/mypy --strict python/lmcache_native examples/demo || bad=1
  shellcheck -x -P SCRIPTDIR .ci/run cmake/*.sh tests/compat/*.sh tests/cuda/*.sh tests/env/*.sh tests/fuzz/*.sh || bad=1
  return $bad
}

format() {
  sources | xargs -0 .venv/bin/clang-format -i
  .venv/bin/ruff check --fix . || true
  .venv/bin/ruff format --exclude '*.md' .
}

# The programs of gpu-check by nvcc, and their twins on the fake runtime, which need no GPU. One architecture: the wheel has them all.
cuda_build() {
  build_cpp gpu -DLMCN_CUDA_ARCHS=90-real
  test_cpp gpu-scripts
}

# Each step of gpu-check, on the fake runtime.
gpu_check_on_cpu() {
  engine_tests
  LMCN_GPU_PYTHON=$ENGINE gpu_check --on-cpu
}

# gpu_check [--on-cpu]
gpu_check() {
  tests/cuda/gpu_check.sh "$@"
}

# crash [ARGUMENTS...]: the crash tests at length. Arguments go to each of them.
crash() {
  local test
  quietly cmake --preset release
  quietly cmake --build --preset release -j "$JOBS" --target crash_test
  for test in kill power-cut; do .build/release/tests/crash/crash_test "$test" "$@"; done
}

soak() {
  build_cpp release
  if [[ $# == 0 ]]; then set -- --minutes 2; fi
  .build/release/tests/soak/soak "$@"
}

bench() {
  build_cpp bench
  local program
  for program in $(find .build/bench -type f -name 'bench_*' -perm -u+x | sort); do "$program"; done
  .build/bench/benchmarks/bench_io depths
}

simulate() {
  quietly cmake --preset bench
  quietly cmake --build --preset bench -j "$JOBS" --target simulator
  .build/bench/benchmarks/simulator/simulator "$@"
}

# with_engine PROGRAM [ARGUMENTS...]: a Python program with vLLM, the current wheel and SmolLM2.
with_engine() {
  local engine model
  wheel_is_current || { say "$1: building the wheel"; build_wheel; }
  engine=$(tests/env/engine.sh)
  model=$(tests/env/model.sh smollm2)
  use_engine_site "$engine/bin/python"
  exec "$engine/bin/python" "$1" --model "$model" "${@:2}"
}

# compat [ARGUMENTS of tests/compat/run.py...]: other releases of vLLM, and the keys of LMCache's.
compat() {
  local unpacked lmcache
  wheel_is_current || { say "compat: building the wheel"; build_wheel; }
  engine_tests
  use_engine_site "$ENGINE"
  lmcache=$("$ENGINE" -c 'import json; print(json.load(open("tests/data/lmcache_keys.json"))["version"])')
  unpacked=$(mktemp -d)
  # shellcheck disable=SC2064  # of now
  trap "rm -rf '$unpacked'" EXIT
  quietly "$ENGINE" -m pip install --no-cache-dir --no-deps --no-compile --target "$unpacked" "lmcache==$lmcache"
  "$ENGINE" tests/compat/lmcache_keys.py "$unpacked"
  "$ENGINE" tests/compat/run.py "$@"
}

# The oldest release that can be used, briefly.
compat_ci() {
  engine_tests
  "$ENGINE" tests/compat/run.py --short --releases 0.29.0
}

demo() {
  with_engine examples/demo/demo.py "$@"
}

bench_ttft() {
  with_engine benchmarks/vllm/ttft.py "$@"
}

bench_writes() {
  build_cpp bench
  .build/bench/benchmarks/write_amplification "$@"
}
