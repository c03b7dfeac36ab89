#!/usr/bin/env bash
# usage: model.sh smollm2|tiny-qwen3    Makes that model's folder in the cache and prints its path.
# smollm2 is the real SmolLM2-135M-Instruct; tiny-qwen3 has random weights and shows plumbing only.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

name=${1:?usage: model.sh smollm2|tiny-qwen3}
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
