#!/usr/bin/env bash
# Makes the virtual environment of the tools, .venv, and prints its path. Rebuilt when dev-requirements.txt changes.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

requirements=$REPO/tests/env/dev-requirements.txt
venv=$REPO/.venv
stamp=$venv/.complete
want=$(sha256sum "$requirements" | cut -d' ' -f1)

if [[ ! -f $stamp || $(<"$stamp") != "$want" ]]; then
  python=$(pick_python)
  say "tools: making $venv with $("$python" -V)"
  rm -rf "$venv"
  "$python" -m venv "$venv"
  quietly "$venv/bin/python" -m pip install --upgrade pip
  quietly "$venv/bin/python" -m pip install -r "$requirements"
  echo "$want" >"$stamp"
fi
echo "$venv"
