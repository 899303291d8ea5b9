// Times one tile of one backward instance on dense problems, to choose the tiles in kernels/backward/instances.def;
// each problem is checked on some of its rows and keys.
//   nvcc -std=c++20 -O3 -arch=sm_90 -Ikernels -DFLASHSPARK_NAME=d128 -DTUNE_WARPS=8 -DTUNE_KEYS=16 -DTUNE_ROWS=64
//     -DTUNE_SCORES=32 -DTUNE_K=false -DTUNE_V=true -DTUNE_STAGES=queries -DTUNE_SHARING=none -DTUNE_CTAS=1
//     bench/gpu/backward_tune.cu
// Columns are the TFLOP/s of each problem, of all three kernels and of the main one alone (2.5 times the forward FLOP,
// causal half). An argument leaves dq out, and its check: what the rest takes. Of instances with ScoreMod::native the
// last columns are B4 32/8 S4096 causal, of wide heads B2 16/16, with ALiBi, softcap and dropout; the check knows
// nothing of what dropout keeps there. Of those with ScoreMod::dropout all have it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <span>
#include <vector>

#include "backward/kernel.cuh"
#include "backward/postprocess.cuh"
#include "backward/preprocess.cuh"

#if !defined(TUNE_PARTS)
#define TUNE_PARTS 0  // 1: the query heads of a group are of one CTA each
#endif

using namespace flashspark;
using Element = ptx::Bfloat16;
using Kernel = BackwardTraits<BackwardIndex::FLASHSPARK_NAME, Architecture::sm_90, Element>;

FLASHSPARK_KERNEL(Kernel::kThreads, Kernel::kTile.min_ctas)
tuned_backward(FLASHSPARK_PARAMETER BackwardArguments arguments) {
  backward<Kernel>(arguments);
}
FLASHSPARK_KERNEL(kPreprocessThreads, 8) tuned_preprocess(FLASHSPARK_PARAMETER BackwardArguments arguments) {
  preprocess<Element>(arguments);
}
FLASHSPARK_KERNEL(kPostprocessThreads, 8) tuned_postprocess(FLASHSPARK_PARAMETER BackwardArguments arguments) {
  postprocess<Element>(arguments);
}

__device__ float bf16(const void *p, int64_t n) {
  return ptx::to_float(static_cast<const Element *>(p)[n]);
}

__global__ void fill(uint16_t *p, int64_t n, uint32_t seed) {
  for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < n; i += gridDim.x * 256ll) {
    uint32_t x = static_cast<uint32_t>(i) * 2654435761u + seed;
    x ^= x >> 16, x *= 0x85ebca6b, x ^= x >> 13, x *= 0xc2b2ae35, x ^= x >> 16;
    const float value = (static_cast<float>(x & 0xffff) + static_cast<float>(x >> 16)) / 32768.0f - 1.0f;
    p[i] = static_cast<uint16_t>(__float_as_uint(value) >> 16);
  }
}
__global__ void fill_lse(float *p, int64_t n, float value) {
  for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < n; i += gridDim.x * 256ll)
    p[i] = value + 0.001f * static_cast<float>(i % 97);
}

__device__ float dot(const void *x, int64_t at, const void *y, int64_t of, int width) {
  float sum = 0;
  for (int d = 0; d < width; ++d) sum += bf16(x, at + d) * bf16(y, of + d);
  return sum;
}

// One CTA a sample: the gradients of one key, and of one row, by the formula with whatever lse and out there are.
// worst: the largest difference of dq, dk, dv, as a part of `scale`.
__global__ void check(BackwardArguments a, float *worst, float *largest) {
  const int64_t sample = blockIdx.x * 7919ll, heads = a.num_heads_kv * a.group.value;
  const int64_t b = sample % a.num_seqs, h = sample / 3 % heads, hk = h / a.group.value;
  const int64_t t = sample % a.max_seqlen_q, j0 = sample / 5 % a.max_seqlen_k;
  const auto at = [&](const Strides &s, int64_t n, int64_t head) { return b * s.batch + n * s.token + head * s.head; };
  const PhiloxKey key = dropout_key(a.dropout);
  const float scale = exp2f(-a.lse_shift) * a.dropout.scale;
  const auto kept = [&](int64_t i, int64_t j, int64_t head) {  // times the scale
    if (scale == 1) return 1.0f;
    uint32_t row[kDropoutRowWords + 1];
    dropout_row(key, static_cast<int32_t>(head), static_cast<int32_t>(i), row);
    const DropoutKeys keys = dropout_keys(key, static_cast<int32_t>(b), static_cast<int32_t>(j / 64 * 4 + j % 8 / 2));
    const uint32_t word = dropout_draws(key, keys, row).at[j % 64 / 16];
    const uint32_t half = (j / 8 % 2 == 0 ? word : word >> 8 | word << 24) >> j % 2 * 16;
    return ((half & 0x7fff) < (a.dropout.limit & 0x7fff)) == (a.dropout.flip != 0) ? scale : 0.0f;
  };
  float slope = 1;  // of softcap, at the last probability
  const auto probability = [&](int64_t i, int64_t j, int64_t head) {
    if (a.causal && j > i + a.max_seqlen_k - a.max_seqlen_q) return 0.0f;
    float s = dot(a.q, at(a.q_strides, i, head), a.k, at(a.k_strides, j, hk), a.head_dim) * a.softmax_scale;
    if (a.softcap > 0) {
      const float x = tanhf(s / a.softcap);
      s = a.softcap * x, slope = 1 - x * x;
    }
    if (a.alibi_slopes != nullptr) s -= a.alibi_slopes[head] * fabsf(static_cast<float>(i - j));
    return expf(s - a.lse[b * a.lse_strides.batch + head * a.lse_strides.head + i]);
  };
  const auto gradient = [&](int64_t i, int64_t j, int64_t head, float p) {
    const int64_t row = at(a.dout_strides, i, head);
    return p * slope *
           (kept(i, j, head) * dot(a.dout, row, a.v, at(a.v_strides, j, hk), a.head_dim_v) -
            dot(a.dout, row, a.out, at(a.out_strides, i, head), a.head_dim_v));
  };
  const auto compare = [&](float got, float want, int which) {
    float error = fabsf(got - want);
    if (!(error < 1e30f)) error = 1e30f;
    atomicMax(reinterpret_cast<int *>(worst + which), __float_as_int(error));
    atomicMax(reinterpret_cast<int *>(largest + which), __float_as_int(fabsf(want)));
  };
  extern __shared__ float p[];
  // dq of row t
  for (int64_t j = threadIdx.x; j < a.max_seqlen_k; j += blockDim.x) p[j] = gradient(t, j, h, probability(t, j, h));
  __syncthreads();
  for (int d = threadIdx.x; d < a.head_dim; d += blockDim.x) {
    float sum = 0;
    for (int64_t j = 0; j < a.max_seqlen_k; ++j) sum += p[j] * bf16(a.k, at(a.k_strides, j, hk) + d);
    compare(bf16(a.dq, at(a.dq_strides, t, h) + d), sum * a.softmax_scale, 0);
  }
  // dk, dv of key j0
  for (int d = threadIdx.x; d < a.head_dim; d += blockDim.x) p[a.max_seqlen_q + d] = p[a.max_seqlen_q + 512 + d] = 0;
  for (int64_t head = hk * a.group.value; head < (hk + 1) * a.group.value; ++head) {
    for (const bool of_value : {false, true}) {
      __syncthreads();
      for (int64_t i = threadIdx.x; i < a.max_seqlen_q; i += blockDim.x) {
        const float x = probability(i, j0, head);
        p[i] = of_value ? x * kept(i, j0, head) : gradient(i, j0, head, x);
      }
      __syncthreads();
      for (int d = threadIdx.x; d < a.head_dim; d += blockDim.x) {
        float sum = 0;
        for (int64_t i = 0; i < a.max_seqlen_q; ++i)
          sum += p[i] *
                 (of_value ? bf16(a.dout, at(a.dout_strides, i, head) + d) : bf16(a.q, at(a.q_strides, i, head) + d));
        p[a.max_seqlen_q + (of_value ? 512 : 0) + d] += sum;
      }
    }
  }
  for (int d = threadIdx.x; d < a.head_dim; d += blockDim.x) {
    compare(bf16(a.dk, at(a.dk_strides, j0, hk) + d), p[a.max_seqlen_q + d] * a.softmax_scale, 1);
    compare(bf16(a.dv, at(a.dv_strides, j0, hk) + d), p[a.max_seqlen_q + 512 + d], 2);
  }
}

enum class Modified { none, alibi, softcap, dropout };
struct Shape {
  int32_t batch, heads, heads_kv, tokens;
  bool causal;
  Modified modified = Modified::none;
};

Divisor divisor(uint32_t d) {
  Divisor result{d, 0, 0};
  while ((uint64_t{1} << result.shift) < d) ++result.shift;
  if ((uint64_t{1} << result.shift) == d) return result;
  result.multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + result.shift)) + d - 1) / d);
  --result.shift;
  return result;
}

template <class T>
T *memory(int64_t count, std::vector<void *> &all) {
  T *p = nullptr;
  cudaMalloc(&p, static_cast<size_t>(count) * sizeof(T));
  all.push_back(p);
  return p;
}

BackwardArguments make(const Shape &s, std::vector<void *> &all) {
  constexpr int32_t dim = Kernel::kHeadDim;
  BackwardArguments a{};
  const int64_t rows = int64_t{s.batch} * s.tokens;
  const auto tensor = [&](int32_t heads, Strides &strides, uint32_t seed) {
    strides = {int64_t{s.tokens} * heads * dim, int64_t{heads} * dim, dim};
    auto *p = memory<uint16_t>(rows * heads * dim, all);
    fill<<<512, 256>>>(p, rows * heads * dim, seed);
    return p;
  };
  a.q = tensor(s.heads, a.q_strides, 1), a.k = tensor(s.heads_kv, a.k_strides, 2);
  a.v = tensor(s.heads_kv, a.v_strides, 3), a.out = tensor(s.heads, a.out_strides, 4);
  a.dout = tensor(s.heads, a.dout_strides, 5), a.dq = tensor(s.heads, a.dq_strides, 6);
  a.dk = tensor(s.heads_kv, a.dk_strides, 7), a.dv = tensor(s.heads_kv, a.dv_strides, 8);
  a.lse = memory<float>(rows * s.heads, all);
  a.lse_strides = {int64_t{s.heads} * s.tokens, 1, s.tokens};
  fill_lse<<<512, 256>>>(a.lse, rows * s.heads, std::log(static_cast<float>(s.tokens)));
  a.num_seqs = s.batch, a.num_heads_kv = s.heads_kv, a.head_dim = a.head_dim_v = dim;
  a.max_seqlen_q = a.max_seqlen_k = a.key_rows = s.tokens;
  a.group = divisor(static_cast<uint32_t>(s.heads / s.heads_kv));
  a.causal = s.causal, a.window_left = a.window_right = 1 << 30;
  a.softmax_scale = 1 / std::sqrt(static_cast<float>(dim)), a.scale_log2 = a.softmax_scale * kLog2E;
  a.dropout.scale = a.delta_scale = 1;
  if (s.modified == Modified::dropout) {  // 1/8: eighths of 2^15 as 16-bit floats' magnitudes, two of them
    a.dropout.scale = 8.0f / 7, a.dropout.limit = 0x1000 * 0x10001u, a.dropout.flip = 0;
    if (Kernel::kDropout) a.lse_shift = -std::log2(8.0f / 7), a.delta_scale = 7.0f / 8, a.dropout.scale = 1;
  }
  if (s.modified == Modified::softcap) {
    a.softcap = 2, a.cap_log2 = a.softcap * kLog2E, a.cap_factor = a.softmax_scale * (2 * kLog2E / a.softcap);
  }
  if (s.modified == Modified::alibi) {
    auto *slopes = memory<float>(s.heads, all);
    fill_lse<<<1, 256>>>(slopes, s.heads, 0.001f);
    a.alibi_slopes = slopes;
  }
  a.row_block = Kernel::kRows, a.seq_row_blocks = (s.tokens + Kernel::kRows - 1) / Kernel::kRows;
  a.num_row_blocks = s.batch * a.seq_row_blocks, a.padded_rows = a.num_row_blocks * Kernel::kRows;
  a.num_key_tiles = (s.tokens + Kernel::kKeys - 1) / Kernel::kKeys;
  a.sum_columns = a.sum_columns_v = dim, a.key_tile = Kernel::kKeys;
  a.section_heads = s.tokens <= 2048 ? s.heads * s.batch : 8;
  a.head_parts = TUNE_PARTS ? s.heads / s.heads_kv : 1;
  const int64_t padded = int64_t{s.heads} * a.padded_rows;
  a.dq_sum = memory<float>(padded * dim, all);
  if (a.head_parts > 1) {
    const int64_t keys = int64_t{a.num_key_tiles} * Kernel::kKeys * s.heads_kv * s.batch;
    a.dk_sum = memory<float>(keys * dim, all), a.dv_sum = memory<float>(keys * dim, all);
  }
  a.row_lse = memory<float>(padded, all), a.row_delta = memory<float>(padded, all);
  return a;
}

int main(int argc, char **) {
  constexpr int shared = Kernel::kMemory.total;
  cudaFuncSetAttribute(tuned_backward, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  cudaFuncSetAttribute(check, cudaFuncAttributeMaxDynamicSharedMemorySize, 160 * 1024);
  cudaFuncAttributes attributes;
  cudaFuncGetAttributes(&attributes, tuned_backward);
  int resident = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, tuned_backward, Kernel::kThreads, shared);
  constexpr BackwardTile t = Kernel::kTile;
  std::printf("%s %dx%d rows %d/%d k%d v%d s%d g%d c%d | %d reg %zu spill %d CTAs |", Kernel::kInstance.name, t.warps,
              t.warp_keys, t.rows, t.score_rows, t.keys_in_registers, t.values_in_registers, static_cast<int>(t.stages),
              static_cast<int>(t.sharing), t.min_ctas, attributes.numRegs, attributes.localSizeBytes, resident);
  constexpr Shape kShapes[] = {{4, 32, 32, 4096, false},
                               {4, 32, 32, 4096, true},
                               {4, 32, 8, 4096, true},
                               {1, 16, 8, 2048, false},
                               {1, 16, 8, 2048, true},
                               {1, 16, 8, 1024, false},
                               {1, 16, 8, 1024, true},
                               {8, 16, 16, 512, false},
                               {8, 16, 16, 512, true},
                               {4, 32, 8, 4096, true, Modified::alibi},
                               {4, 32, 8, 4096, true, Modified::softcap},
                               {4, 32, 8, 4096, true, Modified::dropout}};
  constexpr Shape kWideHeads[] = {{2, 16, 16, 4096, false},
                                  {2, 16, 16, 4096, true},
                                  {1, 16, 8, 1024, false},
                                  {2, 16, 16, 4096, true, Modified::alibi},
                                  {2, 16, 16, 4096, true, Modified::softcap},
                                  {2, 16, 16, 4096, true, Modified::dropout}};
  float *worst;
  cudaMalloc(&worst, 6 * sizeof(float));
  for (Shape s : Kernel::kHeadDim > 128 ? std::span<const Shape>(kWideHeads) : std::span<const Shape>(kShapes)) {
    if (s.modified != Modified::none && !Kernel::kNative) continue;
    if (Kernel::kDropout) s.modified = Modified::dropout;
    std::vector<void *> all;
    BackwardArguments a = make(s, all);
    if (argc > 1) a.dq_sum = nullptr;
    const int blocks = a.num_row_blocks * s.heads, tiles = a.num_key_tiles * s.heads_kv * s.batch * a.head_parts;
    const auto main_kernel = [&] { tuned_backward<<<tiles, Kernel::kThreads, shared>>>(a); };
    const auto go = [&] {
      tuned_preprocess<<<blocks, kPreprocessThreads>>>(a);
      main_kernel();
      const int of_dq = a.dq_sum != nullptr ? blocks : 0, of_dk = a.head_parts > 1 ? tiles : 0;
      if (of_dq + of_dk > 0) tuned_postprocess<<<of_dq + of_dk, kPostprocessThreads>>>(a);
    };
    go();
    cudaMemset(worst, 0, 6 * sizeof(float));
    check<<<48, 128, (s.tokens + 1024) * 4>>>(a, worst, worst + 3);
    float errors[6] = {};
    cudaMemcpy(errors, worst, sizeof errors, cudaMemcpyDeviceToHost);
    bool right = true;
    for (int n = a.dq_sum != nullptr ? 0 : 1; n < 3; ++n) right &= errors[n] < 0.02f * errors[n + 3];
    cudaEvent_t from, to;
    cudaEventCreate(&from), cudaEventCreate(&to);
    const auto time = [&](int launches, auto &&each) {
      float ms = 0;
      cudaEventRecord(from);
      for (int n = 0; n < launches; ++n) each();
      cudaEventRecord(to), cudaEventSynchronize(to), cudaEventElapsedTime(&ms, from, to);
      return ms / static_cast<float>(launches);
    };
    const auto median = [&](auto &&each) {
      // Warm up: before that the clock is above what the power limit sustains.
      time(static_cast<int>(std::clamp(100 / time(1, each), 1.0f, 2000.0f)), each);
      std::vector<float> times;
      for (int n = 0; n < 9; ++n) times.push_back(time(4, each));
      std::sort(times.begin(), times.end());
      return times[times.size() / 2];
    };
    const float whole = median(go), alone = median(main_kernel);
    const double flop =
        2.5 * 4 * s.batch * s.heads * static_cast<double>(s.tokens) * s.tokens * Kernel::kHeadDim / (s.causal ? 2 : 1);
    std::printf(" %.0f/%.0f%s", flop / whole * 1e-9, flop / alone * 1e-9, right ? "" : "!WRONG");
    if (const auto status = cudaGetLastError()) std::printf(" %s", cudaGetErrorString(status));
    std::fflush(stdout);
    for (void *p : all) cudaFree(p);
  }
  std::printf("\n");
}
