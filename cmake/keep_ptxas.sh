#!/usr/bin/env bash
# Compiler launcher: runs nvcc, keeps what it prints in OBJECT.ptxas, and shows all of that but ptxas' notes.
set -uo pipefail
object=""
for ((i = 1; i < $#; ++i)); do
  if [[ ${!i} == -o ]]; then
    next=$((i + 1))
    object=${!next}
  fi
done
[[ -n $object ]] || exec "$@"  # a question about the compiler
code=0
"$@" >"$object.ptxas" 2>&1 || code=$?
grep -v -e '^ptxas info' -e '^    [0-9]* bytes stack frame' "$object.ptxas" >&2
exit $code
