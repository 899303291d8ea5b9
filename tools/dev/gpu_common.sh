# Sourced by gpu.sh and gpu_vllm.sh, which run from the tree's root and set $state, $out and `set -euo pipefail`.
# shellcheck shell=bash disable=SC2154

# keep_folders DIR ...: copies what came with this call to $state/in, without overwriting what is there.
keep_folders() {
  mkdir -p "$state/in" "$out"
  local folder
  for folder in "$@"; do
    if [[ -d $folder ]]; then cp -r --update=none "$folder" "$state/in/" 2>/dev/null || cp -rn "$folder" "$state/in/"; fi
  done
}

# Prints the wheel in dist/ (the last by name), or nothing.
wheel_in_dist() { compgen -G 'dist/flashspark-*-linux_x86_64.whl' | tail -n 1 || true; }

# require_wheel FILE: fails with a message if there is no such file.
require_wheel() {
  [[ -f $1 ]] || { echo "${0##*/}: no wheel in dist/: run make wheel first" >&2; return 1; }
}

# Prints the comment at the head of the script and ends it.
usage() {
  sed -n '2,/^set/p' "$0" | sed '$d;s/^# \{0,1\}//'
  exit 2
}
