#!/usr/bin/env bash
# deps.sh build|test ...: installs the missing Debian/Ubuntu packages of the given lists. Silent if none is missing.
set -euo pipefail
cd "$(dirname "$0")"
wanted=()
for list in "$@"; do mapfile -t -O "${#wanted[@]}" wanted <"apt-$list.txt"; done

# On an Arm machine the native compiler is used; elsewhere install the cross compiler.
if [[ $(uname -m) == aarch64 ]]; then
  wanted=($(printf '%s\n' "${wanted[@]}" | grep -vE 'aarch64|qemu'))
fi

installed=$(dpkg-query -W -f '${db:Status-Abbrev} ${Package}\n' "${wanted[@]}" 2>/dev/null | sed -n 's/^ii  *//p' || true)
missing=()
for package in "${wanted[@]}"; do
  grep -qxF "$package" <<<"$installed" || missing+=("$package")
done
((${#missing[@]} == 0)) && exit 0

echo "installing: ${missing[*]}"
sudo=()
if [[ $(id -u) != 0 ]]; then
  command -v sudo >/dev/null || { echo "deps.sh: needs root or sudo to install ${missing[*]}" >&2; exit 1; }
  sudo=(sudo)
fi
export DEBIAN_FRONTEND=noninteractive
"${sudo[@]}" apt-get update -q
"${sudo[@]}" apt-get install -yq --no-install-recommends "${missing[@]}"
