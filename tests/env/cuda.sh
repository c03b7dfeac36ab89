#!/usr/bin/env bash
# Makes a virtual environment with a CUDA toolkit for building (nvcc from PyPI, no driver) in the cache folder and prints its path.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

requirements=$REPO/requirements-cuda-build.txt
toolkit=$CACHE/cuda-toolkit-$(sha256sum "$requirements" | cut -c1-12)
if [[ ! -f $toolkit/.complete ]]; then
  lock cuda-toolkit
  if [[ ! -f $toolkit/.complete ]]; then
    say "CUDA toolkit: making $toolkit"
    rm -rf "$toolkit"
    "$(pick_python)" -m venv "$toolkit"
    quietly "$toolkit/bin/python" -m pip install -r "$requirements"
    touch "$toolkit/.complete"
  fi
fi
echo "$toolkit"
