#!/usr/bin/env bash
# Makes a virtual environment with what the plugin for GPUDirect Storage is built against (libkvikio from PyPI, no driver) in the cache
# folder and prints its path.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

pip_environment kvikio requirements-gds-build.txt kvikio
