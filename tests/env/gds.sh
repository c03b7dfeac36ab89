#!/usr/bin/env bash
# Makes a virtual environment with what the plugin for GPUDirect Storage is built against (libkvikio from PyPI, no driver) in the cache
# folder and prints its path.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

requirements=$REPO/requirements-gds-build.txt
kvikio=$CACHE/kvikio-$(sha256sum "$requirements" | cut -c1-12)
if [[ ! -f $kvikio/.complete ]]; then
  lock kvikio
  if [[ ! -f $kvikio/.complete ]]; then
    say "kvikio: making $kvikio"
    rm -rf "$kvikio"
    "$(pick_python)" -m venv "$kvikio"
    quietly "$kvikio/bin/python" -m pip install -r "$requirements"
    touch "$kvikio/.complete"
  fi
fi
echo "$kvikio"
