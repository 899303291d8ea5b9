# Sourced by gpu.sh, gpu_vllm.sh and gpu_integrations.sh, which run from the tree's root and set $state, $out and `set -euo pipefail`.
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

# A vLLM that neither compiles nor asks the network for anything.
quiet_vllm() {
  export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
  export VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_USE_FLASHINFER_SAMPLER=0
}

# run_engine NAME FLASHSPARK CASE MODEL [--tp N]: runs one engine.
run_engine() {
  local name=$1 switch=$2 case=$3 path=$4 status=0
  shift 4
  # Concurrent engines must not share a cache of compiled graphs.
  FLASHSPARK=$switch VLLM_CACHE_ROOT=$state/cache/$name timeout "${LIMIT:-240}" "$python" tests/vllm/gpu/e2e.py run "$case" "$out/$name.json" --model "$path" "$@" \
    >"$out/$name.log" 2>&1 || status=$?
  grep '^E2E' "$out/$name.log" | cut -c1-300 || true
  ((status == 0)) || { echo "$name: exit status $status"; grep -vE '^\s*$' "$out/$name.log" | tail -n 15 | cut -c1-300; return 1; }
}

# Prints the comment at the head of the script and ends it.
usage() {
  sed -n '2,/^set/p' "$0" | sed '$d;s/^# \{0,1\}//'
  exit 2
}
