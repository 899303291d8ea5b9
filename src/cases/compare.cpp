// The oracle's result, and how far from it an implementation may be.
#include <algorithm>
#include <cmath>

#include "cases/cases.hpp"

namespace flashspark::cases {

Result reference(Problem &problem) {
  const flashspark_attention_params saved = problem.params;
  flashspark_attention_params &p = problem.params;
  // The same rows at the same strides in float32; output_scale belongs to e4m3 and is applied below.
  const size_t elements = problem.out_.size() / flashspark_dtype_size(saved.out.dtype);
  Buffer out(elements * sizeof(float)), lse;
  p.out.data = out.data();
  p.out.dtype = FLASHSPARK_FLOAT32;
  p.output_scale = nullptr;
  if (p.lse == nullptr) {
    const bool dense = p.cu_seqlens_q == nullptr;
    const int64_t tokens = dense ? p.max_seqlen_q : p.total_q;
    lse = Buffer((dense ? p.num_seqs : 1) * tokens * p.num_heads_q * sizeof(float));
    p.lse = lse.as<float>();
    p.lse_token_stride = 1;
    p.lse_head_stride = tokens;
    p.lse_batch_stride = dense ? tokens * p.num_heads_q : 0;
  }
  Result result;
  if (const auto status = problem.launch("cpu-reference", 0)) {
    result.status = status;
    result.error = flashspark_last_error();
  } else {
    result = problem.result();
  }
  p = saved;
  if (p.output_scale != nullptr) {
    for (float &x : result.out) x /= *p.output_scale;
  }
  if (p.out.dtype == FLASHSPARK_FLOAT8_E4M3) {
    for (float &x : result.out) x = std::clamp(x, -448.0f, 448.0f);
  }
  return result;
}

// The bound. An implementation rounds to the out dtype once, which costs half a unit in the last place:
//
//   unit_roundoff * |ref| + half the smallest positive number.
//
// Before that it works in float32 (u = 2^-24). An error e in a score changes its probability by the factor 1 + e, so
// out, an average of v, moves by at most 2 e max|v| and lse by e. Scores are sums of products as large as |q| |k|,
// hence e is a small multiple of u |q| |k|: 4 u covers the worst seen with accumulation in any order. exp() is good to
// a few units and the sums over keys add rounding errors like a random walk: 4e-6 (67 u) with a slow growth in
// sqrt(keys). A key too many or too few in a row of n moves out by about |v| / n and lse by 1 / n: far outside for n <
// 10^5. Dropout multiplies what it keeps by 1 / (1 - dropout_p), and with it all that comes before the last rounding; a
// weight dropped or kept wrongly moves out by at least |v| / n, too.
//
// Tensor cores add products in groups and cut the sum off instead of rounding it, which costs several times more.
constexpr double kTensorCores = 4;

double roundoff(int32_t dtype) {
  switch (dtype) {
    case FLASHSPARK_FLOAT16:
      return 0x1p-11;
    case FLASHSPARK_BFLOAT16:
      return 0x1p-8;
    case FLASHSPARK_FLOAT8_E4M3:
      return 0x1p-4;
    default:
      return 0x1p-24;
  }
}

Bound error_bound(const Problem &problem, int64_t b, int64_t i, int64_t h) {
  constexpr double u = 0x1p-24;
  Bound bound;
  const int32_t dtype = problem.spec().out_dtype;
  bound.unit_roundoff = roundoff(dtype);
  bound.smallest_half = dtype == FLASHSPARK_FLOAT16       ? 0x1p-25
                        : dtype == FLASHSPARK_BFLOAT16    ? 0x1p-134
                        : dtype == FLASHSPARK_FLOAT8_E4M3 ? 0x1p-10
                                                          : 0x1p-150;
  const double keys = static_cast<double>(problem.seqlen_k(b));
  bound.relative = 4e-6 * (1 + std::sqrt(keys) / 64) + 4 * u * problem.score_scale(b, i, h);
  bound.value_scale = problem.value_scale(b, h / (problem.spec().heads_q / problem.spec().heads_kv)) /
                      (1 - double{problem.spec().dropout});
  return bound;
}

double Bound::out(double ref, double magnitude) const {
  const double before_rounding = relative * value_scale + probability * magnitude;
  return unit_roundoff * (std::fabs(ref) + before_rounding) + smallest_half + before_rounding;
}

double Bound::lse(double ref) const {
  return relative + 0x1p-23 * std::fabs(ref);
}

std::vector<float> magnitudes(const Problem &problem) {
  Problem positive(problem.spec());
  for (int64_t b = 0; b < problem.params.num_seqs; ++b) {
    for (int64_t j = 0; j < problem.seqlen_k(b); ++j) {
      for (int64_t h = 0; h < problem.spec().heads_kv; ++h) {
        for (int64_t d = 0; d < problem.spec().head_dim_v; ++d)
          positive.set(Role::kV, b, j, h, d, std::fabs(problem.get(Role::kV, b, j, h, d)));
      }
    }
  }
  return reference(positive).out;
}

Comparison compare(const Problem &problem, const Result &got, const Result &expected,
                   const std::vector<float> *magnitudes) {
  Comparison c;
  c.untouched = problem.untouched();
  c.nonfinite_match = got.status == FLASHSPARK_OK && expected.status == FLASHSPARK_OK &&
                      got.out.size() == expected.out.size() &&
                      (got.lse.empty() || got.lse.size() == expected.lse.size());
  if (!c.nonfinite_match) return c;
  const int64_t heads = problem.spec().heads_q, width = problem.spec().head_dim_v;
  double squares = 0, lse_squares = 0, worst = -1, worst_lse = -1;
  for (int64_t b = 0; b < problem.params.num_seqs; ++b) {
    for (int64_t i = 0; i < problem.seqlen_q(b); ++i) {
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t row = (problem.row_begin(b) + i) * heads + h;
        Bound bound = error_bound(problem, b, i, h);
        if (magnitudes != nullptr) {
          bound.probability = roundoff(problem.spec().kv_dtype);
          bound.relative *= kTensorCores;
        }
        for (int64_t d = 0; d < width; ++d) {
          const double ref = expected.out[row * width + d], x = got.out[row * width + d];
          // The oracle never gives NaN or infinity: if it does, it has read padding.
          if (!std::isfinite(ref) || !std::isfinite(x)) {
            c.nonfinite_match = false;
            continue;
          }
          const double error = std::fabs(x - ref);
          const double limit = bound.out(ref, magnitudes != nullptr ? (*magnitudes)[row * width + d] : 0);
          c.max_error = std::max(c.max_error, error);
          squares += error * error;
          if (error / limit > worst) worst = error / limit, c.bound = limit;
        }
        if (got.lse.empty()) continue;
        const double ref = expected.lse[row], x = got.lse[row];
        if (!std::isfinite(ref) || !std::isfinite(x)) {
          c.nonfinite_match &= ref == x && ref < 0;  // only -inf has a meaning
          continue;
        }
        const double error = std::fabs(x - ref), limit = bound.lse(ref);
        c.lse_max_error = std::max(c.lse_max_error, error);
        lse_squares += error * error;
        if (error / limit > worst_lse) worst_lse = error / limit, c.lse_bound = limit;
      }
    }
  }
  c.ratio = std::max({0.0, worst, worst_lse});
  if (!got.out.empty()) c.rms_error = std::sqrt(squares / static_cast<double>(got.out.size()));
  if (!got.lse.empty()) c.lse_rms_error = std::sqrt(lse_squares / static_cast<double>(got.lse.size()));
  return c;
}

}  // namespace flashspark::cases
