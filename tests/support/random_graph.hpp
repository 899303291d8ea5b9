// Random well-typed graphs with everything a call needs, the same for the same seed.
//
// Two engines round differently, and a comparison, a step or an index may turn any difference into a large one. So each
// f32 node is known to be exact (a multiple of a power of two that single precision holds, in any engine) or not, and
// only exact ones decide anything.
#pragma once

#include <bit>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "dtype.hpp"
#include "graph/bindings.hpp"
#include "graph/graph.hpp"

namespace flashspark::test {

struct GraphWish {
  graph::Type result = graph::Type::f32;
  bool all_exact = false;    // no elementary functions; infinities and NaN among the numbers
  bool all_f64 = false;      // floating-point tensors are f64, so that a test can move an element a little
  bool wild_indices = true;  // some loads read outside their tensors
  int max_magnitude = 50;    // f32 nodes stay below 2^max_magnitude
  int depth = 8;
  int max_nodes = 150;
};

class RandomGraph {
 public:
  RandomGraph(uint64_t seed, const GraphWish &wish) : random_(seed), wish_(wish) {
    make_tensors();
    for (int n = 0; n < 3; ++n) scalars_.push_back(quarter());
    const int32_t root = of_type(wish.result, wish.depth);
    graph.results = {root};
    make_rows();
  }
  RandomGraph(const RandomGraph &) = delete;

  graph::Graph graph;
  std::vector<graph::Row> rows;
  int32_t kv_begin = 0, num_keys = 0;

  // Nodes that engines compute with different rounding.
  bool is_inexact(int32_t node) const { return !facts_[node].exact; }
  graph::Bindings bindings() const { return {tensors_, scalars_}; }
  graph::AuxTensor &tensor(int32_t n) { return tensors_[n]; }
  char *data(int32_t n) { return storage_[n].data(); }
  std::mt19937_64 &random() { return random_; }

  // Multiples of 1/4 from -15.75 to 15.75, which all floating-point formats hold.
  float quarter() { return static_cast<float>(between(-63, 63)) / 4; }

  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(random_() % (static_cast<uint64_t>(high - low) + 1));
  }

 private:
  using Op = graph::Op;
  using Type = graph::Type;
  using DataType = graph::DataType;

  struct Facts {
    bool exact = true;
    int magnitude = 0;  // values lie within +-2^magnitude
    int fraction = 0;   // and are multiples of 2^-fraction, if exact
  };

  template <class T>
  const T &pick(std::initializer_list<T> list) {
    return *(list.begin() + between(0, static_cast<int64_t>(list.size()) - 1));
  }
  bool chance(int percent) { return between(1, 100) <= percent; }

  int32_t note(int32_t node, const Facts &facts) {
    if (static_cast<size_t>(node) == facts_.size()) facts_.push_back(facts);
    return node;
  }
  const Facts &facts(int32_t node) const { return facts_[node]; }

  int32_t of_type(Type type, int depth) {
    const bool enough = depth <= 0 || static_cast<int>(graph.nodes.size()) > wish_.max_nodes;
    if (!enough && chance(10)) {
      const int32_t known = existing(type, false);
      if (known >= 0) return known;
    }
    switch (type) {
      case Type::boolean:
        return enough ? boolean_leaf() : boolean(depth - 1);
      case Type::f32:
        return enough ? float_leaf() : wish_.all_exact || chance(30) ? exact_float(depth - 1) : smooth(depth - 1);
      default:
        return enough ? integer_leaf(type) : integer(type, depth - 1);
    }
  }

  int32_t existing(Type type, bool exact) {
    std::vector<int32_t> candidates;
    for (size_t n = 0; n < graph.nodes.size(); ++n) {
      if (graph.nodes[n].type == type && (!exact || facts_[n].exact)) candidates.push_back(static_cast<int32_t>(n));
    }
    return candidates.empty() ? -1 : candidates[between(0, static_cast<int64_t>(candidates.size()) - 1)];
  }

  // An f32 node that may decide something.
  int32_t certain(int depth) {
    const bool enough = depth <= 0 || static_cast<int>(graph.nodes.size()) > wish_.max_nodes;
    return enough ? float_leaf() : exact_float(depth - 1);
  }

  // ---- leaves
  int32_t constant(float value) { return note(graph.add_const(value), {true, 5, 2}); }

  int32_t float_leaf() {
    switch (between(0, 4)) {
      case 0:
        return note(graph.add_scalar(0, Type::f32), {true, 4, 2});
      case 1:
        return wish_.all_exact && chance(20) ? constant(special()) : constant(quarter());
      case 2:
        return load(Type::f32);
      default:
        return wish_.result == Type::f32 ? note(graph.add(Op::Score, {}), {true, 4, 2}) : constant(quarter());
    }
  }

  int32_t integer_leaf(Type type) {
    if (type == Type::i64) {
      if (chance(30)) return note(graph.add_scalar(2, type), {true, 5, 0});
      const int64_t value = chance(70) ? between(-100, 100) : static_cast<int64_t>(random_());
      return note(graph.add_const(type, value), {true, value == static_cast<int8_t>(value) ? 7 : 64, 0});
    }
    if (chance(20)) return note(graph.add_scalar(1, type), {true, 5, 0});
    if (chance(30)) {
      const int32_t value = chance(80) ? static_cast<int32_t>(between(-9, 9)) : static_cast<int32_t>(random_());
      return note(graph.add_const(type, value), {true, value == static_cast<int8_t>(value) ? 7 : 32, 0});
    }
    const Op op = pick(
        {Op::B, Op::H, Op::QIdx, Op::KvIdx, Op::KvIdx, Op::QIdx, Op::SeqlenQ, Op::SeqlenK, Op::OffsetQ, Op::OffsetK});
    return note(graph.add(op, {}), {true, 9, 0});
  }

  int32_t boolean_leaf() {
    if (chance(30)) return note(graph.add_const(Type::boolean, between(0, 1)), {});
    return note(graph.add(pick({Op::Ge, Op::Lt, Op::Ne}), {integer_leaf(Type::i32), integer_leaf(Type::i32)}), {});
  }

  float special() {
    constexpr float kInf = std::numeric_limits<float>::infinity();
    return pick({kInf, -kInf, std::numeric_limits<float>::quiet_NaN(), -0.0f});
  }

  // ---- operations
  int32_t boolean(int depth) {
    switch (between(0, 6)) {
      case 0:
        return note(graph.add(Op::Not, {of_type(Type::boolean, depth)}), {});
      case 1:
        return logic(pick({Op::And, Op::Or, Op::Xor, Op::Eq, Op::Ne}), Type::boolean, depth);
      case 2:
        return logic(pick({Op::Lt, Op::Le, Op::Gt, Op::Ge, Op::Eq, Op::Ne}), pick({Type::i32, Type::i32, Type::i64}),
                     depth);
      case 3: {
        const int32_t a = certain(depth), b = certain(depth);
        return note(graph.add(pick({Op::Lt, Op::Le, Op::Gt, Op::Ge, Op::Eq, Op::Ne}), {a, b}), {});
      }
      case 4:
        return note(graph.add(pick({Op::IsNan, Op::IsInf, Op::ToBool}), {certain(depth)}), {});
      case 5:
        return chance(50) ? load(Type::boolean)
                          : note(graph.add(Op::ToBool, {of_type(pick({Type::i32, Type::i64}), depth)}), {});
      default:
        return select(Type::boolean, depth);
    }
  }

  int32_t logic(Op op, Type type, int depth) {
    const int32_t a = of_type(type, depth), b = of_type(type, depth);
    return note(graph.add(op, {a, b}), {});
  }

  int32_t select(Type type, int depth) {
    const int32_t c = of_type(Type::boolean, depth), a = of_type(type, depth), b = of_type(type, depth);
    Facts f{facts(a).exact && facts(b).exact, std::max(facts(a).magnitude, facts(b).magnitude),
            std::max(facts(a).fraction, facts(b).fraction)};
    if (f.exact && type == Type::f32 && f.magnitude + f.fraction > 22) return float_leaf();
    return note(graph.add(Op::Where, {c, a, b}), f);
  }

  int32_t integer(Type type, int depth) {
    const int width = type == Type::i32 ? 32 : 64;
    switch (between(0, 5)) {
      case 0: {
        const int32_t a = of_type(type, depth);
        return note(graph.add(pick({Op::Neg, Op::Abs, Op::Sign, Op::Not}), {a}),
                    {true, std::min(facts(a).magnitude + 1, width), 0});
      }
      case 1:
        return select(type, depth);
      case 2:
        return load(type);
      case 3: {
        const Type from = pick({Type::boolean, Type::f32, Type::i32, Type::i64});
        const int32_t a = from == Type::f32 ? certain(depth) : of_type(from, depth);
        return note(graph.add(type == Type::i32 ? Op::ToI32 : Op::ToI64, {a}),
                    {true, from == Type::f32 && wish_.all_exact ? width : std::min(facts(a).magnitude + 1, width), 0});
      }
      default: {
        const int32_t a = of_type(type, depth), b = of_type(type, depth);
        const Op op = pick({Op::Add, Op::Sub, Op::Mul, Op::Min, Op::Max, Op::FloorDiv, Op::Mod, Op::And, Op::Or,
                            Op::Xor, Op::Shl, Op::Shr});
        const int bits = op == Op::Shl ? 64 : facts(a).magnitude + facts(b).magnitude + 1;
        return note(graph.add(op, {a, b}), {true, std::min(bits, width), 0});
      }
    }
  }

  int32_t exact_float(int depth) {
    const int32_t a = chance(25) ? number(depth) : certain(depth);
    const Facts fa = facts(a);
    if (chance(30)) {
      const Op op = pick({Op::Neg, Op::Abs, Op::Sign, Op::Floor, Op::Ceil, Op::Round, Op::Trunc, Op::ToF32});
      const bool whole = op == Op::Sign || (op >= Op::Floor && op <= Op::Trunc);
      return note(graph.add(op, {a}), {true, fa.magnitude + 1, whole ? 0 : fa.fraction});
    }
    int32_t b = certain(depth);
    Op op = pick({Op::Add, Op::Sub, Op::Mul, Op::Min, Op::Max, Op::Mod, Op::FloorDiv, Op::Where});
    const Facts fb = facts(b);
    if (op == Op::Where) return exact_select(a, b, depth);
    Facts f{true, std::max(fa.magnitude, fb.magnitude) + 1, std::max(fa.fraction, fb.fraction)};
    if (op == Op::Mul) f = {true, fa.magnitude + fb.magnitude, fa.fraction + fb.fraction};
    if (op == Op::FloorDiv) f = {true, fa.magnitude + fb.fraction + 1, 0};
    if (f.magnitude + f.fraction > 22 || f.magnitude > wish_.max_magnitude) return a;
    // The sign of a zero, which engines may choose in min(-0, 0), must decide nothing.
    if (op == Op::FloorDiv || (op == Op::Mod && !wish_.all_exact)) b = above(b, 0.5f);
    return note(graph.add(op, {a, b}), f);
  }

  int32_t exact_select(int32_t a, int32_t b, int depth) {
    const Facts f{true, std::max(facts(a).magnitude, facts(b).magnitude),
                  std::max(facts(a).fraction, facts(b).fraction)};
    if (f.magnitude + f.fraction > 22) return a;
    return note(graph.add(Op::Where, {of_type(Type::boolean, depth), a, b}), f);
  }

  // A whole number of few bits, as f32.
  int32_t number(int depth) {
    const int32_t a = of_type(pick({Type::boolean, Type::i32, Type::i64}), depth);
    if (facts(a).magnitude > std::min(20, wish_.max_magnitude)) return float_leaf();
    return note(graph.add(Op::ToF32, {a}), {true, std::max(facts(a).magnitude, 1), 0});
  }

  // |x| + least.
  int32_t above(int32_t x, float least) {
    const Facts f{facts(x).exact, facts(x).magnitude + 1, std::max(facts(x).fraction, 2)};
    const int32_t size = note(graph.add(Op::Abs, {x}), f);
    return note(graph.add(Op::Add, {size, constant(least)}), f);
  }

  // largest * tanh(x).
  int32_t bounded(int32_t x, float largest) {
    const int32_t y = note(graph.add(Op::Tanh, {x}), {false, 1, 0});
    return note(graph.add(Op::Mul, {y, constant(largest)}), {false, 3, 0});
  }

  // Functions without steps, where they are steady.
  int32_t smooth(int depth) {
    const int32_t a = of_type(Type::f32, depth);
    const Facts fa = facts(a);
    switch (between(0, 7)) {
      case 0:
        return note(graph.add(pick({Op::Sin, Op::Cos, Op::Atan, Op::Tanh, Op::Sigmoid, Op::Erf}), {a}), {false, 1, 0});
      case 1:
        return note(graph.add(pick({Op::Exp, Op::Exp2, Op::Expm1, Op::Sinh, Op::Cosh}), {bounded(a, 3.75f)}),
                    {false, 6, 0});
      case 2:
        return note(graph.add(pick({Op::Log, Op::Log2, Op::Log1p, Op::Rsqrt}), {above(a, 0.5f)}), {false, 7, 0});
      case 3:
        return note(graph.add(pick({Op::Asin, Op::Acos, Op::Tan}), {bounded(a, 0.75f)}), {false, 2, 0});
      case 4:
        return note(graph.add(Op::Sqrt, {above(a, 0.25f)}), {false, fa.magnitude / 2 + 2, 0});
      case 5: {
        const int32_t b = above(of_type(Type::f32, depth), 0.5f);
        const Op op = pick({Op::Div, Op::Atan2});
        return note(graph.add(op, {a, b}), {false, fa.magnitude + 1, 0});
      }
      case 6:
        return note(graph.add(Op::Pow, {above(bounded(a, 2), 0.5f), bounded(of_type(Type::f32, depth), 3)}),
                    {false, 5, 0});
      default: {
        const int32_t b = of_type(Type::f32, depth);
        const Op op = pick({Op::Add, Op::Sub, Op::Mul, Op::Min, Op::Max, Op::Where});
        if (op == Op::Where) return select(Type::f32, depth);
        const int sum = fa.magnitude + facts(b).magnitude, magnitude = op == Op::Mul ? sum : sum + 1;
        if (magnitude > wish_.max_magnitude) return a;
        return note(graph.add(op, {a, b}), {false, magnitude, 0});
      }
    }
  }

  // ---- captured tensors
  int32_t load(Type type) {
    std::vector<int32_t> fitting;
    for (size_t n = 0; n < tensors_.size(); ++n) {
      if (graph::type_of(static_cast<DataType>(tensors_[n].dtype)) == type) fitting.push_back(static_cast<int32_t>(n));
    }
    const int32_t number = fitting[between(0, static_cast<int64_t>(fitting.size()) - 1)];
    const graph::AuxTensor &t = tensors_[number];
    const DataType dtype = static_cast<DataType>(t.dtype);
    int32_t indices[graph::kMaxRank];
    for (int32_t n = 0; n < t.rank; ++n) {
      const Type of = chance(25) ? Type::i64 : Type::i32;
      int32_t index = of_type(of, 1);
      if (!wish_.wild_indices || chance(80)) {
        const int32_t size = note(graph.add_const(of, t.shape[n]), {true, 4, 0});
        index = note(graph.add(Op::Mod, {index, size}), {true, 4, 0});
      }
      indices[n] = index;
    }
    const bool floating = graph::is_floating(dtype);
    const Facts f{true, floating ? 4 : 8 * graph::size_of(dtype), floating ? 2 : 0};
    return note(graph.add_load(number, dtype, std::span(indices, static_cast<size_t>(t.rank))), f);
  }

  // One tensor of each data type and one or two of f32, of ranks 0 to 3 and any order of dimensions.
  void make_tensors() {
    for (int n = 0; n < graph::kNumDataTypes + 2; ++n) {
      DataType dtype = static_cast<DataType>(std::min(n, graph::kNumDataTypes - 1));
      if (n >= graph::kNumDataTypes) dtype = DataType::f32;
      if (wish_.all_f64 && graph::is_floating(dtype)) dtype = DataType::f64;
      graph::AuxTensor t{.data = nullptr, .dtype = static_cast<int32_t>(dtype), .rank = 0, .shape = {}, .strides = {}};
      t.rank = static_cast<int32_t>(between(n % 2, 3));
      int64_t count = 1;
      const bool first_is_inner = chance(50);
      for (int32_t k = 0; k < t.rank; ++k) t.shape[k] = between(1, 7);
      for (int32_t k = 0; k < t.rank; ++k) {
        const int32_t which = first_is_inner ? k : t.rank - 1 - k;
        t.strides[which] = count;
        count *= t.shape[which];
      }
      storage_.emplace_back(count * graph::size_of(dtype));
      for (int64_t k = 0; k < count; ++k) set_random(dtype, storage_.back().data() + k * graph::size_of(dtype));
      tensors_.push_back(t);
    }
    for (size_t n = 0; n < tensors_.size(); ++n) tensors_[n].data = storage_[n].data();
  }

  void set_random(DataType dtype, char *to) {
    const float real = wish_.all_exact && chance(10) ? special() : quarter();
    const int64_t whole = chance(70) ? between(-9, 9) : static_cast<int64_t>(random_());
    const auto put = [&](auto value) { std::memcpy(to, &value, sizeof value); };
    switch (dtype) {
      case DataType::f16:
        return put(float_to_f16(real));
      case DataType::bf16:
        return put(float_to_bf16(real));
      case DataType::f32:
        return put(real);
      case DataType::f64:
        return put(double{real});
      case DataType::boolean:
        return put(static_cast<uint8_t>(whole & 1));
      default:
        std::memcpy(to, &whole, static_cast<size_t>(graph::size_of(dtype)));
    }
  }

  void make_rows() {
    const int64_t count = between(1, 40), group = between(1, 4), first = between(0, 200);
    for (int64_t r = 0; r < count; ++r) {
      rows.push_back({.b = 3,
                      .h = static_cast<int32_t>(4 + r % group),
                      .q_idx = static_cast<int32_t>(first + r / group),
                      .seqlen_q = 250,
                      .seqlen_k = 300,
                      .offset_q = 17,
                      .offset_k = 0});
    }
    kv_begin = static_cast<int32_t>(between(0, 200));
    num_keys = static_cast<int32_t>(between(1, 70));
  }

  std::mt19937_64 random_;
  GraphWish wish_;
  std::vector<Facts> facts_;
  std::vector<std::vector<char>> storage_;
  std::vector<graph::AuxTensor> tensors_;
  std::vector<double> scalars_;
};

}  // namespace flashspark::test
