// Loops without vectors: all of i64, and the f32 and i32 operations that no vector instruction helps.
#include <array>
#include <cmath>
#include <limits>

#include "graph/vector_kernels.hpp"

namespace flashspark::graph {
namespace {

template <class In, class Out, class F>
void map1(const Call &call, F f) {
  for (int64_t r = 0; r < call.rows; ++r) {
    const In *a = call.in[0].row<In>(r);
    Out *out = call.out_row<Out>(r);
    for (int64_t i = 0; i < call.count; ++i) out[i] = f(a[i & call.in[0].mask]);
  }
}

template <class In, class Out, class F>
void map2(const Call &call, F f) {
  for (int64_t r = 0; r < call.rows; ++r) {
    const In *a = call.in[0].row<In>(r), *b = call.in[1].row<In>(r);
    Out *out = call.out_row<Out>(r);
    for (int64_t i = 0; i < call.count; ++i) out[i] = f(a[i & call.in[0].mask], b[i & call.in[1].mask]);
  }
}

void select_wide(const Call &call) {
  const Operand &c = call.in[0], &a = call.in[1], &b = call.in[2];
  for (int64_t r = 0; r < call.rows; ++r) {
    const int32_t *cs = c.row<int32_t>(r);
    const int64_t *as = a.row<int64_t>(r), *bs = b.row<int64_t>(r);
    int64_t *out = call.out_row<int64_t>(r);
    for (int64_t i = 0; i < call.count; ++i) out[i] = cs[i & c.mask] != 0 ? as[i & a.mask] : bs[i & b.mask];
  }
}

// Division towards minus infinity. -1 stands apart: the least integer over it overflows.
template <class T>
T floor_quotient(T a, T b) {
  if (b == 0) return 0;
  if (b == -1) return static_cast<T>(0 - static_cast<uint64_t>(a));
  const T rest = static_cast<T>(a % b);
  return static_cast<T>(a / b - (rest != 0 && (rest ^ b) < 0 ? 1 : 0));
}

template <class T>
T floor_remainder(T a, T b) {
  if (b == 0 || b == -1) return 0;
  const T remainder = static_cast<T>(a % b);
  return remainder != 0 && (remainder ^ b) < 0 ? remainder + b : remainder;
}

float floor_remainder(float a, float b) {
  const float remainder = std::fmod(a, b);
  return remainder != 0 && std::signbit(remainder) != std::signbit(b) ? remainder + b : remainder;
}

// The quotient of doubles is close enough to tell whole numbers below 2^24 apart; what the remainder leaves divides
// without a rest.
float floor_quotient(float a, float b) {
  if (b == 0) return a / b;
  const double rest = std::fmod(double{a}, double{b});
  if (std::isnan(rest)) return std::numeric_limits<float>::quiet_NaN();
  double quotient = std::nearbyint((double{a} - rest) / double{b});
  if (rest != 0 && std::signbit(rest) != std::signbit(b)) quotient -= 1;
  return quotient == 0 ? std::copysign(0.0f, a / b) : static_cast<float>(quotient);
}

int64_t to_i64(float x) {
  if (x != x) return 0;
  if (x >= 0x1p63f) return std::numeric_limits<int64_t>::max();
  return x < -0x1p63f ? std::numeric_limits<int64_t>::min() : static_cast<int64_t>(x);
}

struct Entry {
  Op op;
  Type operands;
  Kernel kernel;
};

#define MAP1(op, type, In, Out, expression) \
  {Op::op, Type::type, [](const Call &call) { map1<In, Out>(call, [](In a) -> Out { return expression; }); }}
#define MAP2(op, type, In, Out, expression) \
  {Op::op, Type::type, [](const Call &call) { map2<In, Out>(call, [](In a, In b) -> Out { return expression; }); }}
#define LONG1(op, expression) MAP1(op, i64, int64_t, int64_t, expression)
#define LONG2(op, expression) MAP2(op, i64, int64_t, int64_t, expression)
#define BITS(x) static_cast<uint64_t>(x)
#define COMPARE(op, expression) MAP2(op, i64, int64_t, int32_t, (expression) ? -1 : 0)

constexpr Entry kEntries[] = {
    LONG2(Add, static_cast<int64_t>(BITS(a) + BITS(b))),
    LONG2(Sub, static_cast<int64_t>(BITS(a) - BITS(b))),
    LONG2(Mul, static_cast<int64_t>(BITS(a) * BITS(b))),
    LONG2(Min, a < b ? a : b),
    LONG2(Max, a > b ? a : b),
    LONG2(FloorDiv, floor_quotient(a, b)),
    LONG2(Mod, floor_remainder(a, b)),
    LONG2(And, (a & b)),
    LONG2(Or, a | b),
    LONG2(Xor, a ^ b),
    LONG2(Shl, static_cast<int64_t>(BITS(a) << (b & 63))),
    LONG2(Shr, a >> (b & 63)),
    LONG1(Neg, static_cast<int64_t>(0 - BITS(a))),
    LONG1(Abs, a < 0 ? static_cast<int64_t>(0 - BITS(a)) : a),
    LONG1(Sign, (a > 0 ? 1 : 0) - (a < 0 ? 1 : 0)),
    LONG1(Not, ~a),
    COMPARE(Lt, a < b),
    COMPARE(Le, a <= b),
    COMPARE(Gt, a > b),
    COMPARE(Ge, a >= b),
    COMPARE(Eq, a == b),
    COMPARE(Ne, a != b),
    MAP1(ToBool, i64, int64_t, int32_t, a != 0 ? -1 : 0),
    MAP1(ToI32, i64, int64_t, int32_t, static_cast<int32_t>(BITS(a))),
    LONG1(ToI64, a),
    MAP1(ToF32, i64, int64_t, float, static_cast<float>(a)),
    MAP1(ToI64, boolean, int32_t, int64_t, a & 1),
    MAP1(ToI64, i32, int32_t, int64_t, a),
    MAP1(ToI64, f32, float, int64_t, to_i64(a)),
    {Op::Where, Type::i64, select_wide},

    MAP2(FloorDiv, i32, int32_t, int32_t, floor_quotient(a, b)),
    MAP2(Mod, i32, int32_t, int32_t, floor_remainder(a, b)),
    MAP2(FloorDiv, f32, float, float, floor_quotient(a, b)),
    MAP2(Mod, f32, float, float, floor_remainder(a, b)),
    MAP2(Pow, f32, float, float, std::pow(a, b)),
    MAP2(Atan2, f32, float, float, std::atan2(a, b)),
    MAP1(Tan, f32, float, float, std::tan(a)),
    MAP1(Erf, f32, float, float, std::erf(a)),
};

#undef MAP1
#undef MAP2
#undef LONG1
#undef LONG2
#undef BITS
#undef COMPARE

}  // namespace

Kernel scalar_kernel(Op op, Type operands) {
  static const auto table = [] {
    std::array<std::array<Kernel, kNumTypes>, kNumOps> all{};
    for (const Entry &e : kEntries) all[static_cast<int>(e.op)][static_cast<int>(e.operands)] = e.kernel;
    return all;
  }();
  return table[static_cast<int>(op)][static_cast<int>(operands)];
}

}  // namespace flashspark::graph
