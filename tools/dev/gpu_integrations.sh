#!/usr/bin/env bash
# Programs that use flashspark, on a machine with a GPU, torch, transformers and Python 3.12, but no network. The real vLLM
# serves a model by the kernel of a Hugging Face repository; transformers, torch's SDPA, ComfyUI's node and JAX compute;
# a model is trained by LoRA, another one from the start.
#
#   here   tools/dev/gpu.sh prepare && tools/dev/gpu_vllm.sh prepare 0.25.1
#          tools/dev/gpu_integrations.sh prepare           fills .gpu/integrations: wheels, the stand-in flash_attn
#   there, from the tree's root (parts may arrive in several calls, .gpu/v0.25.1/vllm-N each in its own):
#          tools/dev/gpu.sh build                          the package, from .gpu/wheels and .gpu/include
#          tools/dev/gpu_integrations.sh keep              keeps and unpacks the parts that came with this call; so do all stages
#          tools/dev/gpu_integrations.sh programs          tests/gpu/test_integrations.py: all but vLLM
#          tools/dev/gpu_integrations.sh hook [CASE ...]   vLLM's FlashAttention 4 is the built kernel (make hf-kernel's tree),
#                                                          beside vLLM's own attention: eager graph
#          tools/dev/gpu_integrations.sh lora              examples/transformers/lora.py: SmolLM2 of .gpu/v0.25.1, if that is there
#          tools/dev/gpu_integrations.sh train [SECONDS]   examples/train, beside torch's SDPA and varlen_attn, each (90)
#          tools/dev/gpu_integrations.sh calls             bench/training_calls.py: what Python costs
#
# Not here, since it does not fit: SGLang's server (it needs torch 2.14, sglang-kernel and FlashInfer).
# Results go to $OUT (default build/gpu). LIMIT: seconds of one engine (240).
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
built=${FLASHSPARK_GPU_STATE:-/tmp/flashspark-gpu}
state=${FLASHSPARK_VLLM_STATE:-/tmp/flashspark-vllm}
out=${OUT:-$root/build/gpu}
system=${PYTHON:-python3}
version=0.25.1
repository=local/flashspark
source tools/dev/gpu_common.sh

prepare() {
  local folder=.gpu/integrations source=build/flash_attn
  mkdir -p "$folder"
  "$system" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d "$folder" \
    kernels==0.17.2 tomlkit==0.15.2 peft==0.21.2 jax-tvm-ffi==0.1.3
  rm -rf "$source" && mkdir -p build && cp -r integrations/flash_attn "$source"
  .venv/bin/python -m build -q --wheel --no-isolation --outdir "$folder" "$source"
  du -sh .gpu/*
}

keep() {
  keep_folders .gpu/integrations .gpu/kit
  if compgen -G '.gpu/v*/' >/dev/null || compgen -G "$state/in/v*/" >/dev/null; then
    FLASHSPARK_GPU_STATE=$state OUT=$out tools/dev/gpu_vllm.sh keep >/dev/null
  fi
}

# environment NAME WHEELS FOLDER ...: sets `python` to an environment with those wheels of .gpu/integrations and the folders,
# which follow its own. WHEELS: a glob.
environment() {
  keep
  local venv=$state/venv-$1 wheels=$2 site
  shift 2
  if [[ ! -d $venv ]]; then
    "$system" -m venv --without-pip --system-site-packages "$venv.part"
    site=$(echo "$venv.part"/lib/python3*/site-packages)
    # The last line is torch's folder: if python3 belongs to an environment, the new one does not see its packages.
    { printf '%s\n' "$@"; "$system" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])'; } >"$site/kit.pth"
    # shellcheck disable=SC2086  # the glob
    "$system" -m pip install -q --no-index --no-deps --no-cache-dir --disable-pip-version-check --target "$site" \
      "$state"/in/integrations/$wheels
    mv "$venv.part" "$venv"
  fi
  python=$venv/bin/python3
  export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
}

# Waits for vLLM's parts to be unpacked.
vllm_folder() {
  local _
  for _ in $(seq 150); do
    [[ -d $state/v$version ]] && return 0
    [[ -d $state/v$version.part ]] || { cat "$state/v$version.log" 2>/dev/null; echo "gpu_integrations.sh: parts of v$version are missing in $state/in" >&2; return 1; }
    sleep 1
  done
  cat "$state/v$version.log" >&2
  return 1
}

# The tree that `make hf-kernel` writes, of the built package.
hf_kernel() {
  [[ -d $built/site-built/flashspark ]] || { echo "gpu_integrations.sh: nothing is built: tools/dev/gpu.sh build first" >&2; return 1; }
  local wheel=$state/flashspark-0.1.0-py3-none-linux_x86_64.whl
  rm -f "$wheel"
  (cd "$built/site-built" && "$system" -m zipfile -c "$wheel" flashspark)
  "$system" tools/dev/hf_kernel.py --wheel "$wheel" --out "$state/hf-kernel"
}

# hook_case CASE: vLLM's own attention and the kernel, concurrently, as each spends most of its time starting.
hook_case() {
  local case=$1 model=$state/v$version/model failed=0
  run_engine "hook-$case-stock" 0 "$case" "$model" &
  LOCAL_KERNELS=$repository=$state/hf-kernel run_engine "hook-$case-kernel" 0 "$case" "$model" --kernel "$repository" || failed=1
  wait $! || failed=1
  ((failed)) && return 1
  "$python" tests/vllm/gpu/e2e.py compare "$out/hook-$case-stock.json" "$out/hook-$case-kernel.json" --model "$model"
}

hook() {
  local case failed=0 pids=()
  (($#)) || set -- eager graph
  quiet_vllm
  environment vllm '[kt]*.whl' "$state/v$version/site"  # kernels and tomlkit; flash_attn would need flashspark
  vllm_folder
  hf_kernel
  "$python" -c 'import importlib.util as u; assert u.find_spec("flashspark") is None, "flashspark is installed"'
  for case in "$@"; do hook_case "$case" & pids+=($!); done
  for case in "${pids[@]}"; do wait "$case" || failed=1; done
  (cd "$out" && tar czf hook.tgz hook-*.json hook-*.log && rm hook-*.json hook-*.log)  # few files come back from such a machine
  ((failed)) || echo "hook: passed"
  return $failed
}

# With the built package, and the stand-in flash_attn.
with_package() { environment programs '*.whl' "$built/site-built"; }

programs() {
  with_package
  timeout "${LIMIT:-240}" "$python" -P -m pytest -q --no-header -p no:cacheprovider --tb=short -rfEs --durations=3 \
    tests/gpu/test_integrations.py "$@" 2>&1 | tee "$out/integrations.log" | tail -n 40
  # This machine was prepared for all of them, so a skip means that a part did not arrive.
  if grep '^SKIPPED' "$out/integrations.log"; then
    echo "programs: failed, since the tests above were left out" >&2
    return 1
  fi
}

lora() {
  with_package
  local model=()
  if [[ -d $state/v$version/model ]]; then model=(--model "$state/v$version/model"); fi
  "$python" examples/transformers/lora.py --device cuda --out "$out/lora.json" "${model[@]}" "$@"
}

train() {
  with_package
  PYTHONSAFEPATH='' "$python" examples/train/train.py --attention flashspark torch torch-varlen --device cuda \
    --seconds "${1:-90}" --out "$out" "${@:2}"
}

stage=${1:-}
shift || true
case $stage in
  prepare) prepare ;;
  keep) keep && ls "$state/in" ;;
  hook) hook "$@" ;;
  programs) programs "$@" ;;
  lora) lora "$@" ;;
  train) train "$@" ;;
  calls) with_package && "$python" bench/training_calls.py --device cuda --json "$out/training-calls.json" "$@" ;;
  *) usage ;;
esac
