// flashspark.hpp: extents and defaults reach the C struct, results come back as values.
#include "flashspark/flashspark.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace flashspark {
namespace {

TEST(CppFace, DenseProblemInFourLines) {
  // One head of width 8, one query (ln 2, 0, ..), keys (0, ..) and (1, 0, ..): with scale 1 the weights are 1 : 2.
  std::vector<float> q(8), k(16), v(16), out(8);
  q[0] = std::log(2.0f);
  k[8] = 1;
  v[0] = 3;
  v[8] = 9;
  Attention attention;
  attention.q = dense(q.data(), 1, 1, 1, 8);
  attention.k = dense(k.data(), 1, 2, 1, 8);
  attention.v = dense(v.data(), 1, 2, 1, 8);
  attention.out = dense(out.data(), 1, 1, 1, 8);
  attention.params.softmax_scale = 1;
  const Result result = attention.forward();
  ASSERT_TRUE(result) << result.error();
  EXPECT_NEAR(out[0], 7, 1e-5);
  EXPECT_NE(attention.explain().find("cpu-engine"), std::string::npos);
}

// The same problem: p = (1/3, 2/3), out = 7, so dv = p dout and ds = p (v dout - out dout) = (-4/3, 4/3) for dout = 1.
TEST(CppFace, GradientsInFourLinesMore) {
  std::vector<float> q(8), k(16), v(16), out(8), lse(1), dout(8), dq(8), dk(16), dv(16);
  q[0] = std::log(2.0f);
  k[8] = 1;
  v[0] = 3;
  v[8] = 9;
  dout[0] = 1;
  Attention attention;
  attention.q = dense(q.data(), 1, 1, 1, 8);
  attention.k = dense(k.data(), 1, 2, 1, 8);
  attention.v = dense(v.data(), 1, 2, 1, 8);
  attention.out = dense(out.data(), 1, 1, 1, 8);
  attention.params.softmax_scale = 1;
  attention.params.lse = lse.data();
  attention.params.lse_head_stride = attention.params.lse_token_stride = 1;
  ASSERT_TRUE(attention.forward());
  AttentionBackward gradients(attention);
  gradients.dout = dense(dout.data(), 1, 1, 1, 8);
  gradients.dq = dense(dq.data(), 1, 1, 1, 8);
  gradients.dk = dense(dk.data(), 1, 2, 1, 8);
  gradients.dv = dense(dv.data(), 1, 2, 1, 8);
  const Result result = gradients.backward();
  ASSERT_TRUE(result) << result.error();
  EXPECT_NEAR(dv[0], 1.0 / 3, 1e-6);
  EXPECT_NEAR(dv[8], 2.0 / 3, 1e-6);
  EXPECT_NEAR(dk[0], -4.0 / 3 * q[0], 1e-5);
  EXPECT_NEAR(dk[8], 4.0 / 3 * q[0], 1e-5);
  EXPECT_NEAR(dq[0], 4.0 / 3, 1e-5);
  EXPECT_EQ(dq[1], 0);
  EXPECT_NE(gradients.explain().find("problem: gradients"), std::string::npos) << gradients.explain();
}

TEST(CppFace, TheDefaultScaleIsOneOverRootD) {
  std::vector<bfloat16> q(2 * 3 * 4 * 64);
  Attention attention;
  attention.q = dense(q.data(), 2, 3, 4, 64);
  const flashspark_attention_params p = attention.filled();
  EXPECT_EQ(p.softmax_scale, 0.125f);
  EXPECT_EQ(p.num_seqs, 2);
  EXPECT_EQ(p.max_seqlen_q, 3);
  EXPECT_EQ(p.num_heads_q, 4);
  EXPECT_EQ(p.q.dtype, FLASHSPARK_BFLOAT16);
  EXPECT_EQ(p.q.batch_stride, 3 * 4 * 64);
}

TEST(CppFace, ErrorsArriveAsText) {
  std::vector<float> data(64);
  Attention attention;
  attention.q = attention.k = attention.v = attention.out = dense(data.data(), 1, 1, 1, 12);
  const Result result = attention.forward();
  EXPECT_FALSE(result);
  EXPECT_EQ(result.status(), FLASHSPARK_INVALID_ARGUMENT);
  EXPECT_NE(result.error().find("head_dim = 12"), std::string::npos) << result.error();
  EXPECT_NE(attention.explain().find("head_dim = 12"), std::string::npos) << attention.explain();
}

TEST(CppFace, TypesMapToDtypes) {
  EXPECT_EQ(dtype_of<float>(), FLASHSPARK_FLOAT32);
  EXPECT_EQ(dtype_of<const float16>(), FLASHSPARK_FLOAT16);
  EXPECT_EQ(dtype_of<bfloat16>(), FLASHSPARK_BFLOAT16);
  EXPECT_EQ(dtype_of<const float8_e4m3>(), FLASHSPARK_FLOAT8_E4M3);
}

}  // namespace
}  // namespace flashspark
