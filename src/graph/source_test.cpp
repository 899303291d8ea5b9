// Functions written in C: the same text is compiled into this test and read by the parser, and both must give the same.
#include "graph/source.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "error.hpp"
#include "graph/evaluate.hpp"

namespace flashspark::graph {
namespace {

// The declaration, and its text.
#define FUNCTION(name, ...) \
  __VA_ARGS__               \
  const char name##_text[] = #__VA_ARGS__

using std::abs;
using std::clamp;
using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;

// What all of these functions capture: a vector of 8 floats, a matrix of 4 x 16 integers, two numbers.
using Score = float(float, int, int, int, int, const float *, const int32_t (*)[16], float, int);

// The bodies are what users may write, whatever our own style is.
// NOLINTBEGIN
#if defined(__clang__)
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Weverything"
#else
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wparentheses"
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wshadow"
#endif
// clang-format off
#define SCORE(name, ...)                                                                                            \
  float name([[maybe_unused]] float score, [[maybe_unused]] int b, [[maybe_unused]] int h, [[maybe_unused]] int q_idx, \
             [[maybe_unused]] int kv_idx, [[maybe_unused]] const float *slopes,                                      \
             [[maybe_unused]] const int32_t (*table)[16], [[maybe_unused]] float strength,                           \
             [[maybe_unused]] int window) { __VA_ARGS__ }                                                            \
  const char name##_text[] = #__VA_ARGS__
// clang-format on

SCORE(alibi, return score + slopes[h] * (kv_idx - q_idx););
SCORE(locals, const int distance = q_idx - kv_idx; float bias = 0; bias += slopes[h] * distance; bias *= 0.5f;
      auto more = bias - 1; return score + more;);
SCORE(early_return, if (kv_idx > q_idx) return -INFINITY; if (kv_idx % 3 == 1) { return score * 2; } return score;);
SCORE(
    branches, float x = score; if (h == 1) x = -x; else if (h == 2) {
      x += 1;
      if (b > 0) x *= 2;
    } else {
      float y = x;
      x = y * y;
    } return x;);
SCORE(
    returns_within, float x = score; if (h > 1) {
      if (q_idx < 5) return 1.5f;
      x += 2;
      if (kv_idx < 4) return x;
    } else { x -= 1; } return x * 3;);
SCORE(division, int d = q_idx - kv_idx; return score + d / 7 + d % 5 - (d / -3) + (d % -4) + q_idx / 6 + kv_idx % 6;);
SCORE(bits, int m = (q_idx << 2) ^ (kv_idx >> 1) | (h & 3);
      return score + (~m & 15) + (m > 20 && kv_idx != 3 || !(h == 1)););
SCORE(precedence, return score - 2 * kv_idx + 3 * -h - -4 + (q_idx < kv_idx == 0) + (1 << 2 + 1););
SCORE(conditional, return kv_idx < 3 ? score : kv_idx < 6 ? score * 2 : h ? score * 3 : 1;);
SCORE(conversions, float third = 1.0f / 3; int whole = score * 10; bool near = q_idx - kv_idx; int64_t wide = q_idx;
      wide = wide * 3000000000;
      return (float)whole + near + float(kv_idx) * third + static_cast<float>(wide % 1000) + int(2.75f););
SCORE(functions, return expf(-fabsf(score)) + sinf(score) * cosf(score) + tanhf(score) + log1pf(fabsf(score)) +
                        sqrtf(2.0f + kv_idx) + powf(1.5f, h) + atan2f(score, 2) + erff(score) + floorf(score) +
                        ceilf(score) + truncf(score) + rintf(score););
SCORE(more_functions, return roundf(score * 4) + fmodf(score, 0.75f) + fmaxf(score, NAN) + fminf(NAN, score) +
                             fmaf(score, 2, 1) + max(q_idx, kv_idx) + min(score, 1.0f) + abs(q_idx - kv_idx) +
                             abs(score) + clamp(score, -0.5f, 0.5f) + isnan(score) + isinf(score) + isfinite(score) +
                             std::exp2(score) + M_PI;);
SCORE(counters, int n = 0; n++; ++n; n += kv_idx; n <<= 1; n--; n %= 11; n |= 4; return score * n;);
SCORE(
    shadows, int x = 1; {
      int x = 2;
      x += h;
      score += x;
    } return score + x;);
SCORE(literals, return score + 0x1F + 1e-2f + .5f + 2.f + 10L + true + 0.25;);
SCORE(captured, return score * strength + (q_idx - kv_idx < window) + table[h % 4][kv_idx % 16] * slopes[kv_idx % 8];);
SCORE(comments, /* one */ float x = score;  // two
      return x;);
#if defined(__clang__)
#pragma clang diagnostic pop
#else
#pragma GCC diagnostic pop
#endif

// NOLINTEND

struct Named {
  const char *name;
  const char *body;
  Score *native;
};
const Named kFunctions[] = {
#define EACH(name) {#name, name##_text, name}
    EACH(alibi),    EACH(locals),     EACH(early_return), EACH(branches),    EACH(returns_within), EACH(division),
    EACH(bits),     EACH(precedence), EACH(conditional),  EACH(conversions), EACH(functions),      EACH(more_functions),
    EACH(counters), EACH(shadows),    EACH(literals),     EACH(captured),    EACH(comments),
#undef EACH
};

// Every tensor must be read and a list of parameters may end anywhere: those that the body has no word of are left out.
std::string text_of(const std::string &body, std::vector<std::string> &captured) {
  const std::string head = "float f(float score, int b, int h, int q_idx, int kv_idx";
  std::string text = head;
  for (const auto &[name, declaration] : {std::pair{"slopes", ", const float *slopes"},
                                          {"table", ", const int *table"},
                                          {"strength", ", float strength"},
                                          {"window", ", int window"}}) {
    if (body.find(name) == std::string::npos) continue;
    text += declaration;
    captured.push_back(name);
  }
  return text + ") {\n" + body + "\n}\n";
}

class Captured {
 public:
  Captured() {
    std::mt19937 random(3);
    for (float &x : slopes) x = static_cast<float>(random() % 64) / 16 - 2;
    for (auto &row : table) {
      for (int32_t &x : row) x = static_cast<int32_t>(random() % 9) - 4;
    }
  }
  // In the order in which the text has them.
  void give(const std::vector<std::string> &names) {
    for (const std::string &name : names) {
      if (name == "slopes") tensors.push_back({slopes, static_cast<int32_t>(DataType::f32), 1, {8}, {1}});
      if (name == "table") tensors.push_back({table, static_cast<int32_t>(DataType::i32), 2, {4, 16}, {16, 1}});
      if (name == "strength") scalars.push_back(strength);
      if (name == "window") scalars.push_back(window);
    }
  }
  float slopes[8];
  int32_t table[4][16];
  float strength = 1.25f;
  int window = 3;
  std::vector<AuxTensor> tensors;
  std::vector<double> scalars;
};

TEST(Source, GivesWhatTheCompilerGives) {
  for (const Named &function : kFunctions) {
    Captured captured;
    std::vector<std::string> names;
    const std::string text = text_of(function.body, names);
    captured.give(names);
    const SourceFunction parsed = parse_source(text, true);
    const Graph graph = simplified_function(parsed.graph);
    std::mt19937 random(5);
    for (int n = 0; n < 400; ++n) {
      const int b = static_cast<int>(random() % 2), h = static_cast<int>(random() % 4),
                q = static_cast<int>(random() % 20), kv = static_cast<int>(random() % 20);
      const float score = static_cast<float>(random() % 257) / 64 - 2;
      const double want =
          function.native(score, b, h, q, kv, captured.slopes, captured.table, captured.strength, captured.window);
      for (const Graph *each : {&parsed.graph, &graph}) {
        const double got =
            evaluate(*each, {captured.tensors, captured.scalars}, {b, h, q, 20, 20, 0, 0}, kv, score).value;
        if (std::isinf(want)) {
          EXPECT_EQ(got, want) << function.name;
        } else {
          EXPECT_NEAR(got, want, 2e-5 * (1 + std::fabs(want)))
              << function.name << " score " << score << " b " << b << " h " << h << " q " << q << " kv " << kv;
        }
      }
    }
  }
}

TEST(Source, NamesWhatItCaptures) {
  const SourceFunction f = parse_source(
      "extern \"C\" __device__ __forceinline__ float f(float s, const int b, int h, int32_t q, std::int32_t k, int "
      "seqlen_k,\n"
      "    const __nv_bfloat16 *__restrict__ bias, long long shift, const double table[], float strength, int "
      "offset_q)\n"
      "{ return s * strength + bias[seqlen_k - 1 - k] + table[h] + (q + offset_q + shift > b); }",
      true);
  EXPECT_EQ(f.tensors, (std::vector<std::string>{"bias", "table"}));
  EXPECT_EQ(f.scalars, (std::vector<std::string>{"shift", "strength"}));
  EXPECT_EQ(f.graph.captures[0], (Capture{1, DataType::bf16}));
  EXPECT_EQ(f.graph.captures[1], (Capture{1, DataType::f64}));
}

TEST(Source, MaskFunctions) {
  const SourceFunction f =
      parse_source("bool f(int b, int h, int q, int k, int window) { return k <= q && q - k < window; }", false);
  const double window = 5;
  for (int q = 0; q < 20; ++q) {
    for (int k = 0; k < 20; ++k)
      EXPECT_EQ(evaluate(f.graph, {{}, {&window, 1}}, {0, 0, q, 20, 20, 0, 0}, k, 0).integer, k <= q && q - k < 5);
  }
}

std::string error(const std::string &body, bool is_score = true) {
  const std::string text =
      is_score ? "float f(float s, int b, int h, int q, int k, const float *t, float x) {\n" + body + "\n}" : body;
  try {
    parse_source(text, is_score);
  } catch (const Error &thrown) {
    EXPECT_EQ(thrown.status(), FLASHSPARK_INVALID_ARGUMENT);
    return thrown.what();
  }
  return "nothing was thrown";
}

TEST(Source, ErrorsNameTheLineAndTheConstruct) {
  const auto is = [](const std::string &body, const std::string &want) {
    EXPECT_EQ(error(body), "source, " + want) << body;
  };
  is("for (int i = 0; i < 3; ++i) s += 1; return s + t[0];",
     "line 2: `for` is not supported: write the steps out, or use ?: and if");
  is("return s + t[0]\n", "line 4: `;` is missing before `}`");
  is("return s + u[0];", "line 2: `u` is not declared");
  is("\nreturn s + sqrt3(t[0]);", "line 3: `sqrt3` is no function that can be called here");
  is("return s + t[0] + t[0][1];", "line 2: `t` has 2 indices here and 1 before");
  is("return s + t[x];", "line 2: an index of `t` is a float");
  is("return s + t;", "line 2: tensor `t` is used without an index");
  is("return s;", "line 1: tensor `t` is never read");
  is("t[0] = 1; return s;", "line 2: `t` is constant: functions change nothing but their own variables");
  is("const int d = q; d = 2; return t[d];",
     "line 2: `d` is constant: functions change nothing but their own variables");
  is("float y; return y + t[0];", "line 2: `y` has no value yet, or not on every path");
  is("float y; if (k > q) y = 1; return y + t[0];", "line 2: `y` has no value yet, or not on every path");
  is("if (k > q) return t[0];", "line 1: the function may end without a value");
  is("return s % 2 + t[0];", "line 2: `%` of a float: write fmodf(a, b)");
  is("return expf(s, 2) + t[0];", "line 2: `expf` takes 1 arguments, not 2");
  is("unsigned int u = 3; return t[u];",
     "line 2: unsigned integers are not supported, but for tensors of unsigned char");
  is("float a[3]; return t[0];", "line 2: local arrays are not supported");
  is("return s++ + t[0];", "line 2: `++` behind a value");
  is("return 99999999999999999999 + t[0];", "line 2: `99999999999999999999` is no signed integer of at most 64 bits");
  is("return 1.5q + t[0];", "line 2: `1.5q` is no number");
  is("return t[0]; } float g() { return 1;", "line 2: `float` behind the function: the text is one function");
  is("return t[0]; /* ", "line 2: a comment does not end");
  is("#define A 1\nreturn t[0];", "line 2: of the preprocessor there is #include alone, which is ignored");
  is("return t[0] @ 2;", "line 2: a character that C does not have here: '@'");
  is("int expf = 1; return t[expf];", "line 2: `expf` has a meaning already");
  is("return (s + t[0];", "line 2: `)` is missing before `;`");
  EXPECT_EQ(error("float f(int b, int h, int q, int k) { return 1; }", false),
            "source, line 1: a mask function returns bool");
  EXPECT_EQ(error("bool f(int b, float h, int q, int k) { return true; }", false),
            "source, line 1: `h` must be an int");
  EXPECT_EQ(error("bool f(int b, int h) { return true; }", false),
            "source, line 1: a mask function has the parameters (int b, int h, int q_idx, int kv_idx, ..)");
  EXPECT_EQ(error("bool f(int b, int h, int q, int q) { return true; }", false),
            "source, line 1: two parameters are called `q`");
  EXPECT_EQ(error("bool f(int b, int h, int q, int k, float seqlen_k) { return true; }", false),
            "source, line 1: `seqlen_k` must be an int");
  EXPECT_EQ(error("", false), "source, line 1: the end: must be a type");
}

// No text makes the parser do anything but give a function or throw.
TEST(Source, AnyTextIsReadOrRefused) {
  std::mt19937 random(11);
  std::vector<std::string> texts;
  for (const Named &function : kFunctions) {
    std::vector<std::string> names;
    texts.push_back(text_of(function.body, names));
  }
  int read = 0, refused = 0;
  for (int n = 0; n < 4000; ++n) {
    std::string text = texts[random() % texts.size()];
    for (int edit = 0; edit < 1 + n % 4; ++edit) {
      const size_t at = random() % text.size(), length = random() % 8;
      const std::string &other = texts[random() % texts.size()];
      text.replace(at, length, other.substr(random() % other.size(), random() % 8));
    }
    try {
      parse_source(text, true);
      ++read;
    } catch (const Error &) {
      ++refused;
    }
  }
  EXPECT_GT(read, 0);
  EXPECT_GT(refused, 0);
}

}  // namespace
}  // namespace flashspark::graph
