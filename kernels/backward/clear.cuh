// Gradients of captured tensors become 0, before the main kernel adds to them.
#pragma once

#include "backward/function_arguments.hpp"
#include "ptx/ptx.cuh"

namespace flashspark {

constexpr int32_t kClearThreads = 128, kClearElements = 8;  // of a thread, at least

// Where an element lies, of those in the order of a contiguous tensor.
FLASHSPARK_DEVICE float *element_of(const ClearArguments::Tensor &tensor, int64_t element) {
  int64_t at = 0;
  FLASHSPARK_NO_UNROLL
  for (int32_t d = tensor.rank - 1; d > 0; --d) {
    const int64_t of_others = element / tensor.shape[d];
    at += (element - of_others * tensor.shape[d]) * tensor.gradient.strides[d];
    element = of_others;
  }
  return tensor.gradient.data + at + element * tensor.gradient.strides[0];
}

FLASHSPARK_DEVICE void clear_gradients(const ClearArguments &a) {
  ptx::grid_dependency_wait();  // in every CTA, see wait_for_previous_kernel()
  ptx::grid_dependency_launch();
  const int64_t step = int64_t{a.num_ctas} * kClearThreads;
  const int64_t first = static_cast<int64_t>(ptx::cta_x()) * kClearThreads + ptx::thread_index();
  for (int32_t n = 0; n < a.num_tensors; ++n) {
    const ClearArguments::Tensor &tensor = a.tensors[n];
    FLASHSPARK_NO_UNROLL
    for (int64_t element = first; element < tensor.elements; element += step) *element_of(tensor, element) = 0;
  }
}

}  // namespace flashspark
