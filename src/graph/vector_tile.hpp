// Runs a compiled graph over one tile of rows and keys.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "graph/vector.hpp"
#include "graph/vector_kernels.hpp"

namespace flashspark::graph {

// The rows and keys of a tile.
struct Stretch {
  const Row *rows;
  int32_t num_rows;
  int32_t kv_begin;
  int32_t num_keys;
};

class Tile {
 public:
  Tile(const Program &program, const Bindings &bindings, const Stretch &stretch, OutOfRange *oor);

  // store(result, first row, number of rows) is called for each block of rows. If it returns a bool, false ends the
  // tile.
  template <class Store>
  void run(Store store) {
    for (const Program::Instruction &i : program_.once_) execute(i);
    in_block_ = true;
    for (first_ = 0; first_ < stretch_.num_rows; first_ += block_rows_) {
      count_ = std::min(block_rows_, stretch_.num_rows - first_);
      for (const Program::Instruction &i : program_.block_) execute(i);
      if constexpr (std::is_same_v<decltype(store(Operand{}, first_, count_)), bool>) {
        if (!store(operand(program_.result_), first_, count_)) return;
      } else {
        store(operand(program_.result_), first_, count_);
      }
    }
  }

  // What a score graph reads.
  const float *scores = nullptr;
  int64_t row_stride = 0, key_stride = 0;

 private:
  char *data(const Program::Register &r) const;
  Operand operand(const Program::Register &r) const;
  void execute(const Program::Instruction &i);
  void splat(const Program::Instruction &i);
  void load_score(const Program::Instruction &i);
  void load_rows(const Program::Instruction &i);
  void fill(const Program::Instruction &i);
  void load(const Program::Instruction &i);
  template <class Offset>
  void gather(const AuxTensor &tensor, const Offset *offsets, int64_t count, char *to) const;
  void report(const Program::Instruction &i, const AuxTensor &tensor, int32_t dimension);

  const Program &program_;
  const Bindings &bindings_;
  const Stretch stretch_;
  OutOfRange *oor_;
  const VectorKernels &vectors_;
  int32_t block_rows_;
  bool in_block_ = false;
  int32_t first_ = 0, count_ = 1;          // rows of the block
  int64_t elements_[Program::kNumSpaces];  // in one row of a register
  char *base_[Program::kNumSpaces][2];     // of narrow and of wide registers
  int64_t *offsets_;                       // of a load's elements
};

}  // namespace flashspark::graph
