// Results in e4m3, by way of 16-bit results in scratch memory and a launch of their own: few calls ask for them, and
// they must not cost the forward kernels an instruction, which short sequences would feel (docs/experiments.md E59,
// E60).
#pragma once

#include "cuda/plan.hpp"
#include "forward/arguments.hpp"

namespace flashspark::cuda {

bool is_quantized(const Params &p);

// Scratch memory for the 16-bit results, a multiple of 16 bytes, and the problem whose out they are.
size_t wide_out_bytes(const Params &p);
Params with_wide_out(const Params &p, void *memory);

struct QuantizePlan {
  Launch launch;  // of Operation::attention_forward_quantize; grid[0] == 0: no rows
  QuantizeArguments arguments{};
};
QuantizePlan make_quantize_plan(const Params &p, const Params &wide);

}  // namespace flashspark::cuda
