// Times one tile configuration of one instance on dense problems, to choose the tiles in kernels/forward/instances.def.
// Each problem is first checked against a simple kernel on some of its rows.
//   nvcc -std=c++20 -O3 -arch=sm_90 -Ikernels -Iinclude -Isrc -DFLASHSPARK_NAME=d128_prefill
//     -DTUNE_WARPS=4 -DTUNE_ROWS=32 -DTUNE_KEYS=64 -DTUNE_SCORES=64 -DTUNE_GROUPS=1
//     -DTUNE_BUFFERING=double_buffer -DTUNE_QUERIES=shared -DTUNE_CTAS=2
//     bench/gpu/tune.cu src/cuda/plan.cpp src/cuda/arguments.cpp
//   ./tune [KB of shared memory per CTA, to limit the number of resident CTAs]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/plan.hpp"
#include "forward/kernel.cuh"

using namespace flashspark;
using Kernel = Traits<InstanceIndex::FLASHSPARK_NAME, Architecture::sm_90, ptx::Bfloat16>;

FLASHSPARK_KERNEL(Kernel::kThreads, Kernel::kTile.min_ctas)
tuned_forward(FLASHSPARK_PARAMETER ForwardArguments arguments) {
  forward<Kernel>(arguments);
}

__device__ float bf16(const void *p, int64_t n) {
  return ptx::to_float(static_cast<const ptx::Bfloat16 *>(p)[n]);
}

__global__ void fill(uint16_t *p, int64_t n, uint32_t seed) {
  for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < n; i += gridDim.x * 256ll) {
    uint32_t x = static_cast<uint32_t>(i) * 2654435761u + seed;
    x ^= x >> 16, x *= 0x85ebca6b, x ^= x >> 13, x *= 0xc2b2ae35, x ^= x >> 16;
    const float value = (static_cast<float>(x & 0xffff) + static_cast<float>(x >> 16)) / 32768.0f - 2.0f;
    p[i] = static_cast<uint16_t>(__float_as_uint(value) >> 16);
  }
}

// One CTA per sampled (row, head); `worst` receives the largest difference from out.
__global__ void check(ForwardArguments a, int64_t rows, float scale, float *worst) {
  const int64_t row = (blockIdx.x * 7919ll) % rows;
  const int64_t heads = a.num_heads_kv * a.group.value;
  const int64_t h = row % heads, i = row / heads % a.max_seqlen_q, b = row / heads / a.max_seqlen_q;
  const int64_t keys = a.causal ? i + a.max_seqlen_k - a.max_seqlen_q + 1 : a.max_seqlen_k;
  const int64_t hk = h / a.group.value;
  const int64_t q = b * a.q_strides.batch + i * a.q_strides.token + h * a.q_strides.head;
  extern __shared__ float p[];
  __shared__ float sum;
  for (int64_t j = threadIdx.x; j < keys; j += blockDim.x) {
    float s = 0;
    for (int d = 0; d < a.head_dim; ++d)
      s += bf16(a.q, q + d) * bf16(a.k, b * a.k_strides.batch + j * a.k_strides.token + hk * a.k_strides.head + d);
    p[j] = expf(s * scale);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0;
    for (int64_t j = 0; j < keys; ++j) sum += p[j];
  }
  __syncthreads();
  for (int d = threadIdx.x; d < a.head_dim_v; d += blockDim.x) {
    float o = 0;
    for (int64_t j = 0; j < keys; ++j)
      o += p[j] * bf16(a.v, b * a.v_strides.batch + j * a.v_strides.token + hk * a.v_strides.head + d);
    const float got = bf16(a.out, b * a.out_strides.batch + i * a.out_strides.token + h * a.out_strides.head + d);
    float error = fabsf(got - o / sum);
    if (!(error < 1e30f)) error = 1e30f;
    atomicMax(reinterpret_cast<int *>(worst), __float_as_int(error));
  }
}

int main(int argc, char **argv) {
  const int held = argc > 1 ? std::atoi(argv[1]) * 1024 : 0;
  cudaDeviceProp device;
  cudaGetDeviceProperties(&device, 0);
  const cuda::Machine machine{Architecture::sm_90, device.multiProcessorCount, device.l2CacheSize,
                              static_cast<int32_t>(device.sharedMemPerMultiprocessor)};
  const int shared = std::max<int>(Kernel::kSharedBytes, held);
  cudaFuncSetAttribute(tuned_forward, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  cudaFuncSetAttribute(check, cudaFuncAttributeMaxDynamicSharedMemorySize, 160 * 1024);
  cudaFuncAttributes attributes;
  cudaFuncGetAttributes(&attributes, tuned_forward);
  int resident = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, tuned_forward, Kernel::kThreads, shared);
  constexpr Tile t = Kernel::kTile;
  std::printf("%s %dx%dx%d %d/%d s%d q%d c%d | %d reg %zu spill %d CTAs |", Kernel::kInstance.name, t.warps,
              t.warp_rows, t.keys, t.score_keys, t.key_groups, static_cast<int>(t.buffering),
              static_cast<int>(t.queries), t.min_ctas, attributes.numRegs, attributes.localSizeBytes, resident);

  const struct {
    int64_t batch, heads_q, heads_kv, q, k;
    bool causal;
  } problems[] = {{4, 32, 8, 4096, 4096, false}, {4, 32, 8, 4096, 4096, true}, {1, 16, 8, 256, 256, true},
                  {1, 16, 8, 512, 512, true},    {1, 16, 8, 1024, 1024, true}, {1, 16, 8, 8192, 8192, true},
                  {1, 64, 8, 1024, 32768, true}};
  const int64_t dim = Kernel::kHeadDim, dim_v = Kernel::kHeadDimV;
  float *worst;
  cudaMalloc(&worst, 4);
  for (const auto &x : problems) {
    uint16_t *q, *k, *v, *o;
    const int64_t nq = x.batch * x.q * x.heads_q, nk = x.batch * x.k * x.heads_kv;
    cudaMalloc(&q, nq * dim * 2), cudaMalloc(&o, nq * dim_v * 2);
    cudaMalloc(&k, nk * dim * 2), cudaMalloc(&v, nk * dim_v * 2);
    fill<<<512, 256>>>(q, nq * dim, 1), fill<<<512, 256>>>(k, nk * dim, 2), fill<<<512, 256>>>(v, nk * dim_v, 3);
    cudaMemset(o, 0xff, nq * dim_v * 2);
    Params p{};
    p.num_seqs = x.batch, p.num_heads_q = x.heads_q, p.num_heads_kv = x.heads_kv;
    p.head_dim = dim, p.head_dim_v = dim_v, p.max_seqlen_q = x.q, p.max_seqlen_k = x.k;
    p.q = {q, x.q * x.heads_q * dim, x.heads_q * dim, dim, FLASHSPARK_BFLOAT16, 0};
    p.k = {k, x.k * x.heads_kv * dim, x.heads_kv * dim, dim, FLASHSPARK_BFLOAT16, 0};
    p.v = {v, x.k * x.heads_kv * dim_v, x.heads_kv * dim_v, dim_v, FLASHSPARK_BFLOAT16, 0};
    p.out = {o, x.q * x.heads_q * dim_v, x.heads_q * dim_v, dim_v, FLASHSPARK_BFLOAT16, 0};
    p.softmax_scale = 1 / std::sqrt(static_cast<float>(dim)), p.causal = x.causal;
    p.window_left = p.window_right = -1, p.num_splits = 1;
    cuda::Plan plan = cuda::make_plan(p, machine, &Kernel::kInstance);
    ForwardArguments a = plan.arguments;
    const int64_t rows = x.q * (x.heads_q / x.heads_kv);
    a.num_m_blocks = static_cast<int32_t>((rows + Kernel::kRows - 1) / Kernel::kRows);
    const dim3 grid(a.num_m_blocks * a.num_heads_times_batch, 1, plan.forward.grid[2]);
    const auto go = [&] { tuned_forward<<<grid, Kernel::kThreads, shared>>>(a); };
    for (int n = 0; n < 3; ++n) go();
    cudaMemset(worst, 0, 4);
    check<<<64, 128, x.k * 4>>>(a, x.batch * x.q * x.heads_q, p.softmax_scale, worst);
    float error = 0;
    cudaMemcpy(&error, worst, 4, cudaMemcpyDeviceToHost);
    std::vector<float> times;
    cudaEvent_t from, to;
    cudaEventCreate(&from), cudaEventCreate(&to);
    // Warm up for a quarter of a second: before that the clock is above what the power limit sustains.
    const auto time = [&](int launches) {
      float ms = 0;
      cudaEventRecord(from);
      for (int n = 0; n < launches; ++n) go();
      cudaEventRecord(to), cudaEventSynchronize(to), cudaEventElapsedTime(&ms, from, to);
      return ms / static_cast<float>(launches);
    };
    time(static_cast<int>(std::clamp(250 / time(1), 1.0f, 20000.0f)));
    for (int n = 0; n < 11; ++n) times.push_back(time(8));
    std::sort(times.begin(), times.end());
    const double kept =
        x.causal ? static_cast<double>(x.q) * (x.k - x.q) + x.q * (x.q + 1.0) / 2 : static_cast<double>(x.q) * x.k;
    const double flop = 2.0 * (dim + dim_v) * x.heads_q * x.batch * kept;
    const float ms = times[times.size() / 2];
    std::printf(" %5.0f%s", flop / ms * 1e-9, error < 0.02f ? "" : "!WRONG");
    if (const auto status = cudaGetLastError()) std::printf(" %s", cudaGetErrorString(status));
    cudaFree(q), cudaFree(k), cudaFree(v), cudaFree(o);
  }
  std::printf("\n");
}
