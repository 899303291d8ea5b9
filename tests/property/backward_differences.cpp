// The oracle's gradients against differences of its own forward pass: the loss sum(out dout) + sum(lse dlse) at inputs
// a little larger and a little smaller.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cases/backward.hpp"
#include "cases/random.hpp"
#include "problem.hpp"
#include "support/functions.hpp"

namespace flashspark::cases {
namespace {

// score + table[b, kv_idx] tanh(slope[h] score)
constexpr const char *kScoreMod =
    "flashspark-graph 1\nscore\nb\nh\nkv_idx\nload 0 f32 1 2\nload 1 f32 2 1 3\nmul 0 4\ntanh 6\nmul 5 7\nadd 0 8\n"
    "return 9\n";
// (q_idx + 3 kv_idx) % 4 != 0
constexpr const char *kMaskMod =
    "flashspark-graph 1\nq_idx\nkv_idx\nconst i32 3\nmul 1 2\nadd 0 3\nconst i32 4\nmod 4 5\nconst i32 0\nne 6 7\n"
    "return 8\n";

constexpr int64_t kKeys = 40;  // at most

// A problem in float32, with the functions and lists that it may have.
class Probe {
 public:
  explicit Probe(const Case &spec) : problem(spec) {}
  ~Probe() {
    flashspark_mod_release(score_mod_);
    flashspark_mod_release(mask_mod_);
  }

  void add_score_mod() {
    ASSERT_EQ(flashspark_score_mod_create(kScoreMod, &score_mod_), FLASHSPARK_OK) << flashspark_last_error();
    Random random(5, 'f');
    slope.resize(static_cast<size_t>(problem.forward.spec().heads_q));
    table.resize(problem.forward.spec().lens.size() * kKeys);
    for (std::vector<float> *values : {&slope, &table}) {
      for (float &x : *values) x = static_cast<float>(random.normal());
    }
    const auto batch = static_cast<int64_t>(problem.forward.spec().lens.size());
    captured_[0] = {slope.data(), FLASHSPARK_FLOAT32, 1, {static_cast<int64_t>(slope.size())}, {1}};
    captured_[1] = {table.data(), FLASHSPARK_FLOAT32, 2, {batch, kKeys}, {kKeys, 1}};
    problem.forward.params.score_mod = {score_mod_, captured_, nullptr, 2, 0};
    dslope.assign(slope.size(), NAN);
    dtable.assign(table.size(), NAN);
    gradients_[0] = {dslope.data(), {1}};
    gradients_[1] = {dtable.data(), {1, batch}};  // transposed
    problem.params.dtensors = gradients_;
  }
  void add_mask_mod() {
    ASSERT_EQ(flashspark_mask_mod_create(kMaskMod, &mask_mod_), FLASHSPARK_OK) << flashspark_last_error();
    problem.forward.params.mask_mod = {mask_mod_, nullptr, nullptr, 0, 0};
  }
  void add_lists() {
    lists_ =
        std::make_unique<test::BlockLists>(problem.forward.params, test::BlockListWish{.size_q = 16, .size_k = 16}, 7);
    lists_->give(problem.forward.params);
  }

  // Runs the forward pass; the loss.
  double loss() {
    Problem &f = problem.forward;
    EXPECT_EQ(f.launch("cpu-reference", 1), FLASHSPARK_OK) << flashspark_last_error();
    double sum = 0;
    for (int64_t b = 0; b < f.params.num_seqs; ++b) {
      const Sequence s = sequence(f.params, b);
      for (int64_t i = 0; i < f.seqlen_q(b); ++i) {
        for (int64_t h = 0; h < f.spec().heads_q; ++h) {
          const float *dout =
              static_cast<float *>(problem.params.dout.data) + q_offset(f.params, f.params.out, s, i, h);
          for (int64_t d = 0; d < f.spec().head_dim_v; ++d) sum += double{dout[d]} * f.get(Role::kOut, b, i, h, d);
          const int64_t at = lse_offset(f.params, s, i, h);
          if (std::isfinite(f.params.lse[at])) sum += double{problem.params.dlse[at]} * f.params.lse[at];
        }
      }
    }
    return sum;
  }

  // The derivative of the loss by x, from four losses: what is left of the Taylor series begins with the fifth power.
  double difference(float &x, float smallest_step) {
    const float before = x;
    const auto slope_of = [&](float step) {
      x = before + step;
      const double above = loss();
      x = before - step;
      const double below = loss();
      x = before;
      return (above - below) / (2 * double{step});
    };
    const double near = slope_of(smallest_step), far = slope_of(2 * smallest_step);
    return near + (near - far) / 3;
  }

  Gradients gradients() {
    loss();  // out and lse
    problem.params.forward = problem.forward.params;
    return problem.run("cpu-reference", 1);
  }

  BackwardProblem problem;
  std::vector<float> slope, table, dslope, dtable;

 private:
  flashspark_mod *score_mod_ = nullptr, *mask_mod_ = nullptr;
  flashspark_captured_tensor captured_[2] = {};
  flashspark_captured_gradient gradients_[2] = {};
  std::unique_ptr<test::BlockLists> lists_;
};

// Up to forty elements of `gradient`, element n of which belongs to the input at(n). float32 results leave some 1e-5 of
// the largest in a difference.
void expect_differences(Probe &probe, const char *name, const std::vector<float> &gradient,
                        const std::function<float &(size_t)> &at, float smallest_step = 0x1p-6f) {
  ASSERT_FALSE(gradient.empty()) << name;
  double largest = 1;
  for (const float x : gradient) largest = std::max(largest, std::fabs(double{x}));
  const size_t step = std::max<size_t>(gradient.size() / 37, 1);
  for (size_t n = 0; n < gradient.size(); n += step)
    EXPECT_NEAR(gradient[n], probe.difference(at(n), smallest_step), 2e-4 * largest) << name << "[" << n << "]";
}

Case base() {
  Case c;
  c.name = "differences";
  c.lens = {{6, 11}, {9, 38}, {3, 1}};
  c.heads_q = 4, c.heads_kv = 2, c.head_dim = 16, c.head_dim_v = 8;
  c.q_dtype = c.kv_dtype = c.out_dtype = FLASHSPARK_FLOAT32;
  return c;
}

struct Form {
  const char *name;
  std::function<void(Case &)> change;
  std::function<void(Probe &)> give;
};
void PrintTo(const Form &form, std::ostream *os) {
  *os << form.name;
}

class BackwardDifferences : public testing::TestWithParam<Form> {};

TEST_P(BackwardDifferences, AreTheOraclesGradients) {
  Case spec = base();
  GetParam().change(spec);
  Probe probe(spec);
  GetParam().give(probe);
  const Gradients g = probe.gradients();
  ASSERT_EQ(g.status, FLASHSPARK_OK) << g.error;
  EXPECT_EQ(g.trespass, "");
  flashspark_attention_params &f = probe.problem.forward.params;
  // Element n of the gradient, which lists the rows of all sequences, is the input's at the same place.
  const auto element = [&](const flashspark_tensor &t, bool of_queries, int64_t heads, int64_t width) {
    return [&f, &t, of_queries, heads, width](size_t n) -> float & {
      auto row = static_cast<int64_t>(n) / (heads * width);
      for (int64_t b = 0;; ++b) {
        const Sequence s = sequence(f, b);
        const int64_t rows = of_queries ? s.seqlen_q : s.seqlen_k, h = static_cast<int64_t>(n) / width % heads;
        if (row >= rows) {
          row -= rows;
          continue;
        }
        const int64_t at = of_queries ? q_offset(f, t, s, row, h) : kv_offset(f, t, s, row, h);
        return static_cast<float *>(t.data)[at + static_cast<int64_t>(n) % width];
      }
    };
  };
  expect_differences(probe, "dq", g.dq, element(f.q, true, f.num_heads_q, f.head_dim));
  expect_differences(probe, "dk", g.dk, element(f.k, false, f.num_heads_kv, f.head_dim));
  expect_differences(probe, "dv", g.dv, element(f.v, false, f.num_heads_kv, f.head_dim_v));
  const auto flat = [](const void *data) {
    return [data](size_t n) -> float & { return static_cast<float *>(const_cast<void *>(data))[n]; };
  };
  if (f.sinks != nullptr) expect_differences(probe, "dsinks", g.dsinks, flat(f.sinks));
  // A slope is multiplied with distances, up to 37.
  if (f.alibi_slopes != nullptr) expect_differences(probe, "dalibi_slopes", g.dalibi, flat(f.alibi_slopes), 0x1p-9f);
  if (f.rel_logits != nullptr) {
    ASSERT_EQ(f.rel_token_stride, f.num_heads_q * f.rel_extent);
    expect_differences(probe, "drel_logits", g.drel, flat(f.rel_logits));
  }
  if (f.score_mod.mod == nullptr) return;
  expect_differences(probe, "slope", probe.dslope, [&](size_t n) -> float & { return probe.slope[n]; });
  const auto batch = static_cast<size_t>(f.num_seqs);
  expect_differences(probe, "table", probe.dtable,
                     [&](size_t n) -> float & { return probe.table[n % batch * kKeys + n / batch]; });
}

const auto kNothing = [](Probe &) {};
const Form kForms[] = {
    {"plain", [](Case &) {}, kNothing},
    {"multi_head", [](Case &c) { c.heads_kv = 4; }, kNothing},
    {"multi_query_dense", [](Case &c) { c.heads_kv = 1, c.q_layout = c.kv_layout = Layout::kDense; }, kNothing},
    {"causal", [](Case &c) { c.causal = true; }, kNothing},
    {"window", [](Case &c) { c.window_left = 5, c.window_right = 3; }, kNothing},
    {"chunk", [](Case &c) { c.attention_chunk = 7; }, kNothing},
    {"softcap", [](Case &c) { c.softcap = 1.5f; }, kNothing},
    {"sinks", [](Case &c) { c.causal = c.sinks = true; }, kNothing},
    {"alibi", [](Case &c) { c.alibi = true; }, kNothing},
    {"alibi_per_batch", [](Case &c) { c.alibi = c.alibi_per_batch = true; }, kNothing},
    {"relative_bias", [](Case &c) { c.rel_extent = 6, c.rel_dtype = FLASHSPARK_FLOAT32; }, kNothing},
    {"prefix", [](Case &c) { c.causal = true, c.prefix_mode = FLASHSPARK_PREFIX_PER_SEQ; }, kNothing},
    {"prefix_per_token", [](Case &c) { c.causal = true, c.prefix_mode = FLASHSPARK_PREFIX_PER_TOKEN; }, kNothing},
    {"rswa", [](Case &c) { c.causal = true, c.rswa_window = 4; }, kNothing},
    {"dropout", [](Case &c) { c.dropout = 0.4f; }, kNothing},
    {"unused_rows", [](Case &c) { c.seqused_q = c.seqused_k = true; }, kNothing},
    {"strided_packed", [](Case &c) { c.strided = c.packed_kv = true; }, kNothing},
    {"score_mod", [](Case &) {}, [](Probe &p) { p.add_score_mod(); }},
    {"mask_mod", [](Case &) {}, [](Probe &p) { p.add_mask_mod(); }},
    {"lists", [](Case &c) { c.causal = true; },
     [](Probe &p) {
       p.add_mask_mod();
       p.add_lists();
     }},
    {"all_of_it",
     [](Case &c) {
       c.causal = c.sinks = c.alibi = true, c.softcap = 2, c.dropout = 0.2f, c.rel_extent = 9;
       c.rel_dtype = FLASHSPARK_FLOAT32, c.window_left = 20;
     },
     [](Probe &p) {
       p.add_score_mod();
       p.add_mask_mod();
       p.add_lists();
     }},
};

INSTANTIATE_TEST_SUITE_P(Forms, BackwardDifferences, testing::ValuesIn(kForms),
                         [](const auto &info) { return std::string(info.param.name); });

}  // namespace
}  // namespace flashspark::cases
