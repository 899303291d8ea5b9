// Offsets beyond 2^31 elements: memory is reserved, not used, so only the touched pages cost anything.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <random>

#include "support/model.hpp"

namespace flashspark::test {
namespace {

class Reserved {
 public:
  explicit Reserved(size_t bytes)
      : size_(bytes),
        data_(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {}
  ~Reserved() {
    if (*this) munmap(data_, size_);
  }
  Reserved(const Reserved &) = delete;
  explicit operator bool() const { return data_ != MAP_FAILED; }
  float *floats() const { return static_cast<float *>(data_); }

 private:
  size_t size_;
  void *data_;
};

constexpr int64_t kFar = (int64_t{1} << 31) + 64;  // elements between neighbours
constexpr int64_t kD = 16;

class BigStride : public testing::TestWithParam<const char *> {};

// Two sequences, two heads; the stride of one dimension at a time is beyond 2^31.
TEST_P(BigStride, EveryDimensionUses64BitOffsets) {
  std::mt19937_64 rng(2);
  Problem problem;
  problem.hq = problem.hkv = 2;
  problem.d = problem.dv = kD;
  for (int b = 0; b < 2; ++b) problem.seqs.push_back(random_sequence(rng, problem, 2, 2));
  const Result expected = run(problem, {.implementation = "cpu-reference"});
  const Reserved q(4 * (2 * kFar)), k(4 * (2 * kFar)), v(4 * (2 * kFar)), out(4 * (2 * kFar));
  if (!q || !k || !v || !out) GTEST_SKIP() << "no 64 GiB of address space to reserve";

  for (int far = 0; far < 3; ++far) {
    const int64_t strides[3][3] = {{kFar, 2 * kD, kD}, {2 * kD, kFar, kD}, {2 * kD, kD, kFar}};
    const auto [batch, token, head] = std::tuple(strides[far][0], strides[far][1], strides[far][2]);
    flashspark_attention_params p;
    flashspark_attention_params_init(&p);
    p.implementation = GetParam();
    p.num_seqs = p.num_heads_q = p.num_heads_kv = p.max_seqlen_q = p.max_seqlen_k = 2;
    p.head_dim = p.head_dim_v = kD;
    p.q = {q.floats(), batch, token, head, FLASHSPARK_FLOAT32, 0};
    p.k = {k.floats(), batch, token, head, FLASHSPARK_FLOAT32, 0};
    p.v = {v.floats(), batch, token, head, FLASHSPARK_FLOAT32, 0};
    p.out = {out.floats(), batch, token, head, FLASHSPARK_FLOAT32, 0};
    const auto at = [&](int64_t b, int64_t t, int64_t h) { return b * batch + t * token + h * head; };
    const auto each = [&](auto &&visit) {
      for (int64_t b = 0; b < 2; ++b)
        for (int64_t t = 0; t < 2; ++t)
          for (int64_t h = 0; h < 2; ++h)
            for (int64_t c = 0; c < kD; ++c) visit(b, at(b, t, h) + c, (t * 2 + h) * kD + c);
    };
    each([&](int64_t b, int64_t to, int64_t from) {
      q.floats()[to] = problem.seqs[b].q[from];
      k.floats()[to] = problem.seqs[b].k[from];
      v.floats()[to] = problem.seqs[b].v[from];
      out.floats()[to] = -1;
    });
    ASSERT_EQ(flashspark_attention_forward(&p), FLASHSPARK_OK) << flashspark_last_error();
    each([&](int64_t b, int64_t to, int64_t from) {
      ASSERT_NEAR(out.floats()[to], expected.seqs[b].out[from], 1e-5) << "far dimension " << far;
    });
  }
}

// A page number times the page stride exceeds 2^31.
TEST_P(BigStride, PageArithmeticIs64Bit) {
  std::mt19937_64 rng(8);
  Problem problem;
  problem.d = problem.dv = kD;
  problem.seqs = {random_sequence(rng, problem, 1, 20)};
  const Result expected = run(problem, {.implementation = "cpu-reference"});
  constexpr int64_t kPages = 9'000'000;  // pages of 16 x 16 elements: 2.3e9
  const Reserved k(4 * kPages * 256), v(4 * kPages * 256);
  if (!k || !v) GTEST_SKIP() << "no 18 GiB of address space to reserve";
  const std::vector<int32_t> table = {8'999'999, 8'400'000}, used = {20};
  for (int64_t j = 0; j < 20; ++j) {
    const int64_t row = table[j / 16] * int64_t{256} + j % 16 * kD;
    std::copy_n(&problem.seqs[0].k[j * kD], kD, k.floats() + row);
    std::copy_n(&problem.seqs[0].v[j * kD], kD, v.floats() + row);
  }
  std::vector<float> out(kD);
  flashspark_attention_params p;
  flashspark_attention_params_init(&p);
  p.implementation = GetParam();
  p.num_seqs = p.num_heads_q = p.num_heads_kv = p.max_seqlen_q = 1;
  p.max_seqlen_k = 32;
  p.head_dim = p.head_dim_v = kD;
  p.num_pages = kPages;
  p.page_size = 16;
  p.num_page_slots = p.page_table_stride = 2;
  p.page_table = table.data();
  p.seqused_k = used.data();
  p.q = {problem.seqs[0].q.data(), kD, kD, kD, FLASHSPARK_FLOAT32, 0};
  p.k = {k.floats(), 256, kD, kD, FLASHSPARK_FLOAT32, 0};
  p.v = {v.floats(), 256, kD, kD, FLASHSPARK_FLOAT32, 0};
  p.out = {out.data(), kD, kD, kD, FLASHSPARK_FLOAT32, 0};
  ASSERT_EQ(flashspark_attention_forward(&p), FLASHSPARK_OK) << flashspark_last_error();
  for (int64_t c = 0; c < kD; ++c) ASSERT_NEAR(out[c], expected.seqs[0].out[c], 1e-5);
}

// A dimension of one row has a stride that means nothing: arrays come with any number there.
TEST(OneRow, StridesAreNeverUsed) {
  std::mt19937_64 rng(3);
  Problem problem;
  problem.d = problem.dv = kD;
  problem.seqs = {random_sequence(rng, problem, 1, 1)};
  const Sequence &s = problem.seqs[0];
  for (const char *implementation : {"cpu-reference", "cpu-engine"}) {
    for (const int64_t wild : {INT64_MAX, INT64_MIN, int64_t{0}, int64_t{-1}}) {
      std::vector<float> q = s.q, k = s.k, v = s.v, out(kD), lse(1);
      flashspark_attention_params p;
      flashspark_attention_params_init(&p);
      p.implementation = implementation;
      p.num_seqs = p.num_heads_q = p.num_heads_kv = p.max_seqlen_q = p.max_seqlen_k = 1;
      p.head_dim = p.head_dim_v = kD;
      p.q = {q.data(), wild, wild, wild, FLASHSPARK_FLOAT32, 0};
      p.k = {k.data(), wild, wild, wild, FLASHSPARK_FLOAT32, 0};
      p.v = {v.data(), wild, wild, wild, FLASHSPARK_FLOAT32, 0};
      p.out = {out.data(), wild, wild, wild, FLASHSPARK_FLOAT32, 0};
      p.lse = lse.data();
      p.lse_batch_stride = p.lse_head_stride = p.lse_token_stride = wild;
      ASSERT_EQ(flashspark_attention_forward(&p), FLASHSPARK_OK) << flashspark_last_error();
      EXPECT_EQ(out, s.v) << implementation << ", stride " << wild;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Implementations, BigStride, testing::Values("cpu-reference", "cpu-engine"),
                         [](const auto &info) { return std::string(info.param).substr(4); });

}  // namespace
}  // namespace flashspark::test
