// create_block_mask on a GPU: a kernel of the mask function's, compiled by NVRTC when it is first needed.
#pragma once

#include "cuda/nvrtc.hpp"
#include "cuda/plan.hpp"
#include "mask/arguments.hpp"
#include "problem.hpp"

namespace flashspark::cuda {

// What the kernel gets, and how it is compiled and launched. p has passed validate(). Pure arithmetic.
struct BlockMaskPlan {
  Launch launch;
  int32_t lane_keys = 4;        // FLASHSPARK_LANE_KEYS
  bool wide_positions = false;  // graph::CudaSourceOptions
  BlockMaskArguments arguments{};
};
BlockMaskPlan make_block_mask_plan(const BlockMaskParams &p);
CompileRequest block_mask_request(const BlockMaskParams &p, const BlockMaskPlan &plan, Architecture arch);

// Puts it on the stream and returns; no device memory is read by the host.
void create_block_mask(const BlockMaskParams &p);

}  // namespace flashspark::cuda
