// Causal attention with grouped heads through flashspark.hpp, checked against the formula written out below.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "flashspark/flashspark.hpp"

namespace {

constexpr int64_t kBatch = 2, kSeqlen = 100, kHeadsQ = 8, kHeadsKv = 2, kHeadDim = 64;

std::vector<float> random_tensor(std::mt19937 &rng, int64_t heads) {
  std::vector<float> values(kBatch * kSeqlen * heads * kHeadDim);
  std::normal_distribution<float> normal;
  for (float &value : values) value = normal(rng);
  return values;
}

// Row `i` of head `h` of sequence `b` in double precision: out = sum_j softmax_j(q . k_j / sqrt(D)) v_j, j <= i.
std::vector<double> one_row(const std::vector<float> &q, const std::vector<float> &k, const std::vector<float> &v,
                            int64_t b, int64_t i, int64_t h) {
  const int64_t kv_head = h / (kHeadsQ / kHeadsKv);
  const auto key_row = [&](int64_t j) { return ((b * kSeqlen + j) * kHeadsKv + kv_head) * kHeadDim; };
  const float *query = &q[((b * kSeqlen + i) * kHeadsQ + h) * kHeadDim];

  std::vector<double> scores(i + 1);
  double top = -std::numeric_limits<double>::infinity();
  for (int64_t j = 0; j <= i; ++j) {
    for (int64_t d = 0; d < kHeadDim; ++d) scores[j] += double{query[d]} * k[key_row(j) + d];
    scores[j] /= std::sqrt(double{kHeadDim});
    top = std::fmax(top, scores[j]);
  }
  std::vector<double> out(kHeadDim);
  double total = 0;
  for (int64_t j = 0; j <= i; ++j) {
    const double weight = std::exp(scores[j] - top);
    total += weight;
    for (int64_t d = 0; d < kHeadDim; ++d) out[d] += weight * v[key_row(j) + d];
  }
  for (double &value : out) value /= total;
  return out;
}

}  // namespace

int main() {
  std::mt19937 rng(1);
  const std::vector<float> q = random_tensor(rng, kHeadsQ), k = random_tensor(rng, kHeadsKv),
                           v = random_tensor(rng, kHeadsKv);
  std::vector<float> out(q.size(), std::numeric_limits<float>::quiet_NaN());

  flashspark::Attention attention;
  attention.q = flashspark::dense(q.data(), kBatch, kSeqlen, kHeadsQ, kHeadDim);
  attention.k = flashspark::dense(k.data(), kBatch, kSeqlen, kHeadsKv, kHeadDim);
  attention.v = flashspark::dense(v.data(), kBatch, kSeqlen, kHeadsKv, kHeadDim);
  attention.out = flashspark::dense(out.data(), kBatch, kSeqlen, kHeadsQ, kHeadDim);
  attention.params.causal = 1;
  if (const auto result = attention.forward(); !result) {
    std::fprintf(stderr, "%s\n", result.error().c_str());
    return 1;
  }

  double largest = 0;
  for (int64_t b = 0; b < kBatch; ++b) {
    for (int64_t i = 0; i < kSeqlen; ++i) {
      for (int64_t h = 0; h < kHeadsQ; ++h) {
        const std::vector<double> expected = one_row(q, k, v, b, i, h);
        const float *row = &out[((b * kSeqlen + i) * kHeadsQ + h) * kHeadDim];
        for (int64_t d = 0; d < kHeadDim; ++d) {
          const double error = std::fabs(row[d] - expected[d]);
          largest = std::isnan(error) ? std::numeric_limits<double>::infinity() : std::fmax(largest, error);
        }
      }
    }
  }
  std::printf("%s\n", attention.explain().c_str());
  std::printf("flashspark %s on %s, %d threads: largest error %.1e of %zu values\n", flashspark_version(),
              flashspark_cpu_target(), flashspark_cpu_threads(), largest, out.size());

  // What a mistake looks like: heads that do not divide.
  attention.k.heads = 3;
  const auto refused = attention.forward();
  std::printf("refused as it should be: %s\n", refused.error().c_str());
  return largest < 1e-5 && refused.status() == FLASHSPARK_INVALID_ARGUMENT ? 0 : 1;
}
