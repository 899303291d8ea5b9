#!/usr/bin/env bash
# tune.sh FILE: builds and times the tile configurations in FILE, one per line:
#   name warps rows keys scores groups buffering queries ctas [held KB]
# TUNE_KERNELS: another copy of kernels/. TUNE_OUT: folder of the programs. TUNE_FLAGS: further compiler flags. The
# columns are TFLOP/s of B4 32/8 S4096 full and causal; B1 16/8 S256, S512, S1024 and S8192 causal; B1 64/8 with a chunk
# of 1024 over 32k.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${TUNE_OUT:-/tmp/tune}
mkdir -p "$out"
for part in arguments plan; do
  nvcc -std=c++20 -O3 -c -Ikernels -Iinclude -Isrc src/cuda/$part.cpp -o "$out/$part.o"
done
build() {
  set -- $1
  exe=$out/$(tr ' ' _ <<<"${*:1:9}")
  [[ -x $exe ]] || nvcc -std=c++20 -O3 -arch=sm_90 -I"${TUNE_KERNELS:-kernels}" -Iinclude -Isrc -DFLASHSPARK_NAME="$1" -DTUNE_WARPS="$2" \
    -DTUNE_ROWS="$3" -DTUNE_KEYS="$4" -DTUNE_SCORES="$5" -DTUNE_GROUPS="$6" -DTUNE_BUFFERING="$7" -DTUNE_QUERIES="$8" -DTUNE_CTAS="$9" ${TUNE_FLAGS:-} \
    bench/gpu/tune.cu "$out/plan.o" "$out/arguments.o" -o "$exe" || echo "does not build: $*"
}
export -f build
export out
grep -v '^#' "$1" | tr '\n' '\0' | xargs -0 -P "$(nproc)" -n 1 bash -c 'build "$1"' _
grep -v '^#' "$1" | while read -r -a w; do
  exe=$out/$(tr ' ' _ <<<"${w[*]:0:9}")
  [[ -x $exe ]] && "$exe" "${w[9]:-0}" || true
done
