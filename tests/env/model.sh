#!/usr/bin/env bash
# usage: model.sh NAME    Makes that model's folder in the cache and prints its path.
# make_models.py says which names there are. smollm2 is the real SmolLM2-135M-Instruct; the others have random weights.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

name=${1:?usage: model.sh NAME, see make_models.py}
maker=$REPO/tests/env/make_models.py
model=$CACHE/model-$name-$(sha256sum "$maker" | cut -c1-12)
if [[ ! -f $model/config.json ]]; then
  engine=$("$REPO/tests/env/engine.sh")
  lock "model-$name"
  if [[ ! -f $model/config.json ]]; then
    say "model: making $model"
    rm -rf "$model.new"
    quietly "$engine/bin/python" "$maker" "$name" "$model.new"
    mv -T "$model.new" "$model"
  fi
fi
echo "$model"
