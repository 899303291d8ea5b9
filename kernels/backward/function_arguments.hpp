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

struct FunctionBackwardArguments : BackwardArguments {
  FunctionArguments functions;  // without `blocks`
  CapturedGradient gradients[kMaxCapturedTensors];
  BlockStatusTable blocks;
};

// Of the kernel that makes the table, whose CTAs have a row of the lists each.
struct BlockStatusArguments {
  BlockList lists[2];  // masked blocks, full blocks
  Divisor heads;       // lists of a sequence
  BlockStatusTable table;
};

// Of the kernel that sets gradients to 0 before they are summed.
struct ClearArguments {
  struct Tensor {
    CapturedGradient gradient;
    int32_t shape[kMaxCapturedRank];
    int32_t rank;
    int64_t elements;
  } tensors[kMaxCapturedTensors];
  int32_t num_tensors, num_ctas;
};

}  // namespace flashspark
