// A graph compiled for the CPU engine: it works on a tile of scores operation by operation, with vectors, and computes
// what depends on rows or keys only once for each of them.
//
// Integer and bool results equal the oracle's (evaluate.hpp) exactly. An f32 operation is correctly rounded for sums,
// products, quotients, square roots, comparisons and conversions, and within 4 ulp (or 2^-126, where that is more) for
// the elementary functions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "graph/bindings.hpp"
#include "graph/graph.hpp"

namespace flashspark::graph {

// Indices outside their tensors that a tile has read.
struct OutOfRange {
  uint8_t *flags = nullptr;  // (num_rows, num_keys) or NULL: becomes 1 where the value came of such an index
  bool found = false;
  // One of them; evaluate() at a flagged place names the one that counts there.
  int32_t tensor = 0, dimension = 0;
  int64_t index = 0, size = 0;
};

// Thread-safe: calls keep their temporaries in thread-local memory.
class Program {
 public:
  // Compiles the graph's first result.
  explicit Program(const Graph &graph);

  Type result_type() const { return result_type_; }

  // scores[r * row_stride + k * key_stride] of row rows[r] and key kv_begin + k becomes the function's result. oor may
  // be NULL.
  void score_tile(const Bindings &bindings, const Row *rows, int32_t num_rows, int32_t kv_begin, int32_t num_keys,
                  float *scores, int64_t row_stride, int64_t key_stride, OutOfRange *oor) const;

  // to[r * num_keys + k] becomes the result, an i32 or i64.
  void index_tile(const Bindings &bindings, const Row *rows, int32_t num_rows, int32_t kv_begin, int32_t num_keys,
                  const float *scores, int64_t row_stride, int64_t key_stride, int64_t *to) const;

  // keep[r * num_keys + k] becomes 1 or 0.
  void mask_tile(const Bindings &bindings, const Row *rows, int32_t num_rows, int32_t kv_begin, int32_t num_keys,
                 uint8_t *keep, OutOfRange *oor) const;

  // Adds to seen[n], of block n of the keys, whether any row keeps any key of the block (kHolds of vector_kernels.hpp),
  // and whether any drops one (kFails); ends once all blocks have both. Blocks of several are multiples of kLanes keys.
  void survey_tile(const Bindings &bindings, const Row *rows, int32_t num_rows, int32_t kv_begin, int32_t num_keys,
                   int32_t block_keys, uint8_t *seen) const;

  // Where a register lives. The first three are computed once a tile, the others for each block of rows.
  enum class Space : uint8_t {
    uniform,  // one value, in all lanes of one vector
    rows,     // a value for each row
    keys,     // a value for each key
    splats,   // a value for each row of the block, in all lanes of one vector
    block,    // a value for each row of the block and each key
  };
  static constexpr int kNumSpaces = 5;

  struct Register {
    Space space;
    bool wide;  // 8 bytes an element, for i64; all others have 4 (bool: 0 or -1)
    int32_t index;
  };

  struct Instruction {
    bool is_splat;  // copies a register of space rows to one of space splats; no node of the graph does
    Node node;
    Type operand_type;  // of the last operand
    Register out;
    Register in[kMaxRank];
  };

 private:
  friend class Compiler;
  friend class Tile;

  std::vector<Instruction> once_;   // for a tile
  std::vector<Instruction> block_;  // for each block
  int32_t num_registers_[kNumSpaces][2] = {};
  Register result_ = {};
  Type result_type_ = Type::f32;
};

}  // namespace flashspark::graph
