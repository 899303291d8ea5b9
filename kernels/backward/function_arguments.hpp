// What the host hands to a backward kernel with the user's functions or block lists, and to the two small kernels that
// go before it. Plain data; every pointer lies on the device.
#pragma once

#include "attention/function_arguments.hpp"
#include "backward/arguments.hpp"

namespace flashspark {

// Where the gradient of a captured tensor is summed: of the shape of FunctionArguments::tensors[n].
struct CapturedGradient {
  float *data;  // NULL: not wanted
  int64_t strides[kMaxCapturedRank];
};

// What the user's lists say of each pair of a key block and a query block, by key blocks: a BlockStatus each,
// (batch or 1, heads or 1, key blocks, query blocks).
struct BlockStatusTable {
  uint8_t *data;
  int64_t batch_stride, head_stride;  // 0: one for all
  int32_t query_blocks, key_blocks;
  Divisor block_tokens, block_keys;  // of a block; multiples of 16
};

// Exact sums of float32 numbers (exact_sums.cuh) for some of the elements of captured tensors' gradients, which have
// one row of numbers: element n of the row that begins with `special`.
inline constexpr int32_t kExactWords = 10;
struct ExactSums {
  float *special;   // (count): the sum of what is not finite, or 0
  uint64_t *words;  // (kExactWords, count)
  int64_t count;
};

struct FunctionBackwardArguments : BackwardArguments {
  FunctionArguments functions;  // without `blocks`
  CapturedGradient gradients[kMaxCapturedTensors];
  BlockStatusTable blocks;
  // With `deterministic`: `gradients` are contiguous, and lie where elements of this row do or, but for those of the
  // row, would lie.
  ExactSums exact_sums;
};

// Of the kernel that makes the table, whose CTAs have a row of the lists each.
struct BlockStatusArguments {
  BlockList lists[2];  // masked blocks, full blocks
  Divisor heads;       // lists of a sequence
  BlockStatusTable table;
};

// Of the kernel that sets gradients, or exact sums, to 0 before they are summed.
struct ClearArguments {
  struct Tensor {
    CapturedGradient gradient;
    int32_t shape[kMaxCapturedRank];
    int32_t rank;
    int64_t elements;
  } tensors[kMaxCapturedTensors];
  int32_t num_tensors, num_ctas;
};

// Of the kernel that rounds exact sums: the tensors are the caller's, whose elements follow each other.
struct RoundArguments : ClearArguments {
  ExactSums sums;
  int64_t first;  // element of the sums' row
};

}  // namespace flashspark
