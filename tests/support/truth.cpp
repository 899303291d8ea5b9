// The formula and the comparison. Uses nothing from src/ but the number formats, which dtype_test.cpp verifies.
#include <cmath>
#include <limits>

#include "dtype.hpp"
#include "support/model.hpp"

namespace flashspark::test {
namespace {

using Real = long double;
constexpr Real kInf = std::numeric_limits<Real>::infinity();

bool in_range(const std::array<int32_t, 2> &range, int64_t x) {
  return range[0] <= x && x <= range[1];
}

bool visible(const Problem &p, const Sequence &s, int64_t i, int64_t j) {
  const int64_t pos = s.pos(i);
  if (p.rswa_window > 0) {
    if (j > pos) return false;
    return j < s.rswa_prefix || pos - j < p.rswa_window;
  }
  bool keep = true;
  if (s.causal && j > pos) keep = false;
  if (p.window_left != -1 && pos - j > p.window_left) keep = false;
  if (p.window_right != -1 && j - pos > p.window_right) keep = false;
  if (p.attention_chunk != 0) {
    const Real size = p.attention_chunk;
    if (std::floor(j / size) != std::floor(pos / size)) keep = false;
  }
  if (p.prefix_mode != FLASHSPARK_PREFIX_NONE) {
    for (const auto &range : s.ranges) {
      if (!in_range(range, pos) || !in_range(range, j)) continue;
      if (p.prefix_clamp && p.window_left != -1 && pos - j > p.window_left) continue;
      keep = true;
    }
  }
  return keep;
}

using Words = std::array<uint32_t, 4>;

// Philox4x32-10, from the paper: a Feistel network on two pairs, whose keys grow by Weyl's sequences.
Words philox(Words x, uint32_t key0, uint32_t key1) {
  for (uint32_t round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{x[0]} * 3528531795u, b = uint64_t{x[2]} * 3449720151u;
    const auto low = [](uint64_t product) { return static_cast<uint32_t>(product & 0xffffffff); };
    const uint32_t k0 = key0 + round * 2654435769u, k1 = key1 + round * 3144134277u;
    x = {low(b >> 32) ^ x[1] ^ k0, low(b), low(a >> 32) ^ x[3] ^ k1, low(a)};
  }
  return x;
}

// docs/design/dropout.md; j counts left padding.
bool dropped(const Problem &p, int64_t b, int64_t h, int64_t i, int64_t j) {
  if (p.dropout == 0) return false;
  const auto word = [](uint64_t x) { return static_cast<uint32_t>(x); };
  const Words key = philox({word(p.dropout_offset), word(p.dropout_offset >> 32), 0, 0}, word(p.dropout_seed),
                           word(p.dropout_seed >> 32));
  const int64_t number = j / 64 * 4 + j % 8 / 2;
  const Words draws = philox({word(number), word(i), word(h), word(b)}, key[0], key[1]);
  const uint64_t mine = draws[j / 16 % 4], twice = mine << 32 | mine;
  const int64_t first_bit = 16 * (j % 2) + 8 * (j / 8 % 2);
  const auto drawn = static_cast<Real>((twice >> first_bit) % 32768);
  const Real dropped = std::fmin(std::round(Real{p.dropout} * 32768), Real{32767});
  return dropped <= 16384 ? drawn < dropped : drawn >= 32768 - dropped;
}

Real factor(const std::vector<float> &scale, int64_t head, int32_t dtype) {
  return scale.empty() || dtype != FLASHSPARK_FLOAT8_E4M3 ? 1 : scale[head];
}

// Error that rounding to the output format can add to a value of this size.
double format_error(int32_t dtype, double value) {
  const double x = std::fabs(value) * 1.001;
  switch (dtype) {
    case FLASHSPARK_FLOAT32:
      return std::ldexp(x, -24) + std::ldexp(1.0, -150);
    case FLASHSPARK_FLOAT16:
      return std::ldexp(x, -11) + std::ldexp(1.0, -25);
    case FLASHSPARK_BFLOAT16:
      return std::ldexp(x, -8) + std::ldexp(1.0, -134);
    default:
      return std::ldexp(x, -4) + std::ldexp(1.0, -10);
  }
}

}  // namespace

Truth truth(const Problem &p, const Sequence &s, int64_t b, int64_t leftpad) {
  const int64_t group = p.hq / p.hkv;
  Truth t;
  t.out.assign(s.tq * p.hq * p.dv, 0);
  t.lse.assign(s.tq * p.hq, -kInf);
  t.reach.assign(s.tq * p.hq, 0);
  t.strain.assign(s.tq * p.hq, 0);
  for (int64_t i = 0; i < s.tq; ++i) {
    for (int64_t h = 0; h < p.hq; ++h) {
      const int64_t g = h / group;
      const int64_t row = i * p.hq + h;
      const Real scale = Real{p.scale} * factor(s.q_scale, g, p.q_dtype) * factor(s.k_scale, g, p.kv_dtype);
      const Real v_factor =
          factor(s.v_scale, g, p.kv_dtype) / (p.output_scale ? Real{*p.output_scale} : 1) / (1 - Real{p.dropout});
      std::vector<Real> scores(s.tk, -kInf);
      Real top = p.sinks.empty() ? -kInf : Real{p.sinks[h]};
      for (int64_t j = 0; j < s.tk; ++j) {
        if (!visible(p, s, i, j)) continue;
        Real dot = 0, absolute = 0;
        for (int64_t c = 0; c < p.d; ++c) {
          const Real product = Real{s.q[row * p.d + c]} * Real{s.k[(j * p.hkv + g) * p.d + c]};
          dot += product;
          absolute += std::fabs(product);
        }
        Real score = dot * scale;
        if (p.softcap != 0) score = p.softcap * std::tanh(score / p.softcap);
        const int64_t distance = s.pos(i) - j;
        Real bias = 0;
        if (distance >= 0 && distance < p.rel_extent) bias += s.rel[row * p.rel_extent + distance];
        if (!s.alibi.empty()) bias -= Real{s.alibi[h]} * std::abs(distance);
        scores[j] = score + bias;
        top = std::max(top, scores[j]);
        t.strain[row] = std::max(t.strain[row], static_cast<double>(absolute * scale + std::fabs(bias)));
      }
      if (top == -kInf) continue;  // a row that sees no key
      Real total = p.sinks.empty() ? 0 : std::exp(Real{p.sinks[h]} - top);
      for (int64_t j = 0; j < s.tk; ++j) total += std::exp(scores[j] - top);
      t.lse[row] = top + std::log(total);
      for (int64_t j = 0; j < s.tk; ++j) {
        if (scores[j] == -kInf) continue;
        const Real weight = dropped(p, b, h, i, leftpad + j) ? 0 : std::exp(scores[j] - top) / total;
        for (int64_t c = 0; c < p.dv; ++c) {
          const Real value = s.v[(j * p.hkv + g) * p.dv + c] * v_factor;
          t.out[row * p.dv + c] += weight * value;
          t.reach[row] = std::max(t.reach[row], static_cast<double>(std::fabs(value)));
        }
      }
      if (p.out_dtype == FLASHSPARK_FLOAT8_E4M3) {
        for (int64_t c = 0; c < p.dv; ++c) {
          t.out[row * p.dv + c] = std::fmin(std::fmax(t.out[row * p.dv + c], Real{-448}), Real{448});
        }
      }
    }
  }
  return t;
}

namespace {

struct Bound {
  double out, lse;
};

// Single-precision bound. A sum of d products rounds d times, each time by up to 2^-24 of the sum so far: a random walk
// that stays within 2 sqrt(d) units in all but about one of a thousand cases (3.5 sigma; worst if the first product is
// the largest, as in peaked data). Scaling and the conversion to base 2 and back add two more. A score is off by that
// fraction of its strain, which changes every weight by the same amount; the exponential and the sums add a few units.
Bound arithmetic_bound(const Problem &p, const Truth &t, int64_t row) {
  const double score_error = std::ldexp((2 + 2 * std::sqrt(double(p.d))) * t.strain[row] + 16, -24);
  return {t.reach[row] * 2 * score_error, score_error};
}

std::string describe(const char *what, size_t b, int64_t i, int64_t h, int64_t c, double got, double want,
                     double bound) {
  return std::string(what) + "[b=" + std::to_string(b) + " i=" + std::to_string(i) + " h=" + std::to_string(h) +
         " c=" + std::to_string(c) + "] = " + std::to_string(got) + ", expected " + std::to_string(want) + ", error " +
         std::to_string(std::fabs(got - want) / bound) + " x the bound " + std::to_string(bound * 1e6) + "e-6";
}

// Equal infinities compare equal; NaN never does.
bool within(double got, double want, double bound) {
  return got == want || std::fabs(got - want) <= bound;
}

std::string check_status(const Problem &p, const Result &r) {
  if (r.status != FLASHSPARK_OK) return "status " + std::to_string(r.status) + ": " + r.error;
  if (!r.trespass.empty()) return r.trespass;
  if (r.seqs.size() != p.seqs.size()) return "not every sequence was computed";
  return "";
}

}  // namespace

std::string difference(const Problem &p, const Result &result, bool exact) {
  if (std::string bad = check_status(p, result); !bad.empty()) return bad;
  for (size_t b = 0; b < p.seqs.size(); ++b) {
    const Truth t = truth(p, p.seqs[b], static_cast<int64_t>(b), result.leftpad);
    const Rows &rows = result.seqs[b];
    for (int64_t row = 0; row < p.seqs[b].tq * p.hq; ++row) {
      const Bound bound =
          exact ? Bound{1e-13 * t.reach[row], 1e-13 * (1 + t.strain[row])} : arithmetic_bound(p, t, row);
      for (int64_t c = 0; c < p.dv; ++c) {
        const double want = static_cast<double>(t.out[row * p.dv + c]);
        const double allowed = bound.out * 1.02 + format_error(p.out_dtype, want);
        const double got = rows.out[row * p.dv + c];
        if (!within(got, want, allowed)) return describe("out", b, row / p.hq, row % p.hq, c, got, want, allowed);
      }
      if (rows.lse.empty()) continue;
      const double want = static_cast<double>(t.lse[row]);
      const double allowed = bound.lse + format_error(FLASHSPARK_FLOAT32, std::isinf(want) ? 0 : want);
      if (!within(rows.lse[row], want, allowed)) {
        return describe("lse", b, row / p.hq, row % p.hq, 0, rows.lse[row], want, allowed);
      }
    }
  }
  return "";
}

std::string difference(const Problem &p, const Result &a, const Result &b) {
  if (std::string bad = check_status(p, a); !bad.empty()) return bad;
  if (std::string bad = check_status(p, b); !bad.empty()) return bad;
  for (size_t n = 0; n < p.seqs.size(); ++n) {
    const Truth t = truth(p, p.seqs[n], static_cast<int64_t>(n), a.leftpad);
    for (int64_t row = 0; row < p.seqs[n].tq * p.hq; ++row) {
      const Bound bound = arithmetic_bound(p, t, row);
      for (int64_t c = 0; c < p.dv; ++c) {
        const double x = a.seqs[n].out[row * p.dv + c], y = b.seqs[n].out[row * p.dv + c];
        const double allowed = 2 * bound.out + 2 * format_error(p.out_dtype, x);
        if (!within(x, y, allowed)) return describe("out", n, row / p.hq, row % p.hq, c, x, y, allowed);
      }
      if (a.seqs[n].lse.empty() || b.seqs[n].lse.empty()) continue;
      const double x = a.seqs[n].lse[row], y = b.seqs[n].lse[row];
      const double allowed = 2 * bound.lse + 2 * format_error(FLASHSPARK_FLOAT32, std::isinf(x) ? 0 : x);
      if (!within(x, y, allowed)) return describe("lse", n, row / p.hq, row % p.hq, 0, x, y, allowed);
    }
  }
  return "";
}

float rounded(float x, int32_t dtype) {
  switch (dtype) {
    case FLASHSPARK_FLOAT16:
      return f16_to_float(float_to_f16(x));
    case FLASHSPARK_BFLOAT16:
      return bf16_to_float(float_to_bf16(x));
    case FLASHSPARK_FLOAT8_E4M3:
      return e4m3_to_float(float_to_e4m3(x));
    default:
      return x;
  }
}

std::vector<float> normal(std::mt19937_64 &rng, int64_t count, int32_t dtype, float spread) {
  std::normal_distribution<float> draw(0, spread);
  std::vector<float> values(count);
  for (float &x : values) x = rounded(draw(rng), dtype);
  return values;
}

Sequence random_sequence(std::mt19937_64 &rng, const Problem &p, int64_t tq, int64_t tk) {
  Sequence s;
  s.tq = tq;
  s.tk = tk;
  s.q = normal(rng, tq * p.hq * p.d, p.q_dtype);
  s.k = normal(rng, tk * p.hkv * p.d, p.kv_dtype);
  s.v = normal(rng, tk * p.hkv * p.dv, p.kv_dtype);
  if (p.rel_extent > 0) s.rel = normal(rng, tq * p.hq * p.rel_extent, p.rel_dtype);
  return s;
}

}  // namespace flashspark::test
