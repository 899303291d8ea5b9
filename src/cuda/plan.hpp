// From a problem to launches: which instance, how many blocks, how the keys are split. Pure arithmetic on what the host
// knows; no device memory is read, so a captured graph replays right at other lengths within the bounds.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/arguments.hpp"
#include "cuda/kernel_key.hpp"
#include "forward/arguments.hpp"
#include "forward/smem_plan.hpp"
#include "problem.hpp"

namespace flashspark::cuda {

// What a plan needs to know of a GPU.
struct Machine {
  Architecture arch;
  int32_t sm_count;
  int64_t l2_bytes;
  int32_t shared_bytes_per_sm;
};

struct Launch {
  uint32_t grid[3] = {0, 0, 0};  // grid[0] == 0: nothing to launch
  uint32_t threads = 0;
  uint32_t shared_bytes = 0;
};

struct Plan {
  const Instance *instance = nullptr;
  KernelDType dtype{}, out_dtype{};  // out: what the forward and combine kernels write
  Launch forward;
  ForwardArguments arguments{};  // of both kernels
  Launch combine;
  size_t workspace = 0;  // bytes that arguments.partial_out and partial_lse lie in

  KernelKey forward_key() const { return {Operation::attention_forward, dtype, instance->index}; }
  KernelKey combine_key() const { return {Operation::attention_forward_combine, out_dtype}; }

  // Elements of params.scheduler_metadata, a line a block; 0: blocks find no shares that could be from_metadata.
  int64_t schedule_size() const { return arguments.stream_k.ctas > 0 ? int64_t{forward.grid[0]} * kRecordWords : 0; }
  Launch schedule() const { return {{forward.grid[0], 1, 1}, traits_of(Operation::attention_schedule).threads, 0}; }
};

// Whether an instance can run the problem at all; make_plan() chooses among those that do.
bool fits(const Instance &instance, const Params &p);

// p has passed validate() and unsupported(). The plan's partial pointers are set from `workspace`, which may be NULL
// when only the size is wanted. `instance`: NULL, or one that fits and is to be taken.
Plan make_plan(const Params &p, const Machine &machine, void *workspace, const Instance *instance = nullptr);

// The most keys of a sequence with which the positions of a decode problem (stream of tiles) fit in 2^29.
int32_t max_key_rows(const Params &p, const ForwardArguments &a);

// Row tiles a unit, at most: of one sequence, or of all with cu_seqlens_q (each sequence wastes less than one tile).
int64_t tiles_per_unit(const Params &p, const Sizes &sizes, int64_t tile_rows);

}  // namespace flashspark::cuda
