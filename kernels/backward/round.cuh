// Behind the main kernel: gradients of captured tensors from their exact sums.
#pragma once

#include "backward/clear.cuh"
#include "backward/exact_sums.cuh"

namespace flashspark {

constexpr int32_t kRoundThreads = 128;

FLASHSPARK_DEVICE float rounded(const ExactSums &sums, int64_t element) {
  uint64_t words[kExactWords];
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < kExactWords; ++n) words[n] = sums.words[n * sums.count + element];
  const float special = sums.special[element], sum = rounded(words);
  return special != 0 ? special : sum;  // NaN is not 0, either
}

FLASHSPARK_DEVICE void round_gradients(const RoundArguments &a) {
  ptx::grid_dependency_wait();  // in every CTA, see wait_for_previous_kernel()
  ptx::grid_dependency_launch();
  const int64_t step = int64_t{a.num_ctas} * kRoundThreads;
  const int64_t own = static_cast<int64_t>(ptx::cta_x()) * kRoundThreads + ptx::thread_index();
  int64_t first = -a.first;  // of a tensor, in the sums
  for (int32_t n = 0; n < a.num_tensors; ++n) {
    const ClearArguments::Tensor &tensor = a.tensors[n];
    const int64_t begin = first > 0 ? first : 0, behind = first + tensor.elements;
    const int64_t end = behind < a.sums.count ? behind : a.sums.count;
    FLASHSPARK_NO_UNROLL
    for (int64_t at = begin + own; at < end; at += step) *element_of(tensor, at - first) = rounded(a.sums, at);
    first += tensor.elements;
  }
}

}  // namespace flashspark
