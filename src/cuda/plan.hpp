// From a problem to launches: which instance, how many CTAs, how the keys are split. Pure arithmetic on what the host
// knows: no device memory is read, so a captured graph replays correctly at other lengths within the bounds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iosfwd>
#include <optional>
#include <string>

#include "cuda/function_plan.hpp"
#include "cuda/kernel_key.hpp"
#include "cuda/shape.hpp"
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

// One launch of a kernel, beside its arguments.
struct Launch {
  uint32_t grid[3] = {0, 0, 0};  // grid[0] == 0: nothing to launch
  uint32_t threads = 0;
  uint32_t shared_bytes = 0;
};

struct Plan {
  const Instance *instance = nullptr;
  const Tile *tile = nullptr;        // the instance's, on this GPU
  KernelDType dtype{}, out_dtype{};  // out: what the forward and combine kernels write
  Launch forward;
  ForwardArguments arguments{};
  std::optional<FunctionPlan> functions;  // the forward kernel is compiled at run time; its arguments are 4 KB
  Launch combine;
  int32_t combine_row_tiles = 0;  // CombineArguments::row_tiles
  int64_t partial_slots = 0;      // partial results of split row tiles
  size_t workspace = 0;           // bytes of scratch memory, which bind() takes: partial results, then derived lists

  KernelKey forward_key() const { return {Operation::attention_forward, dtype, instance->index}; }
  KernelKey combine_key() const { return {Operation::attention_forward_combine, out_dtype}; }

  // Of the partial results: a multiple of 16, since a tile has 16 rows or more.
  size_t partial_bytes() const;

  // Puts partial results and derived lists into `workspace` bytes at `memory`, which is aligned to 16 bytes. A plan
  // with workspace > 0 must be bound before it is launched.
  void bind(void *memory);

  // Of the kernel that derives lists; NULL: there is nothing to derive.
  const BlockTilePlan *block_tiles() const;
  Launch block_tiles_launch() const;

  // Of the other kernels, once the plan is bound.
  CombineArguments combine_arguments() const;
  ScheduleArguments schedule_arguments() const;

  // Elements of params.scheduler_metadata, which has a record for each CTA; 0 without Stream-K, or where a mask follows
  // from more on the device than lengths: CTAs with a record find their masks before the previous kernel has ended.
  int64_t schedule_size() const;
  Launch schedule() const { return {{forward.grid[0], 1, 1}, traits_of(Operation::attention_schedule).threads, 0}; }
};

// Whether an instance can run the problem at all; make_plan() chooses among those that do.
bool fits(const Instance &instance, const Params &p);

// p has passed validate() and unsupported(). `instance`: NULL, or one that fits and is to be taken.
Plan make_plan(const Params &p, const Machine &machine, const Instance *instance = nullptr);

// The most keys of a sequence with which the positions of a Stream-K problem fit in 32 bits.
int32_t max_key_rows(const Shape &shape, const ForwardArguments &a);

// The whole plan, a line for each launch and one for the scratch memory; empty for a plan that launches nothing.
std::string to_string(const Plan &plan);
// "attention_schedule: grid 96 x 1 x 1, 32 threads, 0 bytes of shared memory".
std::string to_string(const KernelKey &kernel, const Launch &launch);
std::ostream &operator<<(std::ostream &out, const Plan &plan);

}  // namespace flashspark::cuda
