// Backward kernels with the user's functions and block lists: every kernel that is linked in has named functions of its
// own (CMakeLists.txt).
#include <gtest/gtest.h>

#include <bit>
#include <set>

#include "backward/problem.hpp"
#include "backward/random_spec.hpp"

namespace flashspark::emulator {
namespace {

using Draw = cases::Random;

class EveryKernel : public testing::TestWithParam<BackwardKernel> {};
// Those with biases and masks of NativeScoreMod beside the functions.
class NativeKernel : public testing::TestWithParam<BackwardKernel> {};
// Those that sum gradients of captured tensors exactly.
class ExactKernel : public testing::TestWithParam<BackwardKernel> {};

bool hands_on(const BackwardKernel &kernel) {
  return kernel.instance->score_mod == ScoreMod::none;
}

BackwardSpec spec_of(const BackwardKernel &kernel) {
  BackwardSpec s;
  s.head_dim = kernel.instance->head_dim, s.head_dim_v = kernel.instance->head_dim_v;
  s.functions = FunctionSpec{};
  s.functions->functions = kernel.functions, s.functions->lists = kernel.block_sparse;
  s.functions->gradients = !hands_on(kernel);
  s.functions->wish.size_q = s.functions->wish.size_k = 64;
  return s;
}

void check(BackwardSpec spec, const BackwardKernel &kernel, uint64_t seed) {
  spec.deterministic = kernel.in_turns || kernel.exact_sums;
  Counters counters;
  EXPECT_EQ(check_backward(spec, kernel, seed, &counters), "");
  EXPECT_EQ(counters.bank_conflicts, 0u) << name_of(kernel);
}

TEST_P(EveryKernel, WholeTiles) {
  BackwardSpec s = spec_of(GetParam());
  s.tokens = {128}, s.keys = {128};
  check(s, GetParam(), 1);
}

TEST_P(EveryKernel, RaggedTiles) {
  BackwardSpec s = spec_of(GetParam());
  s.head_dim -= 8, s.head_dim_v -= 16;
  uint64_t seed = 10;
  for (const auto &[tokens, keys] : {std::pair{1, 130}, std::pair{70, 1}, std::pair{70, 33}, std::pair{17, 150}}) {
    s.tokens = {tokens}, s.keys = {keys};
    check(s, GetParam(), ++seed);
  }
}

TEST_P(EveryKernel, SequencesAndSharedKeys) {
  BackwardSpec s = spec_of(GetParam());
  s.tokens = {70, 0, 33, 100}, s.keys = {90, 40, 0, 150};
  s.heads_q = 4, s.heads_kv = 2, s.causal = true;
  check(s, GetParam(), 20);
  s.varlen_q = s.varlen_k = true, s.causal = false, s.window_left = 60, s.window_right = 20;
  check(s, GetParam(), 21);
  s.unused_rows = s.sinks = s.dlse = true;
  s.functions->wish.per_head = s.functions->wish.per_batch = false;
  check(s, GetParam(), 22);
}

TEST_P(EveryKernel, SoftcapAndDropout) {
  if (hands_on(GetParam())) return;
  BackwardSpec s = spec_of(GetParam());
  s.tokens = {70, 30}, s.keys = {150, 90}, s.heads_q = 2, s.heads_kv = 1;
  s.softcap = 3;
  check(s, GetParam(), 30);
  s.dropout_p = 0.25f, s.causal = true;
  check(s, GetParam(), 31);
}

TEST_P(EveryKernel, ListsOfAnySize) {
  const BackwardKernel &kernel = GetParam();
  if (!kernel.block_sparse) return;
  for (uint64_t seed = 1; seed <= 16; ++seed) {
    Draw draw(seed, 'b');
    BackwardSpec s = spec_of(kernel);
    s.tokens = {static_cast<int32_t>(draw.from(1, 150)), static_cast<int32_t>(draw.from(1, 100))};
    s.keys = {static_cast<int32_t>(draw.from(1, 300)), static_cast<int32_t>(draw.from(1, 150))};
    s.heads_kv = draw.from(1, 2), s.heads_q = s.heads_kv * draw.from(1, 3);
    s.causal = draw.one_in(3), s.varlen_q = s.varlen_k = draw.one_in(2);
    test::BlockListWish &wish = s.functions->wish;
    wish.size_q = draw.of<int64_t>({16, 16, 32, 48, 64, 80, 128, 1 << 20});
    wish.size_k = draw.of<int64_t>({16, 16, 32, 48, 64, 80, 128, 1 << 20});
    if (hands_on(kernel)) wish.size_k = draw.of<int64_t>({32, 32, 64, 96, 128, 160, 1 << 20});
    wish.per_batch = draw.one_in(2), wish.per_head = draw.one_in(2);
    wish.masked = !draw.one_in(5), wish.full = !wish.masked || !draw.one_in(5);
    if (draw.one_in(3)) wish.none = 20, wish.all = 1;
    check(s, kernel, seed);
  }
}

// Runs of whole blocks of rows between such that the mask is asked of, and such that no list names.
TEST_P(EveryKernel, LongLists) {
  const BackwardKernel &kernel = GetParam();
  if (!kernel.block_sparse || !hands_on(kernel)) return;
  for (uint64_t seed = 1; seed <= 2; ++seed) {
    BackwardSpec s = spec_of(kernel);
    s.tokens = {1200}, s.keys = {64}, s.heads_q = seed == 1 ? 2 : 1, s.heads_kv = 1;
    s.functions->wish.size_q = 64, s.functions->wish.size_k = 32;
    s.functions->wish.per_head = seed == 1;
    check(s, kernel, 40 + seed);
  }
}

// Counts and blocks that are out of range: whatever the result is, nothing outside the tensors is read or written.
TEST_P(EveryKernel, SurvivesWildLists) {
  const BackwardKernel &kernel = GetParam();
  if (!kernel.block_sparse) return;
  constexpr int32_t kValues[] = {INT32_MIN, -100000, -1, 0, 1, 2, 3, 100000, 1 << 30, INT32_MAX};
  for (uint64_t seed = 1; seed <= 8; ++seed) {
    Draw draw(seed, 'w');
    BackwardSpec s = spec_of(kernel);
    s.dtype = kernel.dtype, s.deterministic = kernel.in_turns;
    s.tokens = {70, 20}, s.keys = {130, 200}, s.heads_q = 2;
    s.functions->wish.size_q = draw.of<int64_t>({16, 48, 64}), s.functions->wish.size_k = draw.of<int64_t>({16, 48});
    if (hands_on(kernel)) s.functions->wish.size_k *= 2;
    BackwardProblem problem(s, seed);
    // Arrays of their own, which end where the lists do.
    Params &p = problem.params.forward;
    std::vector<Guarded<int32_t>> arrays;
    for (flashspark_block_list *list : {&p.masked_blocks, &p.full_blocks}) {
      list->width = 2;
      list->count_block_stride = 1, list->index_block_stride = 2;
      list->count_head_stride = p.num_blocks_q, list->index_head_stride = 2 * p.num_blocks_q;
      list->count_batch_stride = p.block_heads * p.num_blocks_q;
      list->index_batch_stride = 2 * list->count_batch_stride;
      for (const int64_t width : {1, 2}) {
        Guarded<int32_t> &numbers =
            arrays.emplace_back(static_cast<size_t>(p.block_batch * p.block_heads * p.num_blocks_q * width));
        for (int32_t &number : numbers) number = kValues[draw.below(std::size(kValues))];
        (width == 1 ? list->counts : list->indices) = numbers.data();
      }
    }
    EXPECT_NO_THROW(problem.run(kernel, seed)) << "seed " << seed;
  }
}

// A bias or a mask at a time, over dense and packed sequences. Heads of a group, and keys of the last tiles.
TEST_P(NativeKernel, EachBiasAndMask) {
  const BackwardKernel &kernel = GetParam();
  using Change = void (*)(BackwardSpec &);
  constexpr Change kChanges[] = {
      [](BackwardSpec &s) { s.alibi = true; },
      [](BackwardSpec &s) { s.alibi = s.alibi_per_seq = s.causal = true; },
      [](BackwardSpec &s) { s.rel_extent = 40; },
      [](BackwardSpec &s) { s.rel_extent = 200, s.rel_dtype = FLASHSPARK_BFLOAT16, s.causal = true; },
      [](BackwardSpec &s) { s.causal = true, s.prefix_mode = FLASHSPARK_PREFIX_PER_SEQ; },
      [](BackwardSpec &s) {
        s.causal = s.prefix_clamp_window = true, s.window_left = 20, s.prefix_mode = FLASHSPARK_PREFIX_PER_TOKEN;
      },
      [](BackwardSpec &s) { s.rswa_window = 17; },
      [](BackwardSpec &s) { s.attention_chunk = 50; },
  };
  uint64_t seed = 100;
  for (const Change &change : kChanges) {
    for (const bool packed : {false, true}) {
      BackwardSpec s = spec_of(kernel);
      s.tokens = {70, 33}, s.keys = {150, 90}, s.heads_q = 2, s.varlen_q = s.varlen_k = packed;
      change(s);
      check(s, kernel, ++seed);
    }
  }
}

// Ranges show keys to whole blocks of rows before those that a causal mask leaves.
TEST_P(NativeKernel, PrefixRangesReachEarlierBlocks) {
  BackwardSpec s = spec_of(GetParam());
  s.tokens = s.keys = {200}, s.causal = true;
  for (const int32_t mode : {FLASHSPARK_PREFIX_PER_SEQ, FLASHSPARK_PREFIX_PER_TOKEN}) {
    s.prefix_mode = mode;
    check(s, GetParam(), 150 + static_cast<uint64_t>(mode));
  }
}

TEST_P(NativeKernel, BiasesAndMasks) {
  const BackwardKernel &kernel = GetParam();
  std::mt19937_64 rng(20261130);
  for (uint64_t seed = 1; seed <= 12; ++seed) {
    BackwardSpec s = random_spec(rng);
    const BackwardSpec own = spec_of(kernel);
    s.head_dim = own.head_dim, s.head_dim_v = own.head_dim_v, s.functions = own.functions;
    s.rel_dtype = seed % 2 == 0 ? FLASHSPARK_FLOAT16 : FLASHSPARK_FLOAT32;
    s.functions->wish.size_q = seed % 3 == 0 ? 16 : 64, s.functions->wish.size_k = seed % 4 == 0 ? 48 : 64;
    s.functions->wish.per_head = seed % 2 == 0, s.functions->wish.per_batch = seed % 5 != 0;
    check(s, kernel, 200 + seed);
  }
}

// Whatever metadata says, nothing outside of the tensors is read or written.
TEST_P(NativeKernel, SurvivesWildMetadata) {
  const BackwardKernel &kernel = GetParam();
  std::mt19937_64 rng(20261201);
  const uint64_t count = kernel.instance->head_dim > 128 ? 4 : 12;
  for (uint64_t n = 0; n < count; ++n) {
    BackwardSpec s = random_spec(rng);
    const BackwardSpec own = spec_of(kernel);
    s.head_dim = own.head_dim, s.head_dim_v = own.head_dim_v, s.functions = own.functions;
    s.dtype = kernel.dtype, s.deterministic = kernel.in_turns;
    s.alibi = true, s.rel_extent = 30, s.varlen_q = n % 2 == 0, s.varlen_k = n % 3 != 0, s.unused_rows = true;
    BackwardProblem problem(s, n);
    problem.spoil_metadata(rng);
    EXPECT_NO_THROW(problem.run(kernel, n)) << name_of(kernel) << ", " << to_string(s);
  }
}

// All bits of what a problem's captured tensors have for gradients, by CTAs and threads in some order.
std::vector<uint32_t> gradient_bits(const BackwardSpec &spec, const BackwardKernel &kernel, uint64_t order,
                                    int64_t passes) {
  BackwardProblem problem(spec, 3);
  problem.run(kernel, order, passes);
  EXPECT_EQ(problem.compare(kernel), "") << "order " << order << ", passes " << passes;
  std::vector<uint32_t> bits;
  const Params &p = problem.params.forward;
  for (int32_t n = 0; n < p.score_mod.num_tensors; ++n) {
    const flashspark_captured_gradient &gradient = problem.params.dtensors[n];
    const flashspark_captured_tensor &tensor = p.score_mod.tensors[n];
    int64_t last = 0;
    for (int32_t d = 0; d < tensor.rank; ++d) last += (tensor.shape[d] - 1) * gradient.strides[d];
    for (int64_t at = 0; gradient.data != nullptr && at <= last; ++at)
      bits.push_back(std::bit_cast<uint32_t>(gradient.data[at]));
  }
  return bits;
}

// CTAs come in order where dq is summed in turns, and else in any order. Products have the order of the seed.
TEST_P(ExactKernel, SumsHaveNoOrder) {
  const BackwardKernel &kernel = GetParam();
  BackwardSpec s = spec_of(kernel);
  s.dtype = kernel.dtype, s.deterministic = true;
  s.tokens = {70, 100}, s.keys = {150, 130}, s.heads_q = 2, s.heads_kv = 1;
  for (uint64_t order = 1; order < 4; ++order) {
    s.wanted_q = true;
    const std::vector<uint32_t> in_order = gradient_bits(s, kernel, order, 1);
    ASSERT_FALSE(in_order.empty());
    s.wanted_q = false;
    EXPECT_EQ(gradient_bits(s, kernel, order, static_cast<int64_t>(order)), in_order) << order;
  }
}

// Passes behind the first change no other gradient.
TEST_P(ExactKernel, SumsInPasses) {
  const BackwardKernel &kernel = GetParam();
  BackwardSpec s = spec_of(kernel);
  s.dtype = kernel.dtype, s.deterministic = true;
  s.tokens = {70, 100}, s.keys = {150, 130}, s.heads_q = 2, s.heads_kv = 1;
  if (kernel.native) s.alibi = true, s.rel_extent = 30;
  for (const int32_t sm_count : {2, 100}) {
    s.sm_count = sm_count;
    gradient_bits(s, kernel, 7, 3);
  }
}

std::vector<BackwardKernel> all() {
  std::vector<BackwardKernel> kernels;
  for (const BackwardKernel &kernel : backward_kernels()) {
    if (kernel.functions != nullptr) kernels.push_back(kernel);
  }
  return kernels;
}
std::vector<BackwardKernel> those(bool BackwardKernel::*what) {
  std::vector<BackwardKernel> kernels = all();
  std::erase_if(kernels, [&](const BackwardKernel &kernel) { return !(kernel.*what); });
  return kernels;
}
INSTANTIATE_TEST_SUITE_P(BackwardFunctions, EveryKernel, testing::ValuesIn(all()),
                         [](const auto &kernel) { return name_of(kernel.param); });
INSTANTIATE_TEST_SUITE_P(BackwardFunctions, NativeKernel, testing::ValuesIn(those(&BackwardKernel::native)),
                         [](const auto &kernel) { return name_of(kernel.param); });
INSTANTIATE_TEST_SUITE_P(BackwardFunctions, ExactKernel, testing::ValuesIn(those(&BackwardKernel::exact_sums)),
                         [](const auto &kernel) { return name_of(kernel.param); });

// What CMake lists.
TEST(BackwardFunctions, KernelsAreLinkedIn) {
  std::set<const BackwardInstance *> instances;
  int lists = 0, exact = 0, native = 0, native_in_turns = 0;
  for (const BackwardKernel &kernel : all()) {
    instances.insert(kernel.instance);
    lists += kernel.block_sparse ? 1 : 0;
    exact += kernel.exact_sums ? 1 : 0;
    native += kernel.native ? 1 : 0, native_in_turns += kernel.native && kernel.in_turns ? 1 : 0;
  }
  EXPECT_EQ(instances.size(), std::size(kBackwardFunctionInstances));
  EXPECT_GE(lists, 4);
  EXPECT_GE(native, 5);
  EXPECT_GE(native_in_turns, 1);
  EXPECT_GE(exact, 5);
}

}  // namespace
}  // namespace flashspark::emulator
