#!/usr/bin/env bash
# Installs the Debian packages that building and testing need; only what is missing, and nothing when nothing is.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

packages=(build-essential cmake ninja-build pkg-config liburing-dev libxxhash-dev libssl-dev libgtest-dev libbenchmark-dev
  python3-venv python3-dev git shellcheck clang libclang-rt-14-dev)  # the last two: fuzzing

command -v dpkg-query >/dev/null || die "this script knows Debian only; install the equivalents of: ${packages[*]}"
missing=()
for package in "${packages[@]}"; do
  [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
done
if ((${#missing[@]} == 0)); then
  say "system packages: all ${#packages[@]} present"
  exit 0
fi

root=()
if ((EUID != 0)); then
  sudo -n true 2>/dev/null || die "missing Debian packages and no root: sudo apt-get install ${missing[*]}"
  root=(sudo -n)
fi
say "system packages: installing ${missing[*]}"
quietly "${root[@]}" apt-get update
quietly "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"
