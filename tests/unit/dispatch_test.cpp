// The choice of an implementation, and how it explains itself.
#include "dispatch.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/driver.hpp"
#include "error.hpp"
#include "flashspark/flashspark.h"
#include "platform/dynamic_library.hpp"

namespace flashspark {
namespace {

struct Tiny {
  std::vector<float> q = std::vector<float>(8, 1), k = q, v = q, out = std::vector<float>(8);
  flashspark_attention_params p;

  Tiny() {
    flashspark_attention_params_init(&p);
    p.num_seqs = p.num_heads_q = p.num_heads_kv = p.max_seqlen_q = p.max_seqlen_k = 1;
    p.head_dim = p.head_dim_v = 8;
    p.q = {q.data(), 8, 8, 8, FLASHSPARK_FLOAT32, 0};
    p.k = {k.data(), 8, 8, 8, FLASHSPARK_FLOAT32, 0};
    p.v = {v.data(), 8, 8, 8, FLASHSPARK_FLOAT32, 0};
    p.out = {out.data(), 8, 8, 8, FLASHSPARK_FLOAT32, 0};
  }
  std::string explain(flashspark_status expected) const {
    std::string text(8192, '?');
    EXPECT_EQ(flashspark_attention_explain(&p, text.data(), text.size()), expected) << flashspark_last_error();
    return text.c_str();
  }
};

std::string line_of(const std::string &text, const std::string &name) {
  const size_t begin = text.find(name + " (");
  return begin == std::string::npos ? "" : text.substr(begin, text.find('\n', begin) - begin);
}
bool contains(const std::string &text, const std::string &part) {
  return text.find(part) != std::string::npos;
}

TEST(Dispatch, TheEngineIsTheFirstChoice) {
  const std::string text = Tiny().explain(FLASHSPARK_OK);
  EXPECT_TRUE(contains(line_of(text, "cpu-engine"), "chosen")) << text;
  EXPECT_FALSE(contains(line_of(text, "cpu-reference"), "chosen")) << text;
  EXPECT_TRUE(contains(text, flashspark_cpu_target())) << text;
}

TEST(Dispatch, ExplainListsWhatTheProblemRequires) {
  Tiny t;
  t.p.causal = 1;
  t.p.softcap = 3;
  t.p.window_left = 4;
  t.p.dropout_p = 0.5f;
  const std::string text = t.explain(FLASHSPARK_OK);
  const std::string required = text.substr(text.find("required:"), text.find('\n', text.find("required:")));
  for (const char *feature : {"float32", "causal", "softcap", "window", "dropout"})
    EXPECT_TRUE(contains(required, feature)) << text;
  EXPECT_FALSE(contains(required, "paged")) << text;
  EXPECT_FALSE(contains(required, "alibi")) << text;
}

TEST(Dispatch, ForcedByName) {
  Tiny t;
  t.p.implementation = "cpu-reference";
  const std::string text = t.explain(FLASHSPARK_OK);
  EXPECT_TRUE(contains(line_of(text, "cpu-reference"), "chosen")) << text;
  EXPECT_FALSE(contains(line_of(text, "cpu-engine"), "chosen")) << text;
  EXPECT_EQ(flashspark_attention_forward(&t.p), FLASHSPARK_OK);
  EXPECT_EQ(t.out[0], 1.0f);
}

TEST(Dispatch, UnknownNamesListTheKnownOnes) {
  Tiny t;
  t.p.implementation = "gpu-wishful";
  EXPECT_EQ(flashspark_attention_forward(&t.p), FLASHSPARK_INVALID_ARGUMENT);
  const std::string text = flashspark_last_error();
  for (const char *part : {"gpu-wishful", "cpu-engine", "cpu-reference"}) EXPECT_TRUE(contains(text, part)) << text;
  EXPECT_EQ(t.out[0], 0.0f);
}

TEST(Dispatch, CudaProblemsSayWhatEachImplementationLacks) {
  Tiny t;
  t.p.device = FLASHSPARK_CUDA;
  t.p.device_index = 2;
  EXPECT_EQ(flashspark_attention_forward(&t.p), FLASHSPARK_UNSUPPORTED);
  const std::string text = flashspark_last_error();
  EXPECT_TRUE(contains(text, "CUDA device 2")) << text;
  EXPECT_TRUE(contains(line_of(text, "cpu-engine"), "runs on the CPU only")) << text;
  EXPECT_TRUE(contains(line_of(text, "cpu-reference"), "runs on the CPU only")) << text;
  EXPECT_TRUE(contains(line_of(text, "cuda"), "lacks float32")) << text;
  EXPECT_EQ(t.explain(FLASHSPARK_UNSUPPORTED).find("problem:"), 0u);
  EXPECT_EQ(t.out[0], 0.0f);
}

TEST(Dispatch, WithoutAGpuTheCudaLineSaysWhatIsMissing) {
  Tiny t;
  t.p.device = FLASHSPARK_CUDA;
  t.p.device_index = 1000;  // nobody has as many
  for (flashspark_tensor *tensor : {&t.p.q, &t.p.k, &t.p.v, &t.p.out}) tensor->dtype = FLASHSPARK_BFLOAT16;
  const std::string line = line_of(t.explain(FLASHSPARK_UNSUPPORTED), "cuda");
  const char *const reasons[] = {"built without CUDA kernels", "libcuda.so.1 is not found", "no GPU",
                                 "there is no CUDA device 1000"};
  EXPECT_TRUE(std::any_of(std::begin(reasons), std::end(reasons), [&](const char *r) { return contains(line, r); }))
      << line;
  EXPECT_FALSE(contains(line, "lacks")) << line;
}

// Every operation comes from one table, and its refusals too.
TEST(Dispatch, EveryRowHasItsOperations) {
  for (const Implementation &each : implementations()) {
    EXPECT_NE(each.forward, nullptr) << each.name;
    EXPECT_NE(each.workspace, nullptr) << each.name;
    EXPECT_EQ(each.backward.run == nullptr, each.backward.workspace == nullptr) << each.name;
    EXPECT_NE(each.append, nullptr) << each.name;
    EXPECT_EQ(each.schedule == nullptr, each.schedule_size == nullptr) << each.name;
  }
  AppendParams append{};
  EXPECT_STREQ(choose_append(append).name, "cpu-engine");
  EXPECT_STREQ(choose_schedule(Tiny().p).name, "cpu-engine");
}

struct TinyBackward : Tiny {
  std::vector<float> lse = std::vector<float>(1), dout = q, dq = out, dk = out, dv = out;
  flashspark_attention_backward_params b;

  TinyBackward() {
    flashspark_attention_backward_params_init(&b);
    b.forward = p;
    b.forward.lse = lse.data();
    b.dout = b.dq = b.dk = b.dv = p.out;
    b.dout.data = dout.data(), b.dq.data = dq.data(), b.dk.data = dk.data(), b.dv.data = dv.data();
  }
  std::string explain(flashspark_status expected) const {
    std::string text(8192, '?');
    EXPECT_EQ(flashspark_attention_backward_explain(&b, text.data(), text.size()), expected) << flashspark_last_error();
    return text.c_str();
  }
};

TEST(Dispatch, GradientsAreChosenByTheirOwnFeatures) {
  TinyBackward t;
  t.b.dlse = t.lse.data();
  t.b.forward.causal = 1;
  const std::string text = t.explain(FLASHSPARK_OK);
  EXPECT_EQ(text.rfind("problem: gradients, the CPU, ", 0), 0u) << text;
  const std::string required = text.substr(text.find("required:"), text.find('\n', text.find("required:")));
  for (const char *feature : {"float32", "causal", "gradient of lse"}) EXPECT_TRUE(contains(required, feature)) << text;
  EXPECT_FALSE(contains(required, "gradient of sinks")) << text;
  t.b.forward.implementation = "cpu-reference";
  const std::string forced = t.explain(FLASHSPARK_OK);
  EXPECT_TRUE(contains(line_of(forced, "cpu-reference"), "chosen, as asked for")) << forced;
  t.b.forward.implementation = "cuda";
  EXPECT_EQ(flashspark_attention_backward(&t.b), FLASHSPARK_UNSUPPORTED);
  EXPECT_TRUE(contains(line_of(flashspark_last_error(), "cuda"), "runs on CUDA only")) << flashspark_last_error();
  t.b.forward.implementation = "gpu-wishful";
  EXPECT_EQ(flashspark_attention_backward(&t.b), FLASHSPARK_INVALID_ARGUMENT);
  EXPECT_TRUE(contains(flashspark_last_error(), "implementation = gpu-wishful")) << flashspark_last_error();
}

TEST(Dispatch, OperationsWithoutAnImplementationAreRefused) {
  AppendParams append{};
  Params schedule = Tiny().p;
  append.device = schedule.device = FLASHSPARK_CUDA;
  append.device_index = schedule.device_index = 1000;  // nobody has as many
  const auto refusal = [](auto &&choice) -> std::string {
    try {
      choice();
    } catch (const Error &error) {
      EXPECT_EQ(error.status(), FLASHSPARK_UNSUPPORTED);
      return error.what();
    }
    return {};
  };
  EXPECT_EQ(refusal([&] { choose_append(append); }).rfind("append: no implementation fits: cuda: ", 0), 0u);
  EXPECT_EQ(refusal([&] { choose_schedule(schedule); }).rfind("schedule: no implementation fits: cuda: ", 0), 0u);
  EXPECT_EQ(refusal([&] { choose(schedule); }).rfind("no implementation fits\nproblem: ", 0), 0u);
}

TEST(Dispatch, CpuProblemsHearOfTheKernelsWithoutLoadingTheDriver) {
  const auto loaded = [] { return bool(DynamicLibrary::find_loaded(cuda::kDriverFile)); };
  const bool before = loaded();  // by another test
  const std::string line = line_of(Tiny().explain(FLASHSPARK_OK), "cuda");
  EXPECT_EQ(loaded(), before);
  EXPECT_TRUE(contains(line, "runs on CUDA only")) << line;
  EXPECT_TRUE(contains(line, "kernels for sm_") || contains(line, "built without CUDA kernels")) << line;
}

TEST(Dispatch, ExplainRespectsTheBuffer) {
  Tiny t;
  const std::string whole = t.explain(FLASHSPARK_OK);
  EXPECT_EQ(flashspark_attention_explain(&t.p, nullptr, 0), FLASHSPARK_OK);
  EXPECT_EQ(flashspark_attention_explain(&t.p, nullptr, 100), FLASHSPARK_OK);
  for (const size_t size : {size_t{0}, size_t{1}, size_t{2}, size_t{17}, whole.size(), whole.size() + 1}) {
    std::vector<char> buffer(size + 1, '#');
    EXPECT_EQ(flashspark_attention_explain(&t.p, buffer.data(), size), FLASHSPARK_OK);
    EXPECT_EQ(buffer[size], '#') << "wrote past " << size;
    if (size > 0) {
      EXPECT_EQ(std::string(buffer.data()), whole.substr(0, size - 1));
    }
  }
}

}  // namespace
}  // namespace flashspark
