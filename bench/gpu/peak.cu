// The peak rate of bf16 mma.sync on this GPU: independent products in registers and nothing else. Prints TFLOP/s.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <vector>

namespace {

constexpr int kChains = 8;    // independent accumulators per warp, more than the latency of an mma needs
constexpr int kSteps = 4096;  // products per accumulator
constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads, 1) multiply(float *sink, uint32_t seed) {
  float sums[kChains][4] = {};
  // Random finite bf16 pairs: multiplying zeros draws less power, so the GPU would clock higher.
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = (0x3f803f80u ^ ((seed + threadIdx.x * 2654435761u + i * 40503u) & 0x807f807fu));
  for (int i = 0; i < 2; ++i) b[i] = (0x3f803f80u ^ ((seed + threadIdx.x * 2246822519u + i * 60493u) & 0x807f807fu));
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (auto &sum : sums) {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
  }
  float total = 0;
  for (auto &sum : sums) total += sum[0] + sum[1] + sum[2] + sum[3];
  if (total == 12345.678f) *sink = total;  // never true, but the compiler cannot tell
}

}  // namespace

int main() {
  cudaDeviceProp device{};
  if (cudaGetDeviceProperties(&device, 0) != cudaSuccess) return 1;
  const int blocks = device.multiProcessorCount * 4;
  float *sink = nullptr;
  cudaEvent_t start, stop;
  if (cudaMalloc(&sink, 4) != cudaSuccess || cudaEventCreate(&start) != cudaSuccess ||
      cudaEventCreate(&stop) != cudaSuccess) {
    return 1;
  }
  std::vector<double> rates;
  for (int run = 0; run < 24; ++run) {
    cudaEventRecord(start);
    multiply<<<blocks, kThreads>>>(sink, static_cast<uint32_t>(run));
    cudaEventRecord(stop);
    if (cudaEventSynchronize(stop) != cudaSuccess) return 1;
    float ms = 0;
    cudaEventElapsedTime(&ms, start, stop);
    const double flop = 2.0 * 16 * 8 * 16 * kChains * kSteps * (kThreads / 32) * blocks;
    if (run >= 4) rates.push_back(flop / ms / 1e9);
  }
  std::sort(rates.begin(), rates.end());
  std::printf("%.1f\n", rates[rates.size() / 2]);
  return 0;
}
