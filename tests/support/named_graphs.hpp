// Functions as users write them, for the tests that compile functions: every kind of capture, input and operation.
#pragma once

#include <functional>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "graph/graph.hpp"

namespace flashspark::test {

using graph::DataType;
using graph::Graph;
using graph::Op;
using graph::Type;

// A node of a graph that is being written. Numbers take the type of the other operand.
struct Expr {
  Graph *graph;
  int32_t node;

  Type type() const { return graph->nodes[static_cast<size_t>(node)].type; }
  Expr of(Op op) const { return {graph, graph->add(op, {node})}; }
  Expr of(Op op, Expr other) const { return {graph, graph->add(op, {node, other.node})}; }
  Expr number(double value) const {
    if (type() == Type::f32) return {graph, graph->add_const(static_cast<float>(value))};
    return {graph, graph->add_const(type(), static_cast<int64_t>(value))};
  }
  Expr of(Op op, double value) const { return of(op, number(value)); }
};

#define FLASHSPARK_TEST_OPERATOR(sign, op)      \
  inline Expr operator sign(Expr a, Expr b) {   \
    return a.of(op, b);                         \
  }                                             \
  inline Expr operator sign(Expr a, double b) { \
    return a.of(op, b);                         \
  }                                             \
  inline Expr operator sign(double a, Expr b) { \
    return b.number(a).of(op, b);               \
  }
FLASHSPARK_TEST_OPERATOR(+, Op::Add)
FLASHSPARK_TEST_OPERATOR(-, Op::Sub)
FLASHSPARK_TEST_OPERATOR(*, Op::Mul)
FLASHSPARK_TEST_OPERATOR(/, Op::Div)
FLASHSPARK_TEST_OPERATOR(%, Op::Mod)
FLASHSPARK_TEST_OPERATOR(&, Op::And)
FLASHSPARK_TEST_OPERATOR(|, Op::Or)
FLASHSPARK_TEST_OPERATOR(^, Op::Xor)
FLASHSPARK_TEST_OPERATOR(>>, Op::Shr)
FLASHSPARK_TEST_OPERATOR(<, Op::Lt)
FLASHSPARK_TEST_OPERATOR(<=, Op::Le)
FLASHSPARK_TEST_OPERATOR(>, Op::Gt)
FLASHSPARK_TEST_OPERATOR(>=, Op::Ge)
FLASHSPARK_TEST_OPERATOR(==, Op::Eq)
FLASHSPARK_TEST_OPERATOR(!=, Op::Ne)
#undef FLASHSPARK_TEST_OPERATOR

inline Expr where(Expr c, Expr a, Expr b) {
  return {c.graph, c.graph->add(Op::Where, {c.node, a.node, b.node})};
}
inline Expr where(Expr c, double a, Expr b) {
  return where(c, b.number(a), b);
}
inline Expr where(Expr c, Expr a, double b) {
  return where(c, a, a.number(b));
}
inline Expr real(Expr x) {
  return x.of(Op::ToF32);
}
inline Expr least(Expr a, double b) {
  return a.of(Op::Min, b);
}
inline Expr most(Expr a, double b) {
  return a.of(Op::Max, b);
}

// The inputs of a function, and the tensors and scalars that it captures.
struct Inputs {
  Graph *graph;

  Expr input(Op op) const { return {graph, graph->add(op, {})}; }
  Expr score() const { return input(Op::Score); }
  Expr b() const { return input(Op::B); }
  Expr h() const { return input(Op::H); }
  Expr q() const { return input(Op::QIdx); }
  Expr kv() const { return input(Op::KvIdx); }
  // The query's position on the key axis.
  Expr pos() const { return q() + input(Op::SeqlenK) - input(Op::SeqlenQ); }
  Expr scalar(int32_t number, Type type) const { return {graph, graph->add_scalar(number, type)}; }
  Expr load(int32_t tensor, DataType dtype, std::initializer_list<Expr> at) const {
    std::vector<int32_t> indices;
    for (const Expr &index : at) indices.push_back(index.node);
    return {graph, graph->add_load(tensor, dtype, indices)};
  }
};

struct NamedFunctions {
  using Body = std::function<Expr(const Inputs &)>;

  const char *name;
  Body score_body, mask_body;  // empty: there is none

  static std::optional<Graph> graph_of(const Body &body) {
    if (!body) return std::nullopt;
    Graph graph;
    graph.results = {body({&graph}).node};
    return graph;
  }
  std::optional<Graph> score() const { return graph_of(score_body); }
  std::optional<Graph> mask() const { return graph_of(mask_body); }
};

inline std::vector<NamedFunctions> score_functions() {
  using In = const Inputs &;
  return {
      {"alibi", [](In f) { return f.score() + f.load(0, DataType::f32, {f.h()}) * real(f.kv() - f.pos()); }, {}},
      {"relative_position",
       [](In f) {
         const Expr bucket = least(most(f.q() - f.kv() + 32, 0), 63);
         return f.score() + f.load(0, DataType::bf16, {f.h(), bucket});
       },
       {}},
      {"buckets",  // T5
       [](In f) {
         const Expr d = (f.q() - f.kv()).of(Op::Abs);
         const Expr far = where(d < 16, 8, where(d < 32, 9, where(d < 64, 10, d.number(11))));
         return f.score() + f.load(0, DataType::f32, {where(d < 8, d, far), f.h()});
       },
       {}},
      {"softcap", [](In f) { return (f.score() / 20).of(Op::Tanh) * 20; }, {}},
      {"clip",
       [](In f) {
         const Expr top = f.load(0, DataType::f32, {f.b()}).of(Op::Abs) + 0.5;
         return most(f.score(), -1.5).of(Op::Min, top);
       },
       {}},
      {"bias_2d", [](In f) { return f.score() + f.load(0, DataType::f16, {f.q(), f.kv()}); }, {}},
      {"bias_3d", [](In f) { return f.score() + f.load(0, DataType::bf16, {f.h(), f.q(), f.kv()}); }, {}},
      {"decay",
       [](In f) { return f.score() - real((f.q() - f.kv()).of(Op::Abs)).of(Op::Log1p) * f.scalar(0, Type::f32); },
       {}},
      {"waves",
       [](In f) {
         return f.score() + (real(f.kv()) * 0.125).of(Op::Sin) * (real(f.q()) * f.scalar(0, Type::f32)).of(Op::Cos);
       },
       {}},
      {"parity", [](In f) { return where((f.q() - f.kv()) % 2 == 0, f.score() * 0.5, f.score()); }, {}},
      {"temperature",
       [](In f) {
         return f.score() * f.load(0, DataType::f64, {f.b(), f.h()}).of(Op::Sigmoid) +
                f.load(1, DataType::f16, {f.kv()});
       },
       {}},
      {"positions",  // of tokens, as captured numbers
       [](In f) {
         const Expr at = f.load(0, DataType::i64, {f.b(), f.q()}) - f.load(0, DataType::i64, {f.b(), f.kv()});
         return f.score() + f.load(1, DataType::f32, {f.h(), at.of(Op::Abs)});
       },
       {}},
      {"elementary",
       [](In f) {
         const Expr d = real(f.q() - f.kv()) / 16, s = f.score();
         const Expr bell = (d * d * -0.5).of(Op::Exp) + d.of(Op::Atan) + (d.of(Op::Abs) + 1).of(Op::Pow, 0.75);
         return s + bell - (s * 0.25).of(Op::Erf) + (d * d + 1).of(Op::Rsqrt) - (d * d + 1).of(Op::Log2).of(Op::Sqrt);
       },
       {}},
  };
}

inline std::vector<NamedFunctions> mask_functions() {
  using In = const Inputs &;
  const auto document = [](In f) {
    const Expr q = f.load(0, DataType::i32, {f.q() + f.input(Op::OffsetQ)});
    return q == f.load(0, DataType::i32, {f.kv() + f.input(Op::OffsetK)});
  };
  return {
      {"causal", {}, [](In f) { return f.kv() <= f.pos(); }},
      {"documents", {}, document},
      {"window",  // and a prefix that all see
       {},
       [](In f) {
         const Expr back = f.pos() - f.kv();
         return ((back >= 0) & (back < f.scalar(0, Type::i32))) | (f.kv() < f.load(0, DataType::u8, {f.b()}));
       }},
      {"neighbours",  // of a picture of 16 columns
       {},
       [](In f) {
         const Expr rows = f.q().of(Op::FloorDiv, 16) - f.kv().of(Op::FloorDiv, 16), columns = f.q() % 16 - f.kv() % 16;
         return (rows.of(Op::Abs) <= 2) & (columns.of(Op::Abs) <= 3);
       }},
      {"flags",
       {},
       [](In f) {
         const Expr pattern = ((f.kv() >> 2) ^ (f.q() & 3)) + f.load(1, DataType::i8, {f.h()});
         return f.load(0, DataType::boolean, {f.q(), f.kv()}) | (pattern % 3 != 0);
       }},
      {"alibi_documents", [](In f) { return f.score() + f.load(0, DataType::f32, {f.h()}) * real(f.kv() - f.q()); },
       document},
      {"capped_window",
       [](In f) {
         return (f.score() * 0.1).of(Op::Tanh) * f.scalar(0, Type::f32) +
                f.load(0, DataType::i16, {f.kv()}).of(Op::ToF32);
       },
       [](In f) {
         const Expr back = f.pos() - f.kv();
         return (back >= 0) & (back < f.scalar(0, Type::i64).of(Op::ToI32));
       }},
  };
}

inline std::vector<NamedFunctions> named_functions() {
  std::vector<NamedFunctions> all = score_functions();
  for (NamedFunctions &each : mask_functions()) all.push_back(std::move(each));
  return all;
}

// Of backward kernels alone: gradients of captured tensors that belong to a row, a key, and a number of the score.
inline std::vector<NamedFunctions> gradient_functions() {
  using In = const Inputs &;
  return {
      {"outer",
       [](In f) {
         return f.score() * f.load(0, DataType::f32, {f.h(), f.q()}).of(Op::Sigmoid) +
                f.load(1, DataType::f16, {f.q()}) * f.load(2, DataType::f32, {f.kv(), f.h()});
       },
       {}},
      {"by_score",
       [](In f) {
         return f.score() + f.load(0, DataType::f32, {(f.score() * 4).of(Op::Floor).of(Op::ToI32)}) *
                                f.load(0, DataType::f32, {f.kv().of(Op::Neg)});
       },
       [](In f) { return (f.q() + f.kv()) % 3 != 0; }},
  };
}

inline NamedFunctions named(std::string_view name) {
  for (const auto &functions : {named_functions(), gradient_functions()}) {
    for (const NamedFunctions &each : functions) {
      if (name == each.name) return each;
    }
  }
  if (name == "none") return {"none", {}, {}};  // of kernels for block lists or dropout alone
  return {nullptr, {}, {}};
}

}  // namespace flashspark::test
