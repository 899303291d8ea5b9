// The part of a backward plan that the user's functions and block lists need, and the kernel that NVRTC compiles for it
// (kernels/backward/function.cu).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "backward/config.hpp"
#include "backward/function_arguments.hpp"
#include "cuda/driver.hpp"
#include "cuda/nvrtc.hpp"
#include "cuda/plan.hpp"
#include "problem.hpp"

namespace flashspark::cuda {

// Whether a problem's backward pass takes such a kernel.
bool takes_backward_functions(const Params &forward);
// Whether an instance with functions, whose head fits, can run the problem: the one before it in the table may not.
bool fits_functions(const BackwardInstance &instance, const BackwardTile &tile, const BackwardParams &p);

struct BackwardFunctionPlan {
  FunctionArguments functions{};
  CapturedGradient gradients[kMaxCapturedTensors]{};
  uint32_t wanted = 0;  // bit n: the gradient of score_mod's tensor n
  bool wide_positions = false, block_sparse = false;
  bool in_turns = false;      // CTAs add to dq in turns
  bool native = false;        // biases or masks of NativeScoreMod stand beside the functions
  bool hands_on = false;      // pairs of warps hand on P^T: score functions may be written as biases
  Launch clear, make_blocks;  // before the other launches; a grid of 0: not needed
  Launch round;               // behind the main one, with exact sums
  ClearArguments clear_arguments{};
  RoundArguments round_arguments{};
  BlockStatusArguments block_arguments{};
  size_t bytes = 0;        // of scratch memory: what the lists say of blocks, and exact sums
  size_t block_bytes = 0;  // of the first
  // With `deterministic`: gradients of captured tensors are summed exactly, of some elements in each pass. The passes
  // behind the first are of clear, main kernel and round alone.
  int64_t passes = 0;
  uint32_t shared_bytes = 0;  // of the main kernel

  // `memory` is aligned to 16 bytes.
  void bind(void *memory);
  bool sums_exactly() const { return passes > 0; }
  // As many passes, of equal size, before anything else is done with the plan.
  void cut_into(int64_t number_of_passes);
  // Once the plan is bound, which begins the first pass.
  void begin_pass(int64_t number);
  // The main kernel's, of those that it has without functions; once the plan is bound.
  FunctionBackwardArguments with(const BackwardArguments &arguments) const;
  // The same of the passes behind the first, which compute nothing but gradients of captured tensors.
  FunctionBackwardArguments for_sums_alone(const BackwardArguments &arguments) const;
};

BackwardFunctionPlan plan_backward_functions(const BackwardParams &p, const BackwardInstance &instance,
                                             const BackwardTile &tile);
// A line for each launch before the others.
std::string to_string(const BackwardFunctionPlan &plan);
// And for the one behind them.
std::string text_behind(const BackwardFunctionPlan &plan);

// The main kernel, ready to be launched on device `index`.
Kernel get_backward_function_kernel(const Params &forward, const BackwardFunctionPlan &plan, const KernelKey &kernel,
                                    int index);
// What it is compiled from.
CompileRequest backward_function_request(const Params &forward, const BackwardFunctionPlan &plan,
                                         const KernelKey &kernel, Architecture arch);

// What the kernels with functions cannot take, in words; empty if nothing.
std::string unsupported_backward_functions(const BackwardParams &p);

}  // namespace flashspark::cuda
