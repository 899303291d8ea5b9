#include "graph/vector.hpp"

#include <algorithm>

#include "error.hpp"
#include "graph/vector_tile.hpp"

namespace flashspark::graph {

using Space = Program::Space;
using Register = Program::Register;

// Turns nodes into instructions and gives each a register, which is used again once its last reader has run.
class Compiler {
 public:
  Compiler(const Graph &graph, Program &program)
      : graph_(graph), program_(program), registers_(graph.nodes.size()), splats_(graph.nodes.size()) {}

  void run() {
    const int32_t result = graph_.results.at(0);
    const std::vector<bool> is_needed = needed(graph_, std::span(&result, 1));
    count_uses(is_needed, result);
    for (const bool in_block : {false, true}) {
      for (int32_t n = 0; n <= result; ++n) {
        if (is_needed[n] && (space(n) == Space::block) == in_block) compile(n);
      }
    }
    program_.result_ = operand(result, true);
    program_.result_type_ = graph_.nodes[result].type;
  }

 private:
  Space space(int32_t n) const {
    const uint8_t depends = graph_.nodes[n].depends;
    if (depends == 0) return Space::uniform;
    if (depends == kDependsKv) return Space::keys;
    return (depends & (kDependsKv | kDependsScore)) == 0 ? Space::rows : Space::block;
  }

  // A value that the block's instructions read stays until the tile is done, as if it had one more reader.
  void count_uses(const std::vector<bool> &is_needed, int32_t result) {
    uses_.assign(graph_.nodes.size(), 0);
    ++uses_[result];
    for (size_t n = 0; n < graph_.nodes.size(); ++n) {
      if (!is_needed[n]) continue;
      const bool in_block = space(static_cast<int32_t>(n)) == Space::block;
      for (const int32_t from : graph_.nodes[n].inputs())
        uses_[from] += in_block && space(from) != Space::block ? 2 : 1;
    }
  }

  Register allocate(Space where, Type type) {
    const bool wide = type == Type::i64;
    std::vector<int32_t> &free = free_[static_cast<int>(where)][wide];
    if (free.empty()) return {where, wide, program_.num_registers_[static_cast<int>(where)][wide]++};
    const int32_t index = free.back();
    free.pop_back();
    return {where, wide, index};
  }

  // The register to read node n from; rows are read from a copy in splats by the block's instructions.
  Register operand(int32_t n, bool in_block) {
    if (!in_block || space(n) != Space::rows) return registers_[n];
    if (!has_splat_[n]) {
      Program::Instruction copy{.is_splat = true, .node = graph_.nodes[n], .operand_type = {}, .out = {}, .in = {}};
      copy.in[0] = registers_[n];
      copy.out = splats_[n] = allocate(Space::splats, graph_.nodes[n].type);
      has_splat_[n] = true;
      program_.block_.push_back(copy);
    }
    return splats_[n];
  }

  void compile(int32_t n) {
    const Node &node = graph_.nodes[n];
    const bool in_block = space(n) == Space::block;
    Program::Instruction i{.is_splat = false, .node = node, .operand_type = {}, .out = {}, .in = {}};
    for (int32_t k = 0; k < node.num_operands; ++k) {
      i.in[k] = operand(node.operands[k], in_block);
      i.operand_type = graph_.nodes[node.operands[k]].type;
    }
    for (const int32_t from : node.inputs()) {
      if (--uses_[from] == 0)
        free_[static_cast<int>(registers_[from].space)][registers_[from].wide].push_back(registers_[from].index);
    }
    i.out = registers_[n] = allocate(space(n), node.type);
    (in_block ? program_.block_ : program_.once_).push_back(i);
  }

  const Graph &graph_;
  Program &program_;
  std::vector<Register> registers_, splats_;
  std::vector<bool> has_splat_ = std::vector<bool>(graph_.nodes.size());
  std::vector<int32_t> uses_;
  std::vector<int32_t> free_[Program::kNumSpaces][2];
};

Program::Program(const Graph &graph) {
  Compiler(graph, *this).run();
}

void Program::score_tile(const Bindings &bindings, const Row *rows, int32_t num_rows, int32_t kv_begin,
                         int32_t num_keys, float *scores, int64_t row_stride, int64_t key_stride,
                         OutOfRange *oor) const {
  if (result_type_ != Type::f32)
    throw Error(FLASHSPARK_INVALID_ARGUMENT, std::string("a score function returns f32, not ") + name(result_type_));
  if (num_rows <= 0 || num_keys <= 0) return;
  Tile tile(*this, bindings, {rows, num_rows, kv_begin, num_keys}, oor);
  tile.scores = scores;
  tile.row_stride = row_stride;
  tile.key_stride = key_stride;
  tile.run([&](const Operand &result, int32_t first, int32_t count) {
    for (int64_t r = 0; r < count; ++r) {
      const float *from = result.row<float>(r);
      float *to = scores + (first + r) * row_stride;
      if (key_stride == 1 && result.mask != 0) {
        std::copy_n(from, num_keys, to);
      } else {
        for (int64_t k = 0; k < num_keys; ++k) to[k * key_stride] = from[k & result.mask];
      }
    }
  });
}

void Program::index_tile(const Bindings &bindings, const Row *rows, int32_t num_rows, int32_t kv_begin,
                         int32_t num_keys, const float *scores, int64_t row_stride, int64_t key_stride,
                         int64_t *to) const {
  if (num_rows <= 0 || num_keys <= 0) return;
  Tile tile(*this, bindings, {rows, num_rows, kv_begin, num_keys}, nullptr);
  tile.scores = scores;
  tile.row_stride = row_stride;
  tile.key_stride = key_stride;
  tile.run([&](const Operand &result, int32_t first, int32_t count) {
    const auto copy = [&]<class T>(T) {
      for (int64_t r = 0; r < count; ++r) {
        const T *from = result.row<T>(r);
        for (int64_t k = 0; k < num_keys; ++k) to[(first + r) * num_keys + k] = from[k & result.mask];
      }
    };
    if (result_type_ == Type::i64) return copy(int64_t{});
    copy(int32_t{});
  });
}

void Program::mask_tile(const Bindings &bindings, const Row *rows, int32_t num_rows, int32_t kv_begin, int32_t num_keys,
                        uint8_t *keep, OutOfRange *oor) const {
  if (result_type_ != Type::boolean)
    throw Error(FLASHSPARK_INVALID_ARGUMENT, std::string("a mask function returns bool, not ") + name(result_type_));
  if (num_rows <= 0 || num_keys <= 0) return;
  const VectorKernels &vectors = vector_kernels();
  Tile tile(*this, bindings, {rows, num_rows, kv_begin, num_keys}, oor);
  tile.run([&](const Operand &result, int32_t first, int32_t count) {
    for (int64_t r = 0; r < count; ++r) {
      const int32_t *from = result.row<int32_t>(r);
      uint8_t *to = keep + (first + r) * num_keys;
      if (result.mask != 0) {
        vectors.store_bools(from, num_keys, to);
      } else {
        std::fill_n(to, num_keys, static_cast<uint8_t>(from[0] & 1));
      }
    }
  });
}

void Program::survey_tile(const Bindings &bindings, const Row *rows, int32_t num_rows, int32_t kv_begin,
                          int32_t num_keys, int32_t block_keys, uint8_t *seen) const {
  if (result_type_ != Type::boolean)
    throw Error(FLASHSPARK_INVALID_ARGUMENT, std::string("a mask function returns bool, not ") + name(result_type_));
  if (num_rows <= 0 || num_keys <= 0) return;
  const VectorKernels &vectors = vector_kernels();
  Tile tile(*this, bindings, {rows, num_rows, kv_begin, num_keys}, nullptr);
  tile.run([&](const Operand &result, int32_t, int32_t count) {
    uint8_t common = kHolds | kFails;
    for (int32_t key = 0, n = 0; key < num_keys; key += block_keys, ++n) {
      // Elements behind the last key repeat it, so that the last block may take whole vectors, too.
      const int64_t keys = (std::min(block_keys, num_keys - key) + kLanes - 1) / kLanes * kLanes;
      for (int64_t r = 0; r < count && seen[n] != (kHolds | kFails); ++r)
        seen[n] |= vectors.survey_bools(result.row<int32_t>(r) + (key & result.mask), result.mask != 0 ? keys : kLanes);
      common &= seen[n];
    }
    return common != (kHolds | kFails);
  });
}

}  // namespace flashspark::graph
