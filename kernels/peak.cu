// The mma.sync peak: chains of products that never leave the registers, what attention's arithmetic is measured
// against.
#include "peak.hpp"

#include "kernels.hpp"
#include "ptx/ptx.cuh"

constexpr flashspark::OperationTraits kOperation = traits_of(flashspark::Operation::mma_peak);

// `rounds` x kPeakChains products m16n8k16 a warp. Nobody reads `out`, but the compiler cannot know.
FLASHSPARK_KERNEL(kOperation.threads, kOperation.min_ctas)
FLASHSPARK_ENTRY(float *out, int32_t rounds) {
  using namespace flashspark;
  const uint32_t word = ptx::pack<ptx::Bfloat16>(static_cast<float>(ptx::thread_index()) * 0x1p-12f, 0x1p-6f);
  const uint32_t a[4] = {word, word + 1, word + 2, word + 3};
  float sums[kPeakChains][4] = {};
  for (int32_t round = 0; round < rounds; ++round) {
    FLASHSPARK_UNROLL
    for (int32_t chain = 0; chain < kPeakChains; ++chain)
      ptx::mma_m16n8k16<ptx::Bfloat16>(sums[chain], a, word + 4, word + 5);
  }
  float sum = 0;
  FLASHSPARK_UNROLL
  for (int32_t chain = 0; chain < kPeakChains; ++chain)
    sum += sums[chain][0] + sums[chain][1] + sums[chain][2] + sums[chain][3];
  if (sum == 0x1.23456p100f) out[ptx::thread_index()] = sum;
}
