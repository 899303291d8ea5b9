#include "graph/derivative.hpp"

#include <cmath>
#include <numbers>

#include "error.hpp"

namespace flashspark::graph {
namespace {

// Reverse mode: from the result back to the inputs, each node hands the result's derivative by itself, times its own
// derivative by each operand, to these operands. The new graph starts with the function's nodes, under their numbers.
class Reverse {
 public:
  explicit Reverse(const Graph &function) : function_(function), gradients_(function.nodes.size(), kNone) {
    for (const Node &node : function.nodes) to_.add_copy(node);
    find_active();
  }

  Derivative run() {
    const int32_t result = function_.results.at(0);
    if (function_.nodes[result].type != Type::f32) {
      throw Error(FLASHSPARK_INVALID_ARGUMENT,
                  std::string("only an f32 result has a derivative, not ") + name(function_.nodes[result].type));
    }
    if (active_[result]) gradients_[result] = constant(1);
    for (int32_t n = result; n >= 0; --n) {
      if (gradients_[n] != kNone) propagate(function_.nodes[n], n, gradients_[n]);
    }
    Derivative derivative;
    to_.results = {by_score()};
    for (int32_t n = 0; n < static_cast<int32_t>(function_.nodes.size()); ++n) {
      const Node &node = function_.nodes[n];
      if (node.op != Op::Load || node.type != Type::f32) continue;
      derivative.loads.push_back({n, node.number});
      to_.results.push_back(gradients_[n] == kNone ? constant(0) : gradients_[n]);
    }
    derivative.graph = simplified(to_);
    return derivative;
  }

 private:
  static constexpr int32_t kNone = -1;  // 0, and no node for it

  // Active nodes are f32 and depend, through f32 nodes alone, on the score or a floating-point load.
  void find_active() {
    for (const Node &node : function_.nodes) {
      bool active = node.op == Op::Score || node.op == Op::Load;
      for (const int32_t operand : node.inputs()) active = active || active_[operand];
      active_.push_back(active && node.type == Type::f32);
    }
  }

  // The score may be read by several nodes.
  int32_t by_score() {
    int32_t sum = kNone;
    for (size_t n = 0; n < function_.nodes.size(); ++n) {
      if (function_.nodes[n].op != Op::Score || gradients_[n] == kNone) continue;
      sum = sum == kNone ? gradients_[n] : add(sum, gradients_[n]);
    }
    return sum == kNone ? constant(0) : sum;
  }

  int32_t constant(double value) { return to_.add_const(static_cast<float>(value)); }
  int32_t of(Op op, int32_t a) { return to_.add(op, {a}); }
  int32_t add(int32_t a, int32_t b) { return to_.add(Op::Add, {a, b}); }
  int32_t sub(int32_t a, int32_t b) { return to_.add(Op::Sub, {a, b}); }
  int32_t mul(int32_t a, int32_t b) { return to_.add(Op::Mul, {a, b}); }
  int32_t div(int32_t a, int32_t b) { return to_.add(Op::Div, {a, b}); }
  int32_t where(int32_t condition, int32_t a, int32_t b) { return to_.add(Op::Where, {condition, a, b}); }
  int32_t compare(Op op, int32_t a, int32_t b) { return to_.add(op, {a, b}); }

  // Adds to the gradient of an operand; the term is made only if something depends on it.
  template <class Term>
  void give(int32_t operand, Term term) {
    if (!active_[operand]) return;
    const int32_t more = term();
    int32_t &gradient = gradients_[operand];
    gradient = gradient == kNone ? more : add(gradient, more);
  }

  // Node n is y = f(a, b) and has gradient g.
  void propagate(const Node &node, int32_t y, int32_t g) {
    const int32_t a = node.operands[0], b = node.operands[1], c = node.operands[2];
    switch (node.op) {
      case Op::Add:
        give(a, [&] { return g; });
        return give(b, [&] { return g; });
      case Op::Sub:
        give(a, [&] { return g; });
        return give(b, [&] { return of(Op::Neg, g); });
      case Op::Mul:
        give(a, [&] { return mul(g, b); });
        return give(b, [&] { return mul(g, a); });
      case Op::Div:
        give(a, [&] { return div(g, b); });
        return give(b, [&] { return of(Op::Neg, mul(g, div(y, b))); });
      case Op::Mod:  // y = a - b * floordiv(a, b)
        give(a, [&] { return g; });
        return give(b, [&] { return of(Op::Neg, mul(g, to_.add(Op::FloorDiv, {a, b}))); });
      case Op::Min:
      case Op::Max:
        give(a, [&] { return of_chosen(node.op, a, b, g); });
        return give(b, [&] { return of_chosen(node.op, b, a, g); });
      case Op::Pow:
        give(a, [&] { return of_base(a, b, g); });
        return give(b, [&] { return of_exponent(a, b, y, g); });
      case Op::Atan2:
        give(a, [&] { return div(mul(g, b), add(mul(a, a), mul(b, b))); });
        return give(b, [&] { return of(Op::Neg, div(mul(g, a), add(mul(a, a), mul(b, b)))); });
      case Op::Where:
        give(b, [&] { return where(a, g, constant(0)); });
        return give(c, [&] { return where(a, constant(0), g); });
      default:
        if (node.num_operands == 1 && !is_step(node.op)) give(a, [&] { return of_function(node.op, a, y, g); });
    }
  }

  static bool is_step(Op op) {
    return op == Op::Sign || op == Op::Floor || op == Op::Ceil || op == Op::Round || op == Op::Trunc;
  }

  // g for the operand x of min(x, other) or max(x, other) that is the result, also if one is NaN; half of it for both
  // if they are equal.
  int32_t of_chosen(Op op, int32_t x, int32_t other, int32_t g) {
    const int32_t lost = compare(op == Op::Max ? Op::Lt : Op::Gt, x, other);
    const int32_t shared = where(compare(Op::Eq, x, other), mul(g, constant(0.5)), g);
    return where(lost, constant(0), shared);
  }

  int32_t of_base(int32_t a, int32_t b, int32_t g) {
    const int32_t zero = constant(0);
    const int32_t slope = mul(b, to_.add(Op::Pow, {a, sub(b, constant(1))}));
    return where(compare(Op::Eq, b, zero), zero, mul(g, slope));
  }

  // a^b * log(a), but 0 where a = 0 and b >= 0.
  int32_t of_exponent(int32_t a, int32_t b, int32_t y, int32_t g) {
    const int32_t zero = constant(0);
    const int32_t flat = to_.add(Op::And, {compare(Op::Eq, a, zero), compare(Op::Ge, b, zero)});
    return where(flat, zero, mul(g, mul(y, of(Op::Log, a))));
  }

  // Functions of one variable x with value y.
  int32_t of_function(Op op, int32_t x, int32_t y, int32_t g) {
    const auto one = [&] { return constant(1); };
    const auto square = [&](int32_t n) { return mul(n, n); };
    switch (op) {
      case Op::ToF32:
        return g;
      case Op::Neg:
        return of(Op::Neg, g);
      case Op::Abs:
        return mul(g, of(Op::Sign, x));
      case Op::Exp:
        return mul(g, y);
      case Op::Exp2:
        return mul(mul(g, y), constant(std::numbers::ln2));
      case Op::Expm1:
        return mul(g, add(y, one()));
      case Op::Log:
        return div(g, x);
      case Op::Log2:
        return div(g, mul(x, constant(std::numbers::ln2)));
      case Op::Log1p:
        return div(g, add(x, one()));
      case Op::Sqrt:
        return div(g, mul(constant(2), y));
      case Op::Rsqrt:
        return mul(mul(g, constant(-0.5)), mul(y, square(y)));
      case Op::Sin:
        return mul(g, of(Op::Cos, x));
      case Op::Cos:
        return of(Op::Neg, mul(g, of(Op::Sin, x)));
      case Op::Tan:
        return mul(g, add(one(), square(y)));
      case Op::Asin:
        return mul(g, of(Op::Rsqrt, sub(one(), square(x))));
      case Op::Acos:
        return of(Op::Neg, mul(g, of(Op::Rsqrt, sub(one(), square(x)))));
      case Op::Atan:
        return div(g, add(square(x), one()));
      case Op::Sinh:
        return mul(g, of(Op::Cosh, x));
      case Op::Cosh:
        return mul(g, of(Op::Sinh, x));
      case Op::Tanh:
        return mul(g, sub(one(), square(y)));
      case Op::Sigmoid:
        return mul(mul(g, sub(one(), y)), y);
      default:  // Erf
        return mul(mul(g, constant(2 * std::numbers::inv_sqrtpi)), of(Op::Exp, of(Op::Neg, square(x))));
    }
  }

  const Graph &function_;
  Graph to_;
  std::vector<int32_t> gradients_;
  std::vector<bool> active_;
};

}  // namespace

Derivative derivative(const Graph &graph) {
  return Reverse(graph).run();
}

ScoreGradients score_gradients(const Graph &score, uint32_t wanted) {
  const Derivative slopes = derivative(score);
  ScoreGradients all;
  Graph joined = score;
  std::vector<int32_t> moved;  // the derivative's nodes, which follow
  for (Node node : slopes.graph.nodes) {
    for (int32_t n = 0; n < node.num_operands; ++n) node.operands[n] = moved[node.operands[n]];
    moved.push_back(joined.add_copy(node));
  }
  joined.results.push_back(moved[slopes.graph.results[0]]);
  for (size_t n = 0; n < slopes.loads.size(); ++n) {
    if ((wanted >> slopes.loads[n].tensor & 1) == 0) continue;
    const Node &load = score.nodes[slopes.loads[n].node];
    all.loads.push_back({load.number, load.num_operands});
    joined.results.push_back(moved[slopes.graph.results[1 + n]]);
    for (const int32_t index : load.inputs()) joined.results.push_back(index);
  }
  joined.num_tensors = score.num_tensors, joined.num_scalars = score.num_scalars;
  all.graph = simplified_function(joined);
  return all;
}

}  // namespace flashspark::graph
