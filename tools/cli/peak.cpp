// The peak rate of float32 multiply-add: independent chains in registers, enough of them to hide the latency. Compiled
// for each vector width of the architecture; the widest that this CPU supports runs.
#include <algorithm>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "cli/machine.hpp"
#include "cpu/features.hpp"
#include "flashspark/flashspark.h"

namespace flashspark::cli {
namespace {

// two units with a latency of four to five cycles need ten; more would spill with 16 registers
constexpr int kChains = 12;
constexpr int kRounds = 1 << 14;

template <int kBytes>
struct Vector {
  typedef float Type __attribute__((vector_size(kBytes)));
};

// Inlined into a function whose target attribute selects the instruction set.
template <int kBytes>
[[gnu::always_inline]] inline float multiply_add(float seed) {
  using V = typename Vector<kBytes>::Type;
  V sums[kChains];
  const V factor = V{} + 0.999f, term = V{} + seed;
#pragma GCC unroll 12
  for (int c = 0; c < kChains; ++c) sums[c] = V{} + static_cast<float>(c);
  for (int round = 0; round < kRounds; ++round) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sums[c] = sums[c] * factor + term;
  }
  V sum{};
#pragma GCC unroll 12
  for (int c = 0; c < kChains; ++c) sum += sums[c];
  float result = 0;
  for (size_t lane = 0; lane < kBytes / sizeof(float); ++lane) result += sum[lane];
  return result;
}

#if defined(__x86_64__)
[[gnu::target("avx512f")]] float loop_64(float seed) {
  return multiply_add<64>(seed);
}
[[gnu::target("avx2,fma")]] float loop_32(float seed) {
  return multiply_add<32>(seed);
}
#endif
float loop_16(float seed) {
  return multiply_add<16>(seed);
}

struct Loop {
  float (*run)(float);
  int bytes;
};

Loop widest() {
#if defined(__x86_64__)
  const cpu::Features features = cpu::features();
  if (features.avx512) return {loop_64, 64};
  if (features.avx2) return {loop_32, 32};
#endif
  return {loop_16, 16};
}

}  // namespace

double measure_peak_flops(int threads) {
  using Clock = std::chrono::steady_clock;
  const Loop loop = widest();
  const double flops_per_run = 2.0 * kChains * kRounds * (static_cast<double>(loop.bytes) / sizeof(float));
  std::vector<double> rates(threads);
  {
    std::vector<std::jthread> workers;
    for (int t = 0; t < threads; ++t) {
      workers.emplace_back([&, t] {
        volatile float sink = 0;
        const auto end = Clock::now() + std::chrono::milliseconds(150);
        double best = 0;
        while (Clock::now() < end) {
          const auto start = Clock::now();
          for (int n = 0; n < 8; ++n) sink = loop.run(1e-3f + sink * 1e-9f);
          const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
          best = std::max(best, 8 * flops_per_run / seconds);
        }
        rates[t] = best;
      });
    }
  }
  double sum = 0;
  for (const double rate : rates) sum += rate;
  return sum;
}

}  // namespace flashspark::cli
