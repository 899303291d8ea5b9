// Kernels with named functions, compiled by NVRTC for SM12x: registers are enough, and it takes about a second.
#include <elf.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <map>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cuda/backward_functions.hpp"
#include "cuda/block_mask.hpp"
#include "cuda/function_kernel.hpp"
#include "cuda/processes.hpp"
#include "support/functions.hpp"
#include "support/named_graphs.hpp"

namespace flashspark::cuda {
namespace {

// Of .nv.info: the attributes that name a function and say a number of it.
enum Attribute : uint8_t { kFrameSize = 0x11, kMinStackSize = 0x12, kRegisters = 0x2f };
constexpr uint8_t kSizedValue = 4;  // a record of a size and so many bytes; others have 2 bytes

// The largest value of each attribute, over all functions of the cubin.
std::map<uint8_t, uint32_t> attributes_of(const std::vector<char> &cubin) {
  const auto read = [&](size_t at, auto &to) {
    if (at + sizeof to > cubin.size()) throw std::runtime_error("the cubin is cut off");
    std::memcpy(&to, cubin.data() + at, sizeof to);
  };
  Elf64_Ehdr header;
  read(0, header);
  const auto section = [&](uint32_t n) {
    Elf64_Shdr s;
    read(header.e_shoff + size_t{n} * header.e_shentsize, s);
    return s;
  };
  const Elf64_Shdr names = section(header.e_shstrndx);
  std::map<uint8_t, uint32_t> found;
  for (uint32_t n = 0; n < header.e_shnum; ++n) {
    const Elf64_Shdr s = section(n);
    if (std::string(cubin.data() + names.sh_offset + s.sh_name) != ".nv.info") continue;
    for (size_t at = s.sh_offset; at < s.sh_offset + s.sh_size;) {
      uint8_t format = 0, attribute = 0;
      uint16_t size = 0;
      read(at, format), read(at + 1, attribute), read(at + 2, size);
      at += 4;
      if (format != kSizedValue) continue;
      uint32_t value = 0;  // behind the number of the function's symbol
      if (size == 8) read(at + 4, value), found[attribute] = std::max(found[attribute], value);
      at += size;
    }
  }
  return found;
}

struct Pair {
  test::NamedFunctions functions;
  const char *instance;
  bool block_sparse = false, block_tiles = false, dropout = false, paged = false;
  bool native = false;  // of backward kernels

  std::string name() const {
    const char *lists = block_tiles ? " tiles of blocks" : block_sparse ? " lists" : "";
    return std::string(instance) + " " + functions.name + lists + (dropout ? " dropout" : "") +
           (paged ? " pages" : "") + (native ? " native" : "");
  }
};

// What spills, and how many bytes at most: outside the loop over tiles that need no mask, but for a few loads. At D64 a
// warp holds 64 scores at once, which takes a fifth fewer instructions than 32 and no spill (docs/experiments.md E87).
const std::map<std::string, uint32_t> kKnownStacks = {
    {"d64_prefill relative_position", 16},
    {"d64_prefill buckets", 8},
    {"d64_prefill positions", 56},
    {"d64_prefill documents", 56},
    {"d64_prefill neighbours", 48},
    {"d64_prefill flags", 32},
    {"d64_prefill alibi_documents", 64},
    {"d64_prefill none dropout", 16},
    {"d64_prefill alibi dropout", 24},
    {"d64_prefill causal tiles of blocks", 8},
    {"d128_prefill alibi", 16},
    {"d128_prefill relative_position", 24},
    {"d128_prefill buckets", 24},
    {"d128_prefill bias_2d", 56},
    {"d128_prefill bias_3d", 48},
    {"d128_prefill positions", 32},
    {"d128_prefill documents", 16},
    {"d128_prefill flags", 72},
    {"d128_prefill alibi_documents", 16},
    {"d128_prefill capped_window", 8},
    {"d128_prefill none dropout", 72},
    {"d128_prefill alibi dropout", 72},
    {"d256_prefill decay", 8},
    {"d256_prefill elementary", 8},
    {"d256_prefill flags", 8},
    {"d256_prefill none dropout", 16},
    {"d256_prefill alibi dropout", 16},
    {"d64_prefill documents pages", 104},
    {"d64_prefill bias_2d pages", 32},
    {"d128_prefill alibi pages", 24},
    {"d128_prefill documents pages", 80},
    {"d128_prefill bias_2d pages", 24},
    {"d128_prefill documents tiles of blocks", 8},
};

struct Outcome {
  double seconds = 0;
  uint32_t registers = 0, stack = 0;
  std::string error;
};

const Instance &instance_of(const std::string &name) {
  return *std::find_if(std::begin(kInstances), std::end(kInstances),
                       [&](const Instance &instance) { return name == instance.name; });
}

CompileRequest request_of(const Pair &pair) {
  const auto score = pair.functions.score(), mask = pair.functions.mask();
  Params p{};
  if (score) p.score_mod.mod = test::make_mod(*score, true);
  if (mask) p.mask_mod.mod = test::make_mod(*mask, false);
  Plan plan;
  plan.instance = &instance_of(pair.instance);
  plan.dtype = KernelDType::bf16;
  FunctionPlan functions;
  functions.native = plan.instance->score_mod == ScoreMod::native;
  functions.block_sparse = pair.block_sparse;
  functions.dropout = pair.dropout;
  functions.contiguous = !pair.paged;
  if (pair.block_tiles) functions.block_tiles.emplace();
  CompileRequest request = function_request(p, plan, functions, Architecture::sm_120f);
  for (const flashspark_mod *mod : {p.score_mod.mod, p.mask_mod.mod})
    flashspark_mod_release(const_cast<flashspark_mod *>(mod));
  return request;
}

CompileRequest block_mask_request_of(const test::NamedFunctions &functions, int32_t lane_keys) {
  const graph::Graph graph = *functions.mask();
  BlockMaskParams p{};
  flashspark_mod *mod = test::make_mod(graph, false);
  p.mask_mod.mod = mod;
  BlockMaskPlan plan;
  plan.lane_keys = lane_keys;
  CompileRequest request = block_mask_request(p, plan, Architecture::sm_120f);
  flashspark_mod_release(mod);
  return request;
}

// Of this thread, so that a busy machine does not count.
double thread_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

Outcome compile_one(const CompileRequest &request) {
  Outcome outcome;
  try {
    const double start = thread_seconds();
    const std::vector<char> cubin = compile(request);
    outcome.seconds = thread_seconds() - start;
    std::map<uint8_t, uint32_t> attributes = attributes_of(cubin);
    outcome.registers = attributes[kRegisters];
    outcome.stack = std::max(attributes[kFrameSize], attributes[kMinStackSize]);
  } catch (const std::exception &error) {
    outcome.error = error.what();
  }
  return outcome;
}

std::vector<Outcome> compile_all(const std::vector<Pair> &pairs, CompileRequest (*request)(const Pair &)) {
  std::vector<Outcome> outcomes(pairs.size());
  std::atomic<size_t> next{0};
  std::vector<std::thread> threads;
  for (unsigned n = 0; n < std::clamp(std::thread::hardware_concurrency(), 1u, 8u); ++n) {
    threads.emplace_back([&] {
      for (size_t at = next++; at < pairs.size(); at = next++) outcomes[at] = compile_one(request(pairs[at]));
    });
  }
  for (std::thread &thread : threads) thread.join();
  return outcomes;
}

std::vector<Pair> all_pairs() {
  std::vector<Pair> pairs;
  for (const char *instance : {"d64_prefill", "d128_prefill", "d256_prefill"}) {
    for (const test::NamedFunctions &functions : test::named_functions()) pairs.push_back({functions, instance});
    pairs.push_back({test::named("causal"), instance, true});
    for (const char *name : {"none", "alibi"}) pairs.push_back({test::named(name), instance, false, false, true});
    pairs.push_back({test::named("causal"), instance, true, true});
  }
  for (const char *instance : {"d64_prefill", "d128_prefill"}) {
    for (const char *name : {"alibi", "documents", "bias_2d"})
      pairs.push_back({test::named(name), instance, false, false, false, true});
  }
  pairs.push_back({test::named("capped_window"), "d128_prefill_mod"});
  pairs.push_back({test::named("documents"), "d128_prefill", true, true});
  pairs.push_back({test::named("relative_position"), "d128_short_q"});
  pairs.push_back({test::named("documents"), "d128_decode"});
  return pairs;
}

TEST(FunctionKernels, CompileWithoutStackInAboutASecond) {
  if (!has_nvrtc()) GTEST_SKIP() << description_in_a_child();
  constexpr double kSeconds = 2, kMostSeconds = 4;
  const std::vector<Pair> pairs = all_pairs();
  const std::vector<Outcome> outcomes = compile_all(pairs, request_of);
  for (size_t n = 0; n < pairs.size(); ++n) {
    const Outcome &outcome = outcomes[n];
    const std::string name = pairs[n].name();
    ASSERT_EQ(outcome.error, "") << name;
    std::printf("  %-32s %4.2f s%s, %3u registers, %u bytes of stack\n", name.c_str(), outcome.seconds,
                outcome.seconds > kSeconds ? " (slow)" : "", outcome.registers, outcome.stack);
    EXPECT_LT(outcome.seconds, kMostSeconds) << name;
    EXPECT_TRUE(outcome.registers > 32 && outcome.registers <= 255) << name << ": " << outcome.registers;
    const auto known = kKnownStacks.find(name);
    EXPECT_LE(outcome.stack, known != kKnownStacks.end() ? known->second : 0) << name;
  }
}

CompileRequest backward_request_of(const Pair &pair) {
  const auto score = pair.functions.score(), mask = pair.functions.mask();
  Params p{};
  if (score) p.score_mod.mod = test::make_mod(*score, true);
  if (mask) p.mask_mod.mod = test::make_mod(*mask, false);
  BackwardFunctionPlan plan;
  plan.block_sparse = pair.block_sparse, plan.native = pair.native;
  KernelKey key{Operation::attention_backward, KernelDType::bf16};
  for (const BackwardInstance &instance : kBackwardFunctionInstances) {
    if (std::string(instance.name) != pair.instance) continue;
    key.backward = instance.index;
    plan.hands_on = instance.score_mod == ScoreMod::none;
    plan.wanted = plan.hands_on ? 0u : ~0u;
  }
  CompileRequest request = backward_function_request(p, plan, key, Architecture::sm_120f);
  for (const flashspark_mod *mod : {p.score_mod.mod, p.mask_mod.mod})
    flashspark_mod_release(const_cast<flashspark_mod *>(mod));
  return request;
}

// As kKnownStacks, of backward kernels: with a gradient and an operand of 128 columns and 32 keys, two gradients of 128
// columns, or one of 256, few registers are left.
const std::map<std::string, uint32_t> kKnownBackwardStacks = {
    {"d128_functions alibi lists", 32},
    {"d128_functions relative_position lists", 24},
    {"d128_functions buckets lists", 24},
    {"d128_functions clip lists", 24},
    {"d128_functions bias_2d lists", 8},
    {"d128_functions bias_3d lists", 16},
    {"d128_functions decay lists", 16},
    {"d128_functions waves lists", 32},
    {"d128_functions_mod waves", 32},
    {"d128_functions parity lists", 24},
    {"d128_functions temperature lists", 48},
    {"d128_functions positions lists", 72},
    {"d128_functions_mod positions", 16},
    {"d128_functions elementary lists", 24},
    {"d128_functions causal lists", 24},
    {"d128_functions documents lists", 24},
    {"d128_functions window lists", 24},
    {"d128_functions neighbours lists", 8},
    {"d128_functions flags lists", 8},
    {"d128_functions alibi_documents lists", 40},
    {"d128_functions_mod alibi_documents", 8},
    {"d128_functions capped_window lists", 40},
    {"d256_functions alibi", 56},
    {"d256_functions relative_position", 64},
    {"d256_functions softcap", 48},
    {"d256_functions documents lists", 64},
    {"d128_functions none lists", 8},
    {"d128_functions alibi", 72},
    {"d128_functions_mod none lists", 8},
    {"d128_functions_mod outer", 32},
    {"d256_functions alibi native", 64},
    {"d256_functions none lists native", 64},
    {"d128_functions_mod softcap", 8},
    {"d128_functions_mod parity", 56},
    {"d128_functions_mod causal", 40},
};

std::vector<Pair> backward_pairs() {
  std::vector<Pair> pairs;
  for (const test::NamedFunctions &functions : test::named_functions()) {
    pairs.push_back({functions, "d128_functions", true});
    pairs.push_back({functions, "d128_functions_mod"});
  }
  for (const char *instance : {"d64_functions", "d96_functions", "d192_functions", "d256_functions"}) {
    for (const char *name : {"alibi", "relative_position", "softcap"}) pairs.push_back({test::named(name), instance});
    pairs.push_back({test::named("documents"), instance, true});
  }
  pairs.push_back({test::named("none"), "d128_functions", true});
  pairs.push_back({test::named("alibi"), "d128_functions"});
  pairs.push_back({test::named("none"), "d128_functions_mod", true});
  pairs.push_back({test::named("alibi_documents"), "d128_functions_mod", true});
  pairs.push_back({test::named("outer"), "d128_functions_mod"});
  for (const char *instance : {"d64_functions", "d128_functions_mod", "d256_functions"}) {
    pairs.push_back({.functions = test::named("alibi"), .instance = instance, .native = true});
    pairs.push_back({.functions = test::named("none"), .instance = instance, .block_sparse = true, .native = true});
  }
  return pairs;
}

TEST(BackwardFunctionKernels, CompileWithoutStackInAboutASecond) {
  if (!has_nvrtc()) GTEST_SKIP() << description_in_a_child();
  constexpr double kMostSeconds = 6;
  const std::vector<Pair> pairs = backward_pairs();
  const std::vector<Outcome> outcomes = compile_all(pairs, backward_request_of);
  for (size_t n = 0; n < pairs.size(); ++n) {
    const Outcome &outcome = outcomes[n];
    const std::string name = pairs[n].name();
    ASSERT_EQ(outcome.error, "") << name;
    std::printf("  %-36s %4.2f s, %3u registers, %u bytes of stack\n", name.c_str(), outcome.seconds, outcome.registers,
                outcome.stack);
    EXPECT_LT(outcome.seconds, kMostSeconds) << name;
    EXPECT_TRUE(outcome.registers > 32 && outcome.registers <= 255) << name << ": " << outcome.registers;
    const auto known = kKnownBackwardStacks.find(name);
    EXPECT_LE(outcome.stack, known != kKnownBackwardStacks.end() ? known->second : 0) << name;
  }
}

// A small kernel: it takes a part of a second, and no function needs a stack.
TEST(BlockMaskKernels, CompileWithoutStack) {
  if (!has_nvrtc()) GTEST_SKIP() << description_in_a_child();
  for (const test::NamedFunctions &functions : test::mask_functions()) {
    for (const int32_t lane_keys : {1, 4}) {
      const Outcome outcome = compile_one(block_mask_request_of(functions, lane_keys));
      ASSERT_EQ(outcome.error, "") << functions.name;
      std::printf("  %-20s %d keys a lane: %4.2f s, %3u registers, %u bytes of stack\n", functions.name, lane_keys,
                  outcome.seconds, outcome.registers, outcome.stack);
      EXPECT_LT(outcome.seconds, 2) << functions.name;
      EXPECT_TRUE(outcome.registers > 16 && outcome.registers <= 128) << functions.name << ": " << outcome.registers;
      EXPECT_EQ(outcome.stack, 0u) << functions.name;
    }
  }
}

// The reader of cubins sees a stack where there is one.
TEST(FunctionKernels, AStackIsFound) {
  if (!has_nvrtc()) GTEST_SKIP() << description_in_a_child();
  const CompileRequest request{
      .source =
          "#include \"ptx/ptx.cuh\"\nFLASHSPARK_KERNEL(32, 1) FLASHSPARK_ENTRY(float *out, int n) {\n"
          "  float some[64];\n  for (int i = 0; i < 64; ++i) some[i] = out[i * n];\n"
          "  for (int i = 0; i < 64; ++i) out[i] = some[(i * n) & 63];\n}\n",
      .entry = "stack",
      .macros = {},
      .architecture = "sm_120f",
      .headers = {},
      .user_source = false};
  std::map<uint8_t, uint32_t> attributes = attributes_of(compile(request));
  EXPECT_GE(attributes[kFrameSize], 256u);
  EXPECT_GT(attributes[kRegisters], 8u);
}

}  // namespace
}  // namespace flashspark::cuda
