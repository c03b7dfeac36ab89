# `make test` and `make demo` are the two commands; each sets up what it needs (Debian 12, root or sudo the first time).
.DEFAULT_GOAL := help
STAGE := bash -c 'set -euo pipefail; source tests/env/stages.sh; "$$@"' make
export DEMO_ARGS BENCH_ARGS COMPAT_ARGS CRASH_ARGS FUZZ_ARGS SOAK_ARGS SIM_ARGS
FUZZ_SECONDS ?= 600
export COVERAGE_PERCENT ?= 90
export CUDA_COVERAGE_PERCENT ?= 95

.PHONY: help test test-quick test-tsan crash fuzz coverage coverage-cuda lint format build wheel bench bench-ttft bench-writes compat simulate gpu-check demo soak tools clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

test: ## everything CI runs: C++, sanitizers, wheel, Python, real vLLM, format and lint
	@tests/env/test.sh full

test-quick: ## the same without sanitizers and without an engine
	@tests/env/test.sh quick

test-tsan: ## the C++ tests under ThreadSanitizer
	@tests/env/test.sh tsan

crash: tools ## kill a writing store 1,000 times, then power cuts; all that is found must be right (CRASH_ARGS="--rounds N --seed S --json")
	@$(STAGE) crash $(CRASH_ARGS)

fuzz: tools ## libFuzzer on everything that is parsed, ten minutes a target (FUZZ_SECONDS=60 FUZZ_ARGS="--target footer")
	@$(STAGE) fuzz $(FUZZ_SECONDS) $(FUZZ_ARGS)

coverage: tools ## lines of cpp/ that the C++ tests run, each file and in all; fails below COVERAGE_PERCENT=90
	@$(STAGE) coverage

coverage-cuda: tools ## the same of cuda/ and cpp/src/copy by the tests without a GPU; fails below CUDA_COVERAGE_PERCENT=95
	@$(STAGE) cuda_coverage

lint: ## clang-format, ruff, mypy, shellcheck
	@tests/env/test.sh lint

format: tools ## format all sources in place
	@$(STAGE) format

build: tools ## C++ library and tests, Release, in .build/release
	@$(STAGE) build_cpp release

wheel: tools ## the Python wheel, in dist/
	@$(STAGE) build_wheel

bench: tools ## the C++ benchmarks
	@$(STAGE) bench

bench-ttft: tools ## time to first token through vLLM, both connectors beside vLLM's own tiering (BENCH_ARGS="--help")
	@$(STAGE) bench_ttft $(BENCH_ARGS)

bench-writes: tools ## what NVMe reclaim costs in writes and gains in hits (BENCH_ARGS="--help")
	@$(STAGE) bench_writes $(BENCH_ARGS)

compat: tools ## this package with older releases of vLLM, fetched from PyPI (COMPAT_ARGS="--releases 0.31.0 --write"; 0.5 GiB each)
	@$(STAGE) compat $(COMPAT_ARGS)

simulate: tools ## hit rates of the eviction policies on a trace of requests (SIM_ARGS="--help")
	@$(STAGE) simulate $(SIM_ARGS)

gpu-check: ## prove and measure the CUDA copier on this machine's GPU; fails without one, needs no network (docs/gpu.md)
	@$(STAGE) gpu_check

demo: tools ## real vLLM: time to first token cold, from host memory, from NVMe after a restart and after kill -9 (DEMO_ARGS="--help")
	@$(STAGE) demo $(DEMO_ARGS)

soak: tools ## one store under four clients and a failing device, for long (SOAK_ARGS="--minutes 10"; default 2 minutes)
	@$(STAGE) soak $(SOAK_ARGS)

tools:
	@tests/env/system_packages.sh
	@tests/env/dev.sh >/dev/null

clean: ## builds, wheel, demo store and tool caches of this checkout; not the engine environment
	rm -rf .build build dist .demo .bench .pytest_cache .mypy_cache .ruff_cache
