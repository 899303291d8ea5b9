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
  Launch preprocess, main, postprocess, sums;  // in this order; a grid of 0: nothing to do
  BackwardArguments arguments{};
  // Scratch memory, in this order: turns of CTAs; float32 sums of dq; of dk and dv, where several CTAs have the same
  // keys; what CTAs leave of a tile, and whether they have, and how far dq of each head is; two values for each row;
  // parts of dsinks and of dalibi_slopes; what `functions` take.
  size_t turn_bytes = 0, dq_bytes = 0, dk_bytes = 0, dv_bytes = 0, piece_bytes = 0, flag_bytes = 0, added_bytes = 0,
         row_bytes = 0, sink_bytes = 0, slope_bytes = 0;
  std::optional<BackwardFunctionPlan> functions;  // the main kernel is compiled at run time

  size_t workspace() const { return own_bytes() + (functions ? functions->bytes : 0); }
  size_t own_bytes() const {  // a multiple of 16
    const size_t of_gradients = turn_bytes + dq_bytes + dk_bytes + dv_bytes + piece_bytes + flag_bytes + added_bytes;
    return (of_gradients + 2 * row_bytes + sink_bytes + slope_bytes + 15) / 16 * 16;
  }
  // `memory` is aligned to 16 bytes. A plan must be bound before it is launched.
  void bind(void *memory);

  KernelKey preprocess_key() const { return {Operation::attention_backward_preprocess, dtype}; }
  KernelKey main_key() const { return {Operation::attention_backward, dtype, InstanceIndex::none, instance->index}; }
  KernelKey postprocess_key() const { return {Operation::attention_backward_postprocess, dtype}; }
  KernelKey sums_key() const { return {Operation::attention_backward_sums}; }
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
