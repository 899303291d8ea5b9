// The vector loops, compiled once for every SIMD target (hence the toggling guard).
#if defined(FLASHSPARK_GRAPH_VECTOR_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASHSPARK_GRAPH_VECTOR_INL_HPP_
#undef FLASHSPARK_GRAPH_VECTOR_INL_HPP_
#else
#define FLASHSPARK_GRAPH_VECTOR_INL_HPP_
#endif

#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include <cmath>
#include <limits>

#include "cpu/simd-inl.hpp"
#include "graph/vector_kernels.hpp"

HWY_BEFORE_NAMESPACE();
namespace flashspark::graph::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// The loops. f gets vectors of the operands and returns one of the result.
template <class In, class Out, class F>
HWY_ATTR void map1(const Call &call, F f) {
  const hn::ScalableTag<In> d;
  const hn::ScalableTag<Out> d_out;
  const int64_t mask = call.in[0].mask;
  for (int64_t r = 0; r < call.rows; ++r) {
    const In *a = call.in[0].row<In>(r);
    Out *out = call.out_row<Out>(r);
    for (int64_t i = 0; i < call.count; i += static_cast<int64_t>(hn::Lanes(d)))
      hn::StoreU(f(d, hn::LoadU(d, a + (i & mask))), d_out, out + i);
  }
}

template <class In, class Out, class F>
HWY_ATTR void map2(const Call &call, F f) {
  const hn::ScalableTag<In> d;
  const hn::ScalableTag<Out> d_out;
  const int64_t mask_a = call.in[0].mask, mask_b = call.in[1].mask;
  for (int64_t r = 0; r < call.rows; ++r) {
    const In *a = call.in[0].row<In>(r), *b = call.in[1].row<In>(r);
    Out *out = call.out_row<Out>(r);
    for (int64_t i = 0; i < call.count; i += static_cast<int64_t>(hn::Lanes(d)))
      hn::StoreU(f(d, hn::LoadU(d, a + (i & mask_a)), hn::LoadU(d, b + (i & mask_b))), d_out, out + i);
  }
}

// A mask as a bool: 0 or -1.
template <class D, class M>
HWY_ATTR auto bools(D, M mask) {
  const hn::RebindToSigned<D> di;
  return hn::VecFromMask(di, hn::RebindMask(di, mask));
}

template <class D, class V>
HWY_ATTR auto within(D d, V x, float low, float high) {
  return hn::And(hn::Ge(x, hn::Set(d, low)), hn::Le(x, hn::Set(d, high)));
}

// y, but exact(x) in the lanes where y is not known to be right: NaN, infinities, and whatever lies outside the range
// of Highway's function.
template <class D, class V, class M, class F>
HWY_ATTR V patched(D d, V x, V y, M right, F exact) {
  if (HWY_LIKELY(hn::AllTrue(d, right))) return y;
  constexpr size_t kMost = HWY_MAX_BYTES / sizeof(float);
  HWY_ALIGN float xs[kMost], ys[kMost];
  HWY_ALIGN int32_t is_right[kMost];
  hn::Store(x, d, xs);
  hn::Store(y, d, ys);
  hn::Store(bools(d, right), hn::RebindToSigned<D>(), is_right);
  for (size_t i = 0; i < hn::Lanes(d); ++i) {
    if (is_right[i] == 0) ys[i] = exact(xs[i]);
  }
  return hn::Load(d, ys);
}

// NaN if an operand is, whichever one the machine's minimum and maximum prefer.
template <class D, class V>
HWY_ATTR V or_nan(D d, V a, V b, V result) {
  (void)d;
  const auto ordered = hn::And(hn::Eq(a, a), hn::Eq(b, b));
  return hn::IfThenElse(ordered, result, hn::Add(a, b));
}

// 2^x for any x up to 127.5: 2^whole * e^(ln 2 * rest). Two factors 2^(whole/2) reach subnormal results.
template <class D, class V>
HWY_ATTR V exp2_of(D d, V x) {
  const hn::RebindToSigned<D> di;
  const V clamped = cpu::HWY_NAMESPACE::at_least(d, -160.0f, x);
  const V whole = hn::Round(clamped);
  const V y = hn::Exp(d, hn::Mul(hn::Sub(clamped, whole), hn::Set(d, 0.69314718055994530942f)));
  const auto n = hn::ConvertTo(di, whole);
  const auto half = hn::ShiftRight<1>(n);
  const auto power = [&](auto exponent)
                         HWY_ATTR { return hn::BitCast(d, hn::ShiftLeft<23>(hn::Add(exponent, hn::Set(di, 127)))); };
  return hn::Mul(hn::Mul(y, power(half)), power(hn::Sub(n, half)));
}

template <class D, class V>
HWY_ATTR V cosh_of(D d, V x) {
  const V e = hn::Exp(d, hn::Abs(x));
  return hn::Mul(hn::Set(d, 0.5f), hn::Add(e, hn::Div(hn::Set(d, 1.0f), e)));
}

template <class D, class V>
HWY_ATTR V sigmoid_of(D d, V x) {
  const V one = hn::Set(d, 1.0f);
  return hn::Div(one, hn::Add(one, hn::Exp(d, hn::Neg(x))));
}

// 1, 0 or -1; a NaN stays.
template <class D, class V>
HWY_ATTR V sign_of(D d, V x) {
  const V one = hn::Set(d, static_cast<hn::TFromD<D>>(1)), zero = hn::Zero(d);
  const V of_nonzero = hn::IfThenElse(hn::Gt(x, zero), one, hn::IfThenElse(hn::Lt(x, zero), hn::Neg(one), zero));
  return hn::IfThenElse(hn::Eq(x, x), of_nonzero, x);
}

// Truncates and saturates; NaN becomes 0.
template <class D, class V>
HWY_ATTR auto to_i32(D d, V x) {
  const hn::RebindToSigned<D> di;
  const auto too_large = hn::Ge(x, hn::Set(d, 2147483648.0f)), too_small = hn::Lt(x, hn::Set(d, -2147483648.0f));
  const auto fits = hn::AndNot(hn::Or(too_large, too_small), hn::Eq(x, x));
  const auto whole = hn::ConvertTo(di, hn::IfThenElseZero(fits, x));
  const auto at_least = hn::IfThenElse(hn::RebindMask(di, too_small), hn::Set(di, INT32_MIN), whole);
  return hn::IfThenElse(hn::RebindMask(di, too_large), hn::Set(di, INT32_MAX), at_least);
}

inline HWY_ATTR void select(const Call &call) {
  const hn::ScalableTag<int32_t> d;
  const Operand &c = call.in[0], &a = call.in[1], &b = call.in[2];
  for (int64_t r = 0; r < call.rows; ++r) {
    const int32_t *cs = c.row<int32_t>(r), *as = a.row<int32_t>(r), *bs = b.row<int32_t>(r);
    int32_t *out = call.out_row<int32_t>(r);
    for (int64_t i = 0; i < call.count; i += static_cast<int64_t>(hn::Lanes(d))) {
      const auto condition = hn::MaskFromVec(hn::LoadU(d, cs + (i & c.mask)));
      hn::StoreU(hn::IfThenElse(condition, hn::LoadU(d, as + (i & a.mask)), hn::LoadU(d, bs + (i & b.mask))), d,
                 out + i);
    }
  }
}

struct Entry {
  Op op;
  Type operands;
  Kernel kernel;
};

constexpr float kInfinity = std::numeric_limits<float>::infinity(), kLargest = std::numeric_limits<float>::max(),
                kSmallest = std::numeric_limits<float>::denorm_min();

// Operation, type of the operands, C++ types of operands and result, and the result as an expression in d (the
// operands' tag), a and b.
#define MAP1(op, type, In, Out, expression)                                                    \
  {Op::op, Type::type, [](const Call &call) HWY_ATTR {                                         \
     map1<In, Out>(call, []([[maybe_unused]] auto d, auto a) HWY_ATTR { return expression; }); \
   }}
#define MAP2(op, type, In, Out, expression)                                                            \
  {Op::op, Type::type, [](const Call &call) HWY_ATTR {                                                 \
     map2<In, Out>(call, []([[maybe_unused]] auto d, auto a, auto b) HWY_ATTR { return expression; }); \
   }}
#define FLOAT1(op, expression) MAP1(op, f32, float, float, expression)
#define FLOAT2(op, expression) MAP2(op, f32, float, float, expression)
#define INT1(op, expression) MAP1(op, i32, int32_t, int32_t, expression)
#define INT2(op, expression) MAP2(op, i32, int32_t, int32_t, expression)
#define BOOL2(op, expression) MAP2(op, boolean, int32_t, int32_t, expression)
#define COMPARE(op, of_floats, of_integers) MAP2(op, f32, float, int32_t, of_floats), INT2(op, of_integers)
// An elementary function that is right between two numbers; <cmath>'s elsewhere.
#define ELEMENTARY(op, vectors, low, high, scalar) \
  FLOAT1(op, patched(d, a, vectors, within(d, a, low, high), [](float x) { return scalar; }))

constexpr Entry kEntries[] = {
    FLOAT2(Add, hn::Add(a, b)),
    FLOAT2(Sub, hn::Sub(a, b)),
    FLOAT2(Mul, hn::Mul(a, b)),
    FLOAT2(Div, hn::Div(a, b)),
    FLOAT2(Min, or_nan(d, a, b, hn::Min(a, b))),
    FLOAT2(Max, or_nan(d, a, b, hn::Max(a, b))),
    FLOAT1(Neg, hn::Neg(a)),
    FLOAT1(Abs, hn::Abs(a)),
    FLOAT1(Sign, sign_of(d, a)),
    FLOAT1(Sqrt, hn::Sqrt(a)),
    FLOAT1(Rsqrt, hn::Div(hn::Set(d, 1.0f), hn::Sqrt(a))),
    FLOAT1(Floor, hn::Floor(a)),
    FLOAT1(Ceil, hn::Ceil(a)),
    FLOAT1(Round, hn::Round(a)),
    FLOAT1(Trunc, hn::Trunc(a)),
    ELEMENTARY(Exp, hn::Exp(d, a), -kInfinity, 88.0f, std::exp(x)),
    ELEMENTARY(Exp2, exp2_of(d, a), -kInfinity, 127.5f, std::exp2(x)),
    ELEMENTARY(Expm1, hn::Expm1(d, a), -kInfinity, 88.0f, std::expm1(x)),
    ELEMENTARY(Log, hn::Log(d, a), kSmallest, kLargest, std::log(x)),
    ELEMENTARY(Log2, hn::Log2(d, a), kSmallest, kLargest, std::log2(x)),
    ELEMENTARY(Log1p, hn::Log1p(d, a), -0.999f, 1e38f, std::log1p(x)),
    ELEMENTARY(Sin, hn::Sin(d, a), -39000.0f, 39000.0f, std::sin(x)),
    ELEMENTARY(Cos, hn::Cos(d, a), -39000.0f, 39000.0f, std::cos(x)),
    ELEMENTARY(Asin, hn::Asin(d, a), -1.0f, 1.0f, std::asin(x)),
    ELEMENTARY(Acos, hn::Acos(d, a), -1.0f, 1.0f, std::acos(x)),
    ELEMENTARY(Atan, hn::Atan(d, a), -kLargest, kLargest, std::atan(x)),
    ELEMENTARY(Sinh, hn::Sinh(d, a), -88.0f, 88.0f, std::sinh(x)),
    ELEMENTARY(Cosh, cosh_of(d, a), -88.0f, 88.0f, std::cosh(x)),
    FLOAT1(Tanh, cpu::HWY_NAMESPACE::tanh_of(d, a)),
    ELEMENTARY(Sigmoid, sigmoid_of(d, a), -88.0f, kInfinity, 1 / (1 + std::exp(-x))),

    INT2(Add, hn::Add(a, b)),
    INT2(Sub, hn::Sub(a, b)),
    INT2(Mul, hn::Mul(a, b)),
    INT2(Min, hn::Min(a, b)),
    INT2(Max, hn::Max(a, b)),
    INT2(And, hn::And(a, b)),
    INT2(Or, hn::Or(a, b)),
    INT2(Xor, hn::Xor(a, b)),
    INT2(Shl, hn::Shl(a, hn::And(b, hn::Set(d, 31)))),
    INT2(Shr, hn::Shr(a, hn::And(b, hn::Set(d, 31)))),
    INT1(Neg, hn::Sub(hn::Zero(d), a)),
    INT1(Abs, hn::Abs(a)),
    INT1(Sign, sign_of(d, a)),
    INT1(Not, hn::Not(a)),

    BOOL2(And, hn::And(a, b)),
    BOOL2(Or, hn::Or(a, b)),
    BOOL2(Xor, hn::Xor(a, b)),
    BOOL2(Eq, hn::Not(hn::Xor(a, b))),
    BOOL2(Ne, hn::Xor(a, b)),
    MAP1(Not, boolean, int32_t, int32_t, hn::Not(a)),

    COMPARE(Lt, bools(d, hn::Lt(a, b)), bools(d, hn::Lt(a, b))),
    COMPARE(Le, bools(d, hn::Le(a, b)), hn::Not(bools(d, hn::Gt(a, b)))),
    COMPARE(Gt, bools(d, hn::Gt(a, b)), bools(d, hn::Gt(a, b))),
    COMPARE(Ge, bools(d, hn::Ge(a, b)), hn::Not(bools(d, hn::Lt(a, b)))),
    COMPARE(Eq, bools(d, hn::Eq(a, b)), bools(d, hn::Eq(a, b))),
    // Some of Highway's Ne() are false with NaN.
    COMPARE(Ne, hn::Not(bools(d, hn::Eq(a, b))), hn::Not(bools(d, hn::Eq(a, b)))),
    MAP1(IsNan, f32, float, int32_t, hn::Not(bools(d, hn::Eq(a, a)))),
    MAP1(IsInf, f32, float, int32_t, bools(d, hn::Eq(hn::Abs(a), hn::Set(d, kInfinity)))),

    MAP1(ToBool, boolean, int32_t, int32_t, a),
    MAP1(ToBool, i32, int32_t, int32_t, hn::Not(bools(d, hn::Eq(a, hn::Zero(d))))),
    MAP1(ToBool, f32, float, int32_t, hn::Not(bools(d, hn::Eq(a, hn::Zero(d))))),
    MAP1(ToI32, boolean, int32_t, int32_t, hn::And(a, hn::Set(d, 1))),
    MAP1(ToI32, i32, int32_t, int32_t, a),
    MAP1(ToI32, f32, float, int32_t, to_i32(d, a)),
    MAP1(ToF32, boolean, int32_t, float, hn::ConvertTo(hn::ScalableTag<float>(), hn::And(a, hn::Set(d, 1)))),
    MAP1(ToF32, i32, int32_t, float, hn::ConvertTo(hn::ScalableTag<float>(), a)),
    MAP1(ToF32, f32, float, float, a),

    {Op::Where, Type::boolean, select},
    {Op::Where, Type::i32, select},
    {Op::Where, Type::f32, select},
};

#undef MAP1
#undef MAP2
#undef FLOAT1
#undef FLOAT2
#undef INT1
#undef INT2
#undef BOOL2
#undef COMPARE
#undef ELEMENTARY

inline HWY_ATTR bool locate(const Locate &l, int32_t *offsets) {
  const hn::ScalableTag<int32_t> d;
  const auto zero = hn::Zero(d), size = hn::Set(d, static_cast<int32_t>(l.size)),
             last = hn::Set(d, static_cast<int32_t>(l.size - 1)), stride = hn::Set(d, static_cast<int32_t>(l.stride));
  auto wrong = zero;
  for (int64_t r = 0; r < l.rows; ++r) {
    const int32_t *index = l.index.row<int32_t>(r);
    int32_t *to = offsets + r * l.count;
    for (int64_t i = 0; i < l.count; i += static_cast<int64_t>(hn::Lanes(d))) {
      const auto given = hn::LoadU(d, index + (i & l.index.mask));
      const auto from_start = hn::Add(given, hn::IfThenElseZero(hn::Lt(given, zero), size));
      const auto nearest = hn::Min(hn::Max(from_start, zero), last);
      wrong = hn::Or(wrong, hn::Xor(from_start, nearest));
      const auto part = hn::Mul(nearest, stride);
      hn::StoreU(l.is_first ? part : hn::Add(part, hn::LoadU(d, to + i)), d, to + i);
    }
  }
  return !hn::AllTrue(d, hn::Eq(wrong, zero));
}

inline HWY_ATTR void gather_f32(const float *data, const int32_t *offsets, int64_t count, float *to) {
  const hn::ScalableTag<float> d;
  const hn::RebindToSigned<decltype(d)> di;
  for (int64_t i = 0; i < count; i += static_cast<int64_t>(hn::Lanes(d)))
    hn::StoreU(hn::GatherIndex(d, data, hn::LoadU(di, offsets + i)), d, to + i);
}

inline HWY_ATTR void store_bools(const int32_t *from, int64_t count, uint8_t *to) {
  const hn::ScalableTag<int32_t> d;
  const hn::Rebind<uint8_t, decltype(d)> d8;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes)
    hn::StoreU(hn::DemoteTo(d8, hn::And(hn::LoadU(d, from + i), hn::Set(d, 1))), d8, to + i);
  for (; i < count; ++i) to[i] = static_cast<uint8_t>(from[i] & 1);
}

inline HWY_ATTR uint8_t survey_bools(const int32_t *from, int64_t count) {
  const hn::CappedTag<int32_t, kLanes> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  auto any = hn::Zero(d), all = hn::Set(d, -1);
  for (int64_t i = 0; i < count; i += lanes) {
    const auto x = hn::LoadU(d, from + i);
    any = hn::Or(any, x);
    all = hn::And(all, x);
  }
  const bool holds = !hn::AllTrue(d, hn::Eq(any, hn::Zero(d))), fails = !hn::AllTrue(d, hn::Eq(all, hn::Set(d, -1)));
  return static_cast<uint8_t>((holds ? kHolds : 0) | (fails ? kFails : 0));
}

inline const VectorKernels &table() {
  static const VectorKernels all = [] {
    VectorKernels t{.target = HWY_TARGET == HWY_AVX3   ? "AVX-512"
                              : HWY_TARGET == HWY_AVX2 ? "AVX2"
                              : HWY_TARGET == HWY_SSE4 ? "SSE4"
                                                       : "NEON",
                    .kernels = {},
                    .locate = locate,
                    .gather_f32 = gather_f32,
                    .store_bools = store_bools,
                    .survey_bools = survey_bools};
    for (const Entry &e : kEntries) t.kernels[static_cast<int>(e.op)][static_cast<int>(e.operands)] = e.kernel;
    return t;
  }();
  return all;
}

}  // namespace flashspark::graph::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
