// How far 16-bit gradients are from those of double precision, beside what attention without a fused kernel gives.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "cases/backward.hpp"
#include "problem.hpp"

namespace flashspark::cases {
namespace {

using Matrix = std::vector<double>;  // row-major

double rounded(double x, int32_t dtype) {
  float value = 0;
  store(dtype, &value, 0, static_cast<float>(x));
  return load(dtype, &value, 0);
}

// a (rows, depth) times b (depth, columns), each as transposed as asked, rounded to dtype.
Matrix product(const Matrix &a, bool a_transposed, const Matrix &b, bool b_transposed, int64_t rows, int64_t depth,
               int64_t columns, double factor, int32_t dtype) {
  Matrix c(static_cast<size_t>(rows * columns));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      double sum = 0;
      for (int64_t n = 0; n < depth; ++n)
        sum += a[static_cast<size_t>(a_transposed ? n * rows + i : i * depth + n)] *
               b[static_cast<size_t>(b_transposed ? j * depth + n : n * columns + j)];
      c[static_cast<size_t>(i * columns + j)] = rounded(factor * sum, dtype);
    }
  }
  return c;
}

struct Three {
  Matrix dq, dk, dv;
};

// One head, operation by operation, each result rounded to dtype: what autograd makes of softmax(q k^T) v.
Three unfused(const Matrix &q, const Matrix &k, const Matrix &v, const Matrix &dout, int64_t s, int64_t d, bool causal,
              double scale, int32_t dtype) {
  Matrix p = product(q, false, k, true, s, d, s, scale, dtype);
  for (int64_t i = 0; i < s; ++i) {
    double *row = p.data() + i * s, largest = -INFINITY, sum = 0;
    const int64_t keys = causal ? i + 1 : s;
    for (int64_t j = 0; j < keys; ++j) largest = std::fmax(largest, row[j]);
    for (int64_t j = 0; j < s; ++j) sum += row[j] = j < keys ? std::exp(row[j] - largest) : 0;
    for (int64_t j = 0; j < s; ++j) row[j] = rounded(row[j] / sum, dtype);
  }
  Matrix ds = product(dout, false, v, true, s, d, s, 1, dtype);
  for (int64_t i = 0; i < s; ++i) {
    double common = 0;
    for (int64_t j = 0; j < s; ++j) common += p[static_cast<size_t>(i * s + j)] * ds[static_cast<size_t>(i * s + j)];
    for (int64_t j = 0; j < s; ++j) {
      double &x = ds[static_cast<size_t>(i * s + j)];
      x = rounded(p[static_cast<size_t>(i * s + j)] * (x - common), dtype);
    }
  }
  return {product(ds, false, k, false, s, s, d, scale, dtype), product(ds, true, q, false, s, s, d, scale, dtype),
          product(p, true, dout, false, s, s, d, 1, dtype)};
}

struct Shape {
  int64_t seqlen;
  bool causal;
  Input input;
};

// Largest error over all elements, and the tensor's largest.
struct Distance {
  double error = 0, largest = 0;
};
template <class Values>
Distance distance(const Values &x, const std::vector<float> &truth) {
  Distance d;
  for (size_t n = 0; n < truth.size(); ++n) {
    d.error = std::fmax(d.error, std::fabs(double{x[n]} - truth[n]));
    d.largest = std::fmax(d.largest, std::fabs(double{truth[n]}));
  }
  return d;
}

TEST(BackwardError, IsAtMostTwiceThatOfUnfusedAttention) {
  const Shape shapes[] = {{1, false, Input::kNormal},  {60, true, Input::kNormal},   {257, false, Input::kNormal},
                          {300, true, Input::kNormal}, {257, false, Input::kPeaked}, {300, true, Input::kPeaked}};
  for (const int32_t dtype : {FLASHSPARK_BFLOAT16, FLASHSPARK_FLOAT16}) {
    for (const Shape &shape : shapes) {
      const int64_t s = shape.seqlen, d = 64;
      Case c;
      c.name = "error";
      c.lens = {{s, s}};
      c.heads_q = c.heads_kv = 1;
      c.causal = shape.causal, c.input = shape.input;
      c.q_dtype = c.kv_dtype = c.out_dtype = dtype;
      BackwardProblem problem(c);
      problem.params.dlse = nullptr;
      c.q_dtype = c.kv_dtype = c.out_dtype = FLASHSPARK_FLOAT32;
      BackwardProblem exact(c);  // the same numbers in float32
      exact.params.dlse = nullptr;
      Matrix q, k, v, dout;
      for (int64_t n = 0; n < s * d; ++n) {
        for (const auto &[role, values] : {std::pair{Role::kQ, &q}, {Role::kK, &k}, {Role::kV, &v}}) {
          values->push_back(problem.forward.get(role, 0, n / d, 0, n % d));
          exact.forward.set(role, 0, n / d, 0, n % d, static_cast<float>(values->back()));
        }
        dout.push_back(load(dtype, problem.params.dout.data, n));
        static_cast<float *>(exact.params.dout.data)[n] = static_cast<float>(dout.back());
      }
      ASSERT_EQ(exact.forward.launch("cpu-reference", 0), FLASHSPARK_OK) << flashspark_last_error();
      const Gradients truth = exact.run("cpu-reference"), got = problem.run("cpu-engine");
      ASSERT_EQ(got.status, FLASHSPARK_OK) << got.error;
      const Three other = unfused(q, k, v, dout, s, d, c.causal, problem.params.forward.softmax_scale, dtype);
      const auto expect = [&](const std::vector<float> &x, const Matrix &y, const std::vector<float> &z,
                              const char *name) {
        const Distance ours = distance(x, z), theirs = distance(y, z);
        EXPECT_LE(ours.error, 2 * theirs.error + 1e-5 * ours.largest)
            << name << ", " << s << " tokens, causal " << c.causal << ", dtype " << dtype;
      };
      expect(got.dq, other.dq, truth.dq, "dq");
      expect(got.dk, other.dk, truth.dk, "dk");
      expect(got.dv, other.dv, truth.dv, "dv");
    }
  }
}

}  // namespace
}  // namespace flashspark::cases
