#!/usr/bin/env bash
# Compares stock attention with flashspark's in the real vLLM, on a machine with a GPU, torch and Python 3.12 but no network.
#
#   here   tools/dev/gpu_vllm.sh prepare [VERSION ...]     fills .gpu/vVERSION/vllm-N with the parts of vLLM (0.25.1 0.33.0);
#                                                           WHAT=all adds FA2 and FlashInfer in peers-N, to be sent first
#          make wheel                                      dist/flashspark-*.whl
#   there, from the tree's root (parts may arrive in several calls, dist/ with a later one):
#          tools/dev/gpu_vllm.sh keep                      keeps the parts that came with this call; unpacks what is complete
#          tools/dev/gpu_vllm.sh verify VERSION [ARGUMENTS OF flashspark.vllm.verify]
#          tools/dev/gpu_vllm.sh e2e VERSION [CASE ...]    tests/vllm/gpu/e2e.py: all cases but spawn and full
#          tools/dev/gpu_vllm.sh models VERSION [KIND ...] small models with random weights, eager and graph; kinds:
#                                                           tests/vllm/gpu/models.py, all but tp unless named
#          tools/dev/gpu_vllm.sh tp VERSION                tensor_parallel_size=2, where there are two GPUs
#          tools/dev/gpu_vllm.sh speed VERSION             bench/vllm.py; BACKENDS="flashspark fa3 triton" MODELS="d128 d256" CACHES="auto fp8"
#          tools/dev/gpu_vllm.sh doctor VERSION
#
# Results go to $OUT (build/gpu). FLASHSPARK_CAPABILITIES is 9.0 unless set; LIMIT: seconds of one engine (240).
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
state=${FLASHSPARK_GPU_STATE:-/tmp/flashspark-vllm}
out=${OUT:-$root/build/gpu}
system=${PYTHON:-python3}
source tools/dev/gpu_common.sh

prepare() {
  local kit=${KIT:-$root/../shared/gpu-kit} version
  (($#)) || set -- 0.25.1 0.33.0
  mkdir -p .gpu/kit
  cp "$kit/unpack.sh" "$kit/gguf_to_hf.py" .gpu/kit/
  for version in "$@"; do
    nice "$system" "$kit/build.py" --what "${WHAT:-vllm}" --vllm "$version" --out ".gpu/v$version"
  done
  du -sh .gpu/kit .gpu/v*/*
}

keep() {
  keep_folders .gpu/kit .gpu/v*/
  local folder version parts
  for folder in "$state"/in/v*/; do
    [[ -d $folder ]] || continue
    version=$(basename "$folder")
    parts=("$folder"vllm-*/vllm.tar.xz.*)
    if [[ ${parts[0]##*-of-} == "${#parts[@]}" && -d $state/in/kit && ! -d $state/$version.part && ! -d $state/$version ]]; then
      mkdir "$state/$version.part"
      # In a new session, because the processes of the call that brought the last part may be killed when it ends.
      setsid bash -c 'bash "$1" "$2" "$3.part" && mv "$3.part" "$3" || mv "$3.part" "$3.failed"' - \
        "$state/in/kit/unpack.sh" "$folder" "$state/$version" >"$state/$version.log" 2>&1 &
      disown
    fi
  done
}

# Sets `python` to an environment with that vLLM and the wheel of dist/, installed as a user would install it.
environment() {
  local version=v$1 wheel venv site
  keep
  for _ in $(seq 120); do
    [[ -d $state/$version || -d $state/$version.failed ]] && break
    [[ -d $state/$version.part ]] || { echo "gpu_vllm.sh: parts of $version are missing in $state/in" >&2; return 1; }
    sleep 1
  done
  [[ -d $state/$version ]] || { cat "$state/$version.log" >&2; return 1; }
  # Point the kit's link to the folder that it was unpacked into.
  if [[ -d $state/$version/peers ]]; then ln -sfn "$state/$version/peers/_vllm_fa2_C.abi3.so" "$state/$version/site/vllm/vllm_flash_attn/"; fi
  wheel=$(wheel_in_dist)
  require_wheel "$wheel" || return 1
  venv=$state/venv-$version-$(sha256sum "$wheel" | cut -c1-12)
  if [[ ! -d $venv ]]; then
    "$system" -m venv --without-pip --system-site-packages "$venv.part"
    site=$(echo "$venv.part"/lib/python3*/site-packages)
    # The second line is torch's folder: if python3 belongs to an environment, the new one does not see its packages.
    { echo "$state/$version/site"; "$system" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])'; } >"$site/kit.pth"
    "$system" -m pip install -q --no-index --no-deps --no-cache-dir --disable-pip-version-check --target "$site" "$wheel"
    # pip --target installs the command beside the packages, but doctor looks for python3 beside the command.
    mv "$site/bin/flashspark" "$venv.part/bin/"
    mv "$venv.part" "$venv"
  fi
  python=$venv/bin/python3
  model=$state/$version/model
  quiet_vllm
  export FLASHSPARK_CAPABILITIES=${FLASHSPARK_CAPABILITIES:-9.0}
  export TVM_FFI_DISABLE_TORCH_C_DLPACK=1
}

# pair NAME CASE MODEL [--tp N]: runs stock and flashspark concurrently, then compares them. With mixed batches in
# graphs, stock FA3 of vLLM 0.33 loses track of most prompts, so `full` is compared with stock's decode graphs.
pair() {
  local name=$1 case=$2 path=$3 failed=0
  shift 3
  run_engine "$name-stock" 0 "${case/full/graph}" "$path" "$@" &
  run_engine "$name-ours" 1 "$case" "$path" "$@" || failed=1
  wait $! || failed=1
  ((failed)) && return 1
  "$python" tests/vllm/gpu/e2e.py compare "$out/$name-stock.json" "$out/$name-ours.json" --model "$path"
}

# An engine spends most of its time starting, on the CPU, so AT_ONCE pairs run concurrently.
pairs() {
  local failed=0 entry
  for entry in "$@"; do
    while (($(jobs -rp | wc -l) >= ${AT_ONCE:-4})); do wait -n || failed=1; done
    # shellcheck disable=SC2086  # an entry holds several words
    (pair $entry || { echo "FAILED: ${entry%% *}"; exit 1; }) &
  done
  while (($(jobs -rp | wc -l) > 0)); do wait -n || failed=1; done
  ((failed)) || echo "all of it: passed"
  return $failed
}

e2e() {
  local version=$1 case entries=()
  shift
  (($#)) || set -- eager graph default chunked prefix ngram pages thousand
  for case in "$@"; do entries+=("v$version-$case $case $model"); done
  pairs "${entries[@]}"
}

models() {
  local version=$1 kind entries=()
  shift
  (($#)) || set -- d64 d128 d256 window softcap mixed sinks mla vit vit72
  for kind in "$@"; do
    [[ -d $state/models/$kind ]] || "$python" tests/vllm/gpu/e2e.py model "$kind" "$state/models/$kind" >"$out/model.log" 2>&1
    entries+=("v$version-$kind-eager eager $state/models/$kind" "v$version-$kind-graph graph $state/models/$kind")
  done
  pairs "${entries[@]}"
}

tensor_parallel() {
  local version=$1
  [[ -d $state/models/tp ]] || "$python" tests/vllm/gpu/e2e.py model tp "$state/models/tp" >"$out/model.log" 2>&1
  # NVLink multicast must stay off: using it can put a host's GPUs out of service.
  export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 VLLM_ALLREDUCE_USE_SYMM_MEM=0
  pair "v$version-tp" graph "$state/models/tp" --tp 2
}

# Runs one backend after the other, so that each has the GPU to itself. BACKENDS, MODELS and CACHES select what runs.
speed() {
  local version=$1 model backend cache reports=()
  for model in ${MODELS:-d128 d256}; do for cache in ${CACHES:-auto}; do
    for backend in ${BACKENDS:-flashspark fa3 triton}; do
      local name=$out/v$version-speed-$backend-$model-$cache
      if timeout "${LIMIT:-240}" "$python" bench/vllm.py run "$backend" "$model" "$name.json" --cache "$cache" >"$name.log" 2>&1; then
        reports+=("$name.json")
      else
        echo "left out: $backend $model $cache: $(grep -E 'Error|error' "$name.log" | tail -n 1 | cut -c1-200)"
      fi
    done
  done; done
  "$python" bench/vllm.py table "${reports[@]}" | tee "$out/v$version-speed.md"
}

stage=${1:-}
shift || true
case $stage in
  prepare) prepare "$@" ;;
  keep) keep && ls "$state/in" "$state/in"/v*/ ;;
  verify) environment "$1" && "$python" -m flashspark.vllm.verify --batches 120 --replays 5 "${@:2}" 2>&1 | tee "$out/v$1-verify.log" | tail -n 40 ;;
  e2e) environment "$1" && e2e "$@" ;;
  models) environment "$1" && models "$@" ;;
  tp) environment "$1" && tensor_parallel "$@" ;;
  speed) environment "$1" && speed "$1" ;;
  doctor) environment "$1" && "$(dirname "$python")/flashspark" doctor; "$python" -m flashspark.vllm.doctor | tail -n 1 | "$python" -m json.tool ;;
  *) usage ;;
esac
