// attention_backward on a GPU: its plan, and what the table of implementations sees of it.
#pragma once

#include <cstddef>
#include <optional>
#include <string>

#include "backward/arguments.hpp"
#include "backward/smem_plan.hpp"
#include "cuda/backward_functions.hpp"
#include "cuda/plan.hpp"
#include "problem.hpp"
#include "scratch.hpp"

namespace flashspark::cuda {

struct BackwardPlan {
  const BackwardInstance *instance = nullptr;
  const BackwardTile *tile = nullptr;  // the instance's, on this GPU
  KernelDType dtype{};
  Launch preprocess, main, postprocess;  // in this order
  BackwardArguments arguments{};
  size_t sum_bytes = 0, row_bytes = 0;  // scratch: sums of dq, then two values for each row, then what `functions` take
  std::optional<BackwardFunctionPlan> functions;  // the main kernel is compiled at run time

  size_t workspace() const { return sum_bytes + 2 * row_bytes + (functions ? functions->bytes : 0); }
  // `memory` is aligned to 16 bytes. A plan must be bound before it is launched.
  void bind(void *memory);

  // Of the main kernel with functions, once the plan is bound.
  FunctionBackwardArguments function_arguments() const;

  KernelKey preprocess_key() const { return {Operation::attention_backward_preprocess, dtype}; }
  KernelKey main_key() const { return {Operation::attention_backward, dtype, InstanceIndex::none, instance->index}; }
  KernelKey postprocess_key() const { return {Operation::attention_backward_postprocess, dtype}; }
};

// Whether an instance can run the problem at all.
bool fits(const BackwardInstance &instance, const Params &forward);

// p has passed validate() and unsupported_backward(). `instance`: NULL, or one that fits and is to be taken. Pure
// arithmetic.
BackwardPlan make_backward_plan(const BackwardParams &p, const Machine &machine,
                                const BackwardInstance *instance = nullptr);
std::string to_string(const BackwardPlan &plan);

// The widest head that the instances have.
inline constexpr int64_t kMaxBackwardHeadDim = 256;

// As of the forward pass (cuda/forward.hpp).
std::string unsupported_backward(const BackwardParams &p);
void backward(const BackwardParams &p, const ScratchSource &scratch);
size_t backward_workspace(const BackwardParams &p);
std::string backward_plan_text(const BackwardParams &p);

}  // namespace flashspark::cuda
