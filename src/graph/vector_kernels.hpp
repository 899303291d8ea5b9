// The inner loops of vector.cpp: one function for each operation and type of operands.
#pragma once

#include <cstdint>

#include "graph/graph.hpp"

namespace flashspark::graph {

// Every register has a multiple of so many elements, so that no loop has a tail.
constexpr int64_t kLanes = 16;

constexpr uint8_t kHolds = 1, kFails = 2;  // what VectorKernels::survey_bools gives

// Element i of row r is at byte r * row_stride of data, element i & mask. The mask is -1, or 0 where a row has one
// value (in all of kLanes elements).
struct Operand {
  const char *data;
  int64_t row_stride;
  int64_t mask;

  template <class T>
  const T *row(int64_t r) const {
    return reinterpret_cast<const T *>(data + r * row_stride);
  }
};

struct Call {
  Operand in[3];
  char *out;
  int64_t out_row_stride;
  int64_t rows, count;  // elements a row, a multiple of kLanes

  template <class T>
  T *out_row(int64_t r) const {
    return reinterpret_cast<T *>(out + r * out_row_stride);
  }
};
using Kernel = void (*)(const Call &call);

// Adds one dimension's part to the offsets of elements: offset += stride * index, where negative indices count from the
// end and others are clamped. Returns whether one was outside.
struct Locate {
  Operand index;
  int64_t rows, count;
  int64_t size, stride;
  bool is_first;  // the offsets are set, not added to
};

// One SIMD target's loops; nullptr where the scalar loop serves all targets.
struct VectorKernels {
  const char *target;
  Kernel kernels[kNumOps][kNumTypes];
  // For tensors whose offsets fit 32 bits.
  bool (*locate)(const Locate &locate, int32_t *offsets);
  void (*gather_f32)(const float *data, const int32_t *offsets, int64_t count, float *to);
  // Bools (0 or -1) to bytes (0 or 1).
  void (*store_bools)(const int32_t *from, int64_t count, uint8_t *to);
  // Whether any of them holds, and whether any does not: kHolds, kFails or both. count is a multiple of kLanes.
  uint8_t (*survey_bools)(const int32_t *from, int64_t count);
};

// Those of the target that the CPU engine uses, too (cpu/tile.hpp).
const VectorKernels &vector_kernels();

// Loops without vectors, for i64 and for what has no vector form.
Kernel scalar_kernel(Op op, Type operands);

}  // namespace flashspark::graph
