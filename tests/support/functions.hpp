// The user's functions and block lists as a call takes them, with the memory that they point to.
#pragma once

#include <algorithm>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cases/random.hpp"
#include "dtype.hpp"
#include "flashspark/flashspark.h"
#include "graph/bindings.hpp"
#include "graph/graph.hpp"

namespace flashspark::test {

inline int32_t captured_dtype(int32_t dtype) {
  constexpr int32_t kTypes[] = {FLASHSPARK_BOOL,    FLASHSPARK_UINT8,  FLASHSPARK_INT8,    FLASHSPARK_INT16,
                                FLASHSPARK_INT32,   FLASHSPARK_INT64,  FLASHSPARK_FLOAT16, FLASHSPARK_BFLOAT16,
                                FLASHSPARK_FLOAT32, FLASHSPARK_FLOAT64};
  return kTypes[dtype];
}

inline flashspark_mod *make_mod(const graph::Graph &graph, bool is_score) {
  flashspark_mod *mod = nullptr;
  const std::string text = to_text(graph);
  const auto status = (is_score ? flashspark_score_mod_create : flashspark_mask_mod_create)(text.c_str(), &mod);
  if (status != FLASHSPARK_OK) throw std::runtime_error(std::string(flashspark_last_error()) + "\n" + text);
  return mod;
}

// score + 4 tanh(g), so that any g leaves sane scores. Where scores are not exact, g does not see them.
inline graph::Graph tamed(const graph::Graph &g, bool exact_scores) {
  using graph::Op;
  graph::Graph to;
  for (const graph::Node &node : g.nodes) {
    if (node.op == Op::Score && !exact_scores) {
      to.add_const(1.25f);
    } else {
      to.add_copy(node);
    }
  }
  const int32_t bounded = to.add(Op::Tanh, {g.results[0]});
  const int32_t term = to.add(Op::Mul, {bounded, to.add_const(4.0f)});
  to.results = {to.add(Op::Add, {to.add(Op::Score, {}), term})};
  return to;
}

// A function, with the tensors and scalars of `bindings`, whose data it does not own.
class Function {
 public:
  Function(const graph::Graph &graph, bool is_score, const graph::Bindings &bindings)
      : mod_(make_mod(graph, is_score)),
        is_score_(is_score),
        scalars_(bindings.scalars.begin(), bindings.scalars.end()) {
    for (const graph::AuxTensor &from : bindings.tensors) {
      flashspark_captured_tensor to{};
      to.data = from.data, to.dtype = captured_dtype(from.dtype), to.rank = from.rank;
      std::copy_n(from.shape, from.rank, to.shape);
      std::copy_n(from.strides, from.rank, to.strides);
      tensors_.push_back(to);
    }
  }
  ~Function() { flashspark_mod_release(mod_); }
  Function(const Function &) = delete;
  Function &operator=(const Function &) = delete;

  flashspark_function get() const {
    return {mod_, tensors_.data(), scalars_.data(), static_cast<int32_t>(tensors_.size()),
            static_cast<int32_t>(scalars_.size())};
  }
  void give(flashspark_attention_params &p) const { (is_score_ ? p.score_mod : p.mask_mod) = get(); }

 private:
  flashspark_mod *mod_;
  bool is_score_;
  std::vector<flashspark_captured_tensor> tensors_;
  std::vector<double> scalars_;
};

// Tensors and scalars for all that a graph captures. Every dimension has kSize elements, which overlap: no index of a
// test is outside. Floats are about 1, integers 0 to 5.
class Captures {
 public:
  static constexpr int64_t kSize = 4096;

  Captures(const graph::Graph &graph, uint64_t seed) : random_(seed) {
    for (int32_t n = 0; n < graph.num_tensors; ++n) add(graph.captures[static_cast<size_t>(n)]);
    scalars_.resize(static_cast<size_t>(graph.num_scalars));
    for (const graph::Node &node : graph.nodes) {
      if (node.op != graph::Op::Scalar) continue;
      scalars_[static_cast<size_t>(node.number)] =
          node.type == graph::Type::f32 ? 0.25 : static_cast<double>(10 + random_.below(60));
    }
  }
  Captures(const Captures &) = delete;

  graph::Bindings get() const { return {tensors_, scalars_}; }

 private:
  void add(const graph::Capture &capture) {
    graph::AuxTensor t{nullptr, static_cast<int32_t>(capture.dtype), std::max(capture.rank, 0), {}, {}};
    int64_t last = 0;
    for (int32_t n = 0; n < t.rank; ++n) {
      t.shape[n] = kSize;
      t.strides[n] = 1 + random_.below(9);
      last += (kSize - 1) * t.strides[n];
    }
    const int64_t bytes = graph::size_of(capture.dtype);
    storage_.emplace_back(static_cast<size_t>((last + 1) * bytes));
    for (int64_t n = 0; n <= last; ++n) set(capture.dtype, storage_.back().data() + n * bytes);
    t.data = storage_.back().data();
    tensors_.push_back(t);
  }

  void set(graph::DataType dtype, char *to) {
    const auto real = static_cast<float>(random_.normal());
    const int64_t whole = random_.below(6);
    const auto put = [to](auto value) { std::memcpy(to, &value, sizeof value); };
    if (dtype == graph::DataType::f16) return put(float_to_f16(real));
    if (dtype == graph::DataType::bf16) return put(float_to_bf16(real));
    if (dtype == graph::DataType::f32) return put(real);
    if (dtype == graph::DataType::f64) return put(double{real});
    if (dtype == graph::DataType::boolean) return put(static_cast<uint8_t>(whole % 2));
    std::memcpy(to, &whole, static_cast<size_t>(graph::size_of(dtype)));
  }

  cases::Random random_;
  std::vector<std::vector<char>> storage_;
  std::vector<graph::AuxTensor> tensors_;
  std::vector<double> scalars_;
};

struct BlockListWish {
  int64_t size_q = 64, size_k = 64;  // of a block
  bool per_batch = true, per_head = true;
  bool masked = true, full = true;  // which lists there are
  int none = 4, some = 3, all = 3;  // of ten blocks: unlisted, masked, full
};

// Random lists, in any order, with gaps between rows and garbage behind their ends.
class BlockLists {
 public:
  enum Status : uint8_t { kNone, kMasked, kFull };

  BlockLists(const flashspark_attention_params &p, const BlockListWish &wish, uint64_t seed)
      : wish_(wish),
        batch_(wish.per_batch ? p.num_seqs : 1),
        heads_(wish.per_head ? p.num_heads_q : 1),
        blocks_q_((p.max_seqlen_q + wish.size_q - 1) / wish.size_q + static_cast<int64_t>(seed % 2)),
        blocks_k_((p.max_seqlen_k + wish.size_k - 1) / wish.size_k) {
    cases::Random random(seed, 'l');
    const int64_t rows = batch_ * heads_ * blocks_q_;
    statuses_.resize(static_cast<size_t>(rows * blocks_k_));
    for (Status &status : statuses_) {
      const int64_t n = random.below(wish.none + wish.some + wish.all);
      status = n < wish.none ? kNone : n < wish.none + wish.some ? kMasked : kFull;
      if (status == kMasked && !wish.masked) status = kFull;
      if (status == kFull && !wish.full) status = kMasked;
    }
    if (wish.masked) masked_ = make(kMasked, random);
    if (wish.full) full_ = make(kFull, random);
  }

  void give(flashspark_attention_params &p) const {
    p.block_size_q = wish_.size_q, p.block_size_k = wish_.size_k;
    p.num_blocks_q = blocks_q_;
    p.block_batch = batch_, p.block_heads = heads_;
    if (wish_.masked) p.masked_blocks = list(masked_);
    if (wish_.full) p.full_blocks = list(full_);
  }
  // One byte for each (batch, head, query block, key block), contiguous.
  const std::vector<Status> &statuses() const { return statuses_; }
  int64_t batch() const { return batch_; }
  int64_t heads() const { return heads_; }
  int64_t blocks_q() const { return blocks_q_; }
  int64_t blocks_k() const { return blocks_k_; }

 private:
  static constexpr int32_t kGarbage = -1234567;
  struct List {
    std::vector<int32_t> counts, indices;
    int64_t width;
  };

  List make(Status wanted, cases::Random &random) const {
    List list{{}, {}, blocks_k_ + 2};
    const int64_t rows = batch_ * heads_ * blocks_q_;
    list.counts.assign(static_cast<size_t>(2 * rows), kGarbage);
    list.indices.assign(static_cast<size_t>(rows * (list.width + 1)), kGarbage);
    for (int64_t row = 0; row < rows; ++row) {
      std::vector<int32_t> blocks;
      for (int64_t k = 0; k < blocks_k_; ++k) {
        if (statuses_[static_cast<size_t>(row * blocks_k_ + k)] == wanted) blocks.push_back(static_cast<int32_t>(k));
      }
      if (random.below(2) == 0) random.shuffle(blocks);
      list.counts[static_cast<size_t>(2 * row)] = static_cast<int32_t>(blocks.size());
      std::copy(blocks.begin(), blocks.end(), list.indices.begin() + row * (list.width + 1));
    }
    return list;
  }

  flashspark_block_list list(const List &from) const {
    const int64_t row = from.width + 1;
    // The strides of a dimension of one element are never used.
    const int64_t unused = 1 << 20;
    const bool batches = batch_ > 1, heads = heads_ > 1;
    return {from.counts.data(),
            from.indices.data(),
            batches ? heads_ * blocks_q_ * 2 : unused,
            heads ? blocks_q_ * 2 : unused,
            2,
            batches ? heads_ * blocks_q_ * row : unused,
            heads ? blocks_q_ * row : unused,
            row,
            from.width};
  }

  BlockListWish wish_;
  int64_t batch_, heads_, blocks_q_, blocks_k_;
  std::vector<Status> statuses_;
  List masked_{{}, {}, 0}, full_{{}, {}, 0};
};

}  // namespace flashspark::test
