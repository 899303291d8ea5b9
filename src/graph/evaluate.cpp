#include "graph/evaluate.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>
#include <vector>

#include "dtype.hpp"

namespace flashspark::graph {
namespace {

using Real1 = double (*)(double);
using Real2 = double (*)(double, double);
using Integer1 = int64_t (*)(int64_t);
using Integer2 = int64_t (*)(int64_t, int64_t);
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// One function for each operation and kind of operands. Integers are computed in 64 bits; finish() wraps those of 32.
struct Meaning {
  Op op;
  Real1 real1 = nullptr;
  Real2 real2 = nullptr;
  Integer1 integer1 = nullptr;
  Integer2 integer2 = nullptr;
};

int64_t wrapped(uint64_t x) {
  return static_cast<int64_t>(x);
}

// The remainder with the divisor's sign, and the quotient that belongs to it, as Python defines them.
double python_mod(double a, double b) {
  const double remainder = std::fmod(a, b);
  return remainder != 0 && (remainder < 0) != (b < 0) ? remainder + b : remainder;
}

double python_floordiv(double a, double b) {
  if (b == 0) return a / b;
  const double remainder = std::fmod(a, b);
  double quotient = (a - remainder) / b;  // a whole number but for rounding
  if (remainder != 0 && (remainder < 0) != (b < 0)) quotient -= 1;
  if (quotient == 0) return std::copysign(0.0, a / b);
  const double below = std::floor(quotient);
  return quotient - below > 0.5 ? below + 1 : below;
}

int64_t python_floordiv(int64_t a, int64_t b) {
  if (b == 0) return 0;
  if (b == -1) return wrapped(-static_cast<uint64_t>(a));
  return a / b - (a % b != 0 && (a < 0) != (b < 0) ? 1 : 0);
}

int64_t python_mod(int64_t a, int64_t b) {
  if (b == 0 || b == -1) return 0;
  const int64_t remainder = a % b;
  return remainder != 0 && (remainder < 0) != (b < 0) ? remainder + b : remainder;
}

double sign(double x) {
  return std::isnan(x) ? x : static_cast<double>((x > 0) - (x < 0));
}

// Shifts stand in apply(): they depend on the width.
constexpr Meaning kArithmetic[] = {
    {Op::Add,
     {},
     [](double a, double b) { return a + b; },
     {},
     [](int64_t a, int64_t b) { return wrapped(static_cast<uint64_t>(a) + static_cast<uint64_t>(b)); }},
    {Op::Sub,
     {},
     [](double a, double b) { return a - b; },
     {},
     [](int64_t a, int64_t b) { return wrapped(static_cast<uint64_t>(a) - static_cast<uint64_t>(b)); }},
    {Op::Mul,
     {},
     [](double a, double b) { return a * b; },
     {},
     [](int64_t a, int64_t b) { return wrapped(static_cast<uint64_t>(a) * static_cast<uint64_t>(b)); }},
    {Op::Min,
     {},
     [](double a, double b) { return std::isnan(a) || std::isnan(b) ? kNan : std::min(a, b); },
     {},
     [](int64_t a, int64_t b) { return std::min(a, b); }},
    {Op::Max,
     {},
     [](double a, double b) { return std::isnan(a) || std::isnan(b) ? kNan : std::max(a, b); },
     {},
     [](int64_t a, int64_t b) { return std::max(a, b); }},
    {Op::FloorDiv, {}, python_floordiv, {}, python_floordiv},
    {Op::Mod, {}, python_mod, {}, python_mod},
    {Op::Div, {}, [](double a, double b) { return a / b; }},
    {Op::Pow, {}, [](double a, double b) { return std::pow(a, b); }},
    {Op::Atan2, {}, [](double a, double b) { return std::atan2(a, b); }},
    {Op::And, {}, {}, {}, [](int64_t a, int64_t b) { return a & b; }},
    {Op::Or, {}, {}, {}, [](int64_t a, int64_t b) { return a | b; }},
    {Op::Xor, {}, {}, {}, [](int64_t a, int64_t b) { return a ^ b; }},
    {Op::Neg, [](double x) { return -x; }, {}, [](int64_t x) { return wrapped(-static_cast<uint64_t>(x)); }},
    {Op::Abs,
     [](double x) { return std::fabs(x); },
     {},
     [](int64_t x) { return x < 0 ? wrapped(-static_cast<uint64_t>(x)) : x; }},
    {Op::Sign, sign, {}, [](int64_t x) { return int64_t{x > 0} - int64_t{x < 0}; }},
    {Op::Not, {}, {}, [](int64_t x) { return ~x; }},
    {Op::Exp, [](double x) { return std::exp(x); }},
    {Op::Exp2, [](double x) { return std::exp2(x); }},
    {Op::Expm1, [](double x) { return std::expm1(x); }},
    {Op::Log, [](double x) { return std::log(x); }},
    {Op::Log2, [](double x) { return std::log2(x); }},
    {Op::Log1p, [](double x) { return std::log1p(x); }},
    {Op::Sqrt, [](double x) { return std::sqrt(x); }},
    {Op::Rsqrt, [](double x) { return 1 / std::sqrt(x); }},
    {Op::Sin, [](double x) { return std::sin(x); }},
    {Op::Cos, [](double x) { return std::cos(x); }},
    {Op::Tan, [](double x) { return std::tan(x); }},
    {Op::Asin, [](double x) { return std::asin(x); }},
    {Op::Acos, [](double x) { return std::acos(x); }},
    {Op::Atan, [](double x) { return std::atan(x); }},
    {Op::Sinh, [](double x) { return std::sinh(x); }},
    {Op::Cosh, [](double x) { return std::cosh(x); }},
    {Op::Tanh, [](double x) { return std::tanh(x); }},
    {Op::Sigmoid, [](double x) { return 1 / (1 + std::exp(-x)); }},
    {Op::Erf, [](double x) { return std::erf(x); }},
    {Op::Floor, [](double x) { return std::floor(x); }},
    {Op::Ceil, [](double x) { return std::ceil(x); }},
    {Op::Round, [](double x) { return std::nearbyint(x); }},
    {Op::Trunc, [](double x) { return std::trunc(x); }},
};

const Meaning &meaning(Op op) {
  static const auto table = [] {
    std::array<Meaning, kNumOps> all{};
    for (const Meaning &each : kArithmetic) all[static_cast<int>(each.op)] = each;
    return all;
  }();
  return table[static_cast<int>(op)];
}

// All bits above the type's width repeat its sign, and a bool is 0 or 1.
int64_t finish(Type type, int64_t x) {
  if (type == Type::boolean) return x & 1;
  return type == Type::i32 ? static_cast<int32_t>(static_cast<uint32_t>(x)) : x;
}

template <class T>
bool compare(Op op, T a, T b) {
  switch (op) {
    case Op::Lt:
      return a < b;
    case Op::Le:
      return a <= b;
    case Op::Gt:
      return a > b;
    case Op::Ge:
      return a >= b;
    case Op::Eq:
      return a == b;
    default:
      return a != b;
  }
}

// Truncates and saturates; NaN becomes 0.
template <class Integer>
int64_t saturated(double x) {
  if (std::isnan(x)) return 0;
  const double limit = std::ldexp(1.0, std::numeric_limits<Integer>::digits);
  if (x >= limit) return std::numeric_limits<Integer>::max();
  return x <= -limit ? std::numeric_limits<Integer>::min() : static_cast<Integer>(x);
}

Value convert(Op op, Type from, const Value &x) {
  const bool real = from == Type::f32;
  switch (op) {
    case Op::ToBool:
      return {.integer = real ? x.real != 0 : x.integer != 0};
    case Op::ToI32:
      return {.integer = real ? saturated<int32_t>(x.real) : finish(Type::i32, x.integer)};
    case Op::ToI64:
      return {.integer = real ? saturated<int64_t>(x.real) : x.integer};
    default:
      return {.real = real ? x.real : static_cast<double>(x.integer)};
  }
}

Value shift(Op op, Type type, int64_t x, int64_t count) {
  count &= type == Type::i32 ? 31 : 63;
  if (op == Op::Shr) return {.integer = x >> count};
  return {.integer = finish(type, wrapped(static_cast<uint64_t>(x) << count))};
}

double element(const AuxTensor &tensor, int64_t at, int64_t *integer) {
  const auto whole = [&]<class T>(T) {
    T value;
    std::memcpy(&value, static_cast<const char *>(tensor.data) + at * static_cast<int64_t>(sizeof(T)), sizeof(T));
    *integer = static_cast<int64_t>(value);  // NOLINT(bugprone-signed-char-misuse): i8 is a number
    return static_cast<double>(value);
  };
  switch (static_cast<DataType>(tensor.dtype)) {
    case DataType::boolean:
      whole(uint8_t{});
      *integer = *integer != 0;
      return 0;
    case DataType::u8:
      return whole(uint8_t{});
    case DataType::i8:
      return whole(int8_t{});
    case DataType::i16:
      return whole(int16_t{});
    case DataType::i32:
      return whole(int32_t{});
    case DataType::i64:
      return whole(int64_t{});
    case DataType::f16:
      return f16_to_float(static_cast<const uint16_t *>(tensor.data)[at]);
    case DataType::bf16:
      return bf16_to_float(static_cast<const uint16_t *>(tensor.data)[at]);
    case DataType::f32:
      return static_cast<const float *>(tensor.data)[at];
    default:
      return static_cast<const double *>(tensor.data)[at];
  }
}

Value load(const Node &node, const AuxTensor &tensor, const std::vector<Value> &values, BadIndex &bad) {
  int64_t at = 0;
  for (int32_t n = 0; n < node.num_operands; ++n) {
    const int64_t index = values[node.operands[n]].integer, size = tensor.shape[n];
    if ((index < -size || index >= size) && !bad.found) bad = {true, node.number, n, index, size};
    const int64_t from_start = index < 0 ? index + size : index;
    at += std::clamp<int64_t>(from_start, 0, size - 1) * tensor.strides[n];
  }
  Value value;
  value.real = element(tensor, at, &value.integer);
  return value;
}

Value input(const Node &node, const Bindings &bindings, const Row &row, int32_t kv_idx, double score) {
  switch (node.op) {
    case Op::Score:
      return {.real = score};
    case Op::B:
      return {.integer = row.b};
    case Op::H:
      return {.integer = row.h};
    case Op::QIdx:
      return {.integer = row.q_idx};
    case Op::KvIdx:
      return {.integer = kv_idx};
    case Op::SeqlenQ:
      return {.integer = row.seqlen_q};
    case Op::SeqlenK:
      return {.integer = row.seqlen_k};
    case Op::OffsetQ:
      return {.integer = row.offset_q};
    case Op::OffsetK:
      return {.integer = row.offset_k};
    case Op::Scalar: {
      const double given = bindings.scalars[node.number];
      if (node.type == Type::f32) return {.real = given};
      return {.integer = node.type == Type::i32 ? saturated<int32_t>(given) : saturated<int64_t>(given)};
    }
    default:  // Const
      return {.real = node.type == Type::f32 ? double{node.real()} : 0.0, .integer = node.value};
  }
}

}  // namespace

Value apply(Op op, Type type, std::span<const Value> operands) {
  const Value &a = operands.front(), &b = operands.back();
  const bool real = type == Type::f32;
  if (op == Op::Where) return a.integer != 0 ? operands[1] : operands[2];
  if (op == Op::IsNan) return {.integer = std::isnan(a.real)};
  if (op == Op::IsInf) return {.integer = std::isinf(a.real)};
  if (op >= Op::ToBool && op <= Op::ToF32) return convert(op, type, a);
  if (op >= Op::Lt && op <= Op::Ne)
    return {.integer = real ? compare(op, a.real, b.real) : compare(op, a.integer, b.integer)};
  if (op == Op::Shl || op == Op::Shr) return shift(op, type, a.integer, b.integer);
  const Meaning &m = meaning(op);
  if (real) return {.real = operands.size() == 1 ? m.real1(a.real) : m.real2(a.real, b.real)};
  return {.integer = finish(type, operands.size() == 1 ? m.integer1(a.integer) : m.integer2(a.integer, b.integer))};
}

Evaluation evaluate(const Graph &graph, const Bindings &bindings, const Row &row, int32_t kv_idx, double score,
                    int32_t result) {
  const int32_t wanted = graph.results[result];
  const std::vector<bool> is_needed = needed(graph, std::span(&wanted, 1));
  std::vector<Value> values(graph.nodes.size());
  Evaluation evaluation{};
  for (int32_t n = 0; n <= wanted; ++n) {
    const Node &node = graph.nodes[n];
    if (!is_needed[n]) continue;
    if (node.op == Op::Load) {
      values[n] = load(node, bindings.tensors[node.number], values, evaluation.bad_index);
    } else if (node.num_operands == 0) {
      values[n] = input(node, bindings, row, kv_idx, score);
    } else {
      Value operands[3];
      for (int32_t k = 0; k < node.num_operands; ++k) operands[k] = values[node.operands[k]];
      const Type type = graph.nodes[node.operands[node.num_operands - 1]].type;
      values[n] = apply(node.op, type, std::span(operands, static_cast<size_t>(node.num_operands)));
    }
  }
  const bool real = graph.nodes[wanted].type == Type::f32;
  evaluation.integer = real ? 0 : values[wanted].integer;
  evaluation.value = real ? values[wanted].real : static_cast<double>(evaluation.integer);
  return evaluation;
}

}  // namespace flashspark::graph
