#!/usr/bin/env bash
# Makes a virtual environment with a CUDA toolkit for building (nvcc from PyPI, no driver) in the cache folder and prints its path.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

pip_environment cuda-toolkit requirements-cuda-build.txt "CUDA toolkit"
