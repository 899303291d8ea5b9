#!/usr/bin/env bash
# backward_tune.sh FILE: builds and times the tiles in FILE, one per line:
#   name warps keys rows scores K V stages sharing ctas        (K, V: true: in registers)
# TUNE_KERNELS: another copy of kernels/. TUNE_OUT: folder of the programs. TUNE_ARCH: 90. The columns are TFLOP/s (all
# kernels / the main one) of B4 32/32 S4096 full and causal, B4 32/8 S4096 causal, B1 16/8 S2048 and S1024, full and
# causal each, B8 16/16 S512 full and causal.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${TUNE_OUT:-/tmp/backward-tune}
mkdir -p "$out"
build() {
  set -- $1
  exe=$out/$(tr ' ' _ <<<"$*")
  [[ -x $exe ]] || nvcc -std=c++20 -O3 -arch="sm_${TUNE_ARCH:-90}" -I"${TUNE_KERNELS:-kernels}" -DFLASHSPARK_NAME="$1" \
    -DTUNE_WARPS="$2" -DTUNE_KEYS="$3" -DTUNE_ROWS="$4" -DTUNE_SCORES="$5" -DTUNE_K="$6" -DTUNE_V="$7" \
    -DTUNE_STAGES="$8" -DTUNE_SHARING="$9" -DTUNE_CTAS="${10}" ${TUNE_FLAGS:-} \
    bench/gpu/backward_tune.cu -o "$exe" || echo "does not build: $*"
}
export -f build
export out
grep -v '^#' "$1" | tr '\n' '\0' | xargs -0 -P "$(nproc)" -n 1 bash -c 'build "$1"' _
grep -v '^#' "$1" | while read -r line; do
  exe=$out/$(tr ' ' _ <<<"$line")
  [[ -x $exe ]] && "$exe" || true
done
