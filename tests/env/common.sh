# shellcheck shell=bash disable=SC2034  # its variables are for those that source it
# Sourced by the scripts beside it. Progress goes to stderr, so that stdout can carry one answer (a path).
set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
CACHE=${LMCN_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/lmcache-native}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore

say() { printf '%s %s\n' "$(date +%H:%M:%S)" "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# The Python that everything is built for: the wheel, the tools and the engine environment must agree.
pick_python() {
  local candidate
  for candidate in ${LMCN_PYTHON:+"$LMCN_PYTHON"} python3.11 python3.12 python3.13 python3; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  die "no Python 3.11, 3.12 or 3.13 with venv found (Debian: apt-get install python3-venv; or set LMCN_PYTHON)"
}

# One builder at a time; a second one waits, then finds the work done. Holds until the script ends.
lock() {
  mkdir -p "$CACHE"
  exec 9>"$CACHE/$1.lock"
  flock -n 9 || { say "waiting for another run that builds $1"; flock 9; }
}

# Runs a command quietly; on failure shows the end of what it printed.
quietly() {
  local log
  log=$(mktemp)
  if ! "$@" >"$log" 2>&1 </dev/null; then
    tail -n 40 "$log" >&2
    rm -f "$log"
    die "failed: $*"
  fi
  rm -f "$log"
}

# pip_environment NAME REQUIREMENTS WHAT: a virtual environment with these packages in the cache folder, made unless it is there; prints
# its path.
pip_environment() {
  local requirements=$REPO/$2 place
  place=$CACHE/$1-$(sha256sum "$requirements" | cut -c1-12)
  if [[ ! -f $place/.complete ]]; then
    lock "$1"
    if [[ ! -f $place/.complete ]]; then
      say "$3: making $place"
      rm -rf "$place"
      "$(pick_python)" -m venv "$place"
      quietly "$place/bin/python" -m pip install -r "$requirements"
      touch "$place/.complete"
    fi
  fi
  echo "$place"
}
