// Forward kernels with the user's functions and block lists, on random problems: every kernel that is linked in has
// named functions of its own (CMakeLists.txt). Also wild lists, which must not make a kernel read outside them.
#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>
#include <numeric>
#include <set>

#include "attention/harness.hpp"
#include "cases/random.hpp"
#include "support/functions.hpp"
#include "support/named_graphs.hpp"

namespace flashspark::emulator {
namespace {

using cases::Case;
using cases::Layout;

using Draw = cases::Random;

bool is_native(const Kernel &kernel) {
  return kernel.instance->score_mod == ScoreMod::native;
}

void choose_heads(Draw &draw, const Kernel &kernel, Case &c) {
  c.heads_kv = draw.from(1, 2);
  c.heads_q = c.heads_kv * draw.of<int64_t>({1, 1, 2, 3, 4, 8});
  const Instance &instance = *kernel.instance;
  const int64_t unit = kernel.dtype == FLASHSPARK_FLOAT8_E4M3 ? 16 : 8;
  c.head_dim = instance.head_dim - (draw.one_in(4) ? unit * draw.from(1, 3) : 0);
  c.head_dim_v = instance.head_dim_v - (draw.one_in(4) ? unit * draw.from(1, 3) : 0);
  c.q_dtype = c.kv_dtype = c.out_dtype = kernel.dtype;
  if (kernel.dtype != FLASHSPARK_FLOAT8_E4M3) return;
  c.q_dtype = c.out_dtype = draw.of({FLASHSPARK_BFLOAT16, FLASHSPARK_FLOAT16});
  if (draw.one_in(2)) c.q_descale = c.k_descale = c.v_descale = cases::Descale::kFull;
}

void choose_lengths(Draw &draw, const Kernel &kernel, Case &c) {
  // The unit of cost is 16 rows x 16 keys x 64 columns of K and of V.
  int64_t budget = 800;
  const int64_t group = c.heads_q / c.heads_kv, columns = (c.head_dim + c.head_dim_v + 127) / 128;
  // Stream-K takes few tokens against many keys.
  const bool few = supports_stream_k(*kernel.instance), decode = few && !draw.one_in(3);
  c.lens.resize(static_cast<size_t>(draw.from(1, decode ? 7 : 4)));
  for (cases::SeqLen &len : c.lens) {
    len.q = draw.one_in(8) ? 0 : decode || draw.one_in(5) ? draw.from(1, 2) : draw.from(1, few ? 20 : 150);
    len.k = draw.one_in(12) ? draw.from(0, 20) : draw.from(1, 500);
    const auto cost = [&] { return c.heads_kv * ((len.q * group + 15) / 16) * (len.k / 16 + 1) * columns; };
    while (cost() > budget && len.q > 1) len.q /= 2;
    while (cost() > budget && len.k > 8) len.k /= 2;
    budget = std::max<int64_t>(50, budget - cost());
  }
}

void choose_layout(Draw &draw, const Kernel &kernel, Case &c) {
  c.q_layout = draw.of({Layout::kDense, Layout::kVarlen});
  c.kv_layout = draw.of({Layout::kPaged, Layout::kVarlen, Layout::kDense});
  c.page_size = draw.of<int64_t>({16, 32, 64, 256});
  if (is_native(kernel) && draw.one_in(4)) c.page_size = draw.from(1, 50);
  c.packed_kv = draw.one_in(4), c.strided = draw.one_in(4);
  c.seqused_q = draw.one_in(4), c.seqused_k = draw.one_in(4);
  // Lists count keys from behind the left padding, tiles from before it: only derived lists know of it.
  const bool takes_padding = !kernel.block_sparse || kernel.block_tiles;
  if (c.kv_layout != Layout::kVarlen && takes_padding && draw.one_in(3))
    c.leftpad = draw.from(1, kernel.block_tiles && draw.one_in(2) ? 120 : 20);
}

void choose_mask(Draw &draw, const Kernel &kernel, Case &c) {
  c.causal = draw.one_in(2);
  if (draw.one_in(4)) c.window_left = draw.from(0, 150);
  if (draw.one_in(6)) c.window_right = draw.from(0, 60);
  c.sinks = draw.one_in(4);
  c.num_splits = draw.of({0, 0, 0, 0, 1, 2, 3});
  c.lse = !draw.one_in(5);
  if (!is_native(kernel)) return;
  if (draw.one_in(3)) c.softcap = static_cast<float>(draw.from(5, 30));
  if (draw.one_in(4)) c.alibi = true;
  if (draw.one_in(4)) c.rel_extent = draw.from(1, 90);
  if (draw.one_in(5)) c.attention_chunk = draw.from(10, 120);
  if (draw.one_in(4)) c.prefix_mode = FLASHSPARK_PREFIX_PER_SEQ;
}

Case random_case(Draw &draw, const Kernel &kernel, uint64_t seed) {
  Case c;
  c.name = "seed " + std::to_string(seed);
  c.seed = seed;
  choose_heads(draw, kernel, c);
  choose_lengths(draw, kernel, c);
  choose_layout(draw, kernel, c);
  choose_mask(draw, kernel, c);
  if (draw.one_in(6)) c.out_dtype = FLASHSPARK_FLOAT8_E4M3;
  if (kernel.dropout) {
    c.dropout = draw.of({0.1f, 0.25f, 0.5f, 0.9f});
    c.dropout_seed = draw.bits(), c.dropout_offset = draw.bits();
    c.dropout_state = draw.one_in(2);
  }
  return c;
}

// Blocks that the kernel's tile divides, mostly the smallest such; of kernels with derived lists, any.
test::BlockListWish list_wish(Draw &draw, const Kernel &kernel, const Case &c) {
  const Tile &tile = kernel.instance->tile(kernel.tiles);
  test::BlockListWish wish;
  wish.per_batch = draw.one_in(2), wish.per_head = draw.one_in(2);
  wish.masked = !draw.one_in(5), wish.full = !wish.masked || !draw.one_in(5);
  if (kernel.block_tiles) {
    wish.size_q = draw.of<int64_t>({16, 16, 32, 48, 80, 128, 1 << 20});
    wish.size_k = draw.of<int64_t>({16, 16, 32, 48, 80, 128, 1 << 20});
    // Some key tiles are to be of full blocks alone, others of unlisted ones.
    if (draw.one_in(3)) wish.none = 1, wish.all = 12;
    if (draw.one_in(3)) wish.none = 12, wish.all = 1;
    return wish;
  }
  const int64_t group = c.heads_q / c.heads_kv;
  const bool packed = 16 % group == 0 && !(wish.per_head && c.heads_q > 1);
  const int64_t tokens = packed ? tile.rows() / group : tile.rows();
  wish.size_q = std::lcm(int64_t{16}, tokens) * draw.of<int64_t>({1, 1, 2, 3});
  wish.size_k = std::lcm(int64_t{16}, int64_t{tile.keys}) * draw.of<int64_t>({1, 1, 2, 3});
  return wish;
}

// The kernel's functions, and lists where it takes them, for any problem.
class KernelFunctions {
 public:
  explicit KernelFunctions(const Kernel &kernel) {
    const test::NamedFunctions functions = test::named(kernel.functions);
    for (const bool is_score : {true, false}) {
      const auto graph = is_score ? functions.score() : functions.mask();
      if (!graph) continue;
      captures_.push_back(std::make_unique<test::Captures>(*graph, 3));
      given_.push_back(std::make_unique<test::Function>(*graph, is_score, captures_.back()->get()));
    }
  }
  void give(cases::Problem &problem) const {
    for (const auto &function : given_) function->give(problem.params);
  }

 private:
  std::vector<std::unique_ptr<test::Captures>> captures_;
  std::vector<std::unique_ptr<test::Function>> given_;
};

// Whether the plan takes lists as the kernel does.
bool takes_lists_as(const Kernel &kernel, const Params &p) {
  const bool fits = cuda::fits_blocks(cuda::shape_of(p), kernel.instance->tile(kernel.tiles));
  return fits == !kernel.block_tiles;
}

// FLASHSPARK_FUNCTION_PROBLEMS: more of them, by hand.
uint64_t problem_count() {
  const char *wanted = std::getenv("FLASHSPARK_FUNCTION_PROBLEMS");
  return wanted != nullptr ? std::strtoull(wanted, nullptr, 10) : 15;
}

class EveryFunctionKernel : public testing::TestWithParam<Kernel> {};

TEST_P(EveryFunctionKernel, RunsRandomProblems) {
  const Kernel &kernel = GetParam();
  const KernelFunctions functions(kernel);
  const uint64_t problems = problem_count();
  uint64_t ran = 0;
  for (uint64_t seed = 1; ran < problems; ++seed) {
    ASSERT_LT(seed, 5 * problems);
    Draw draw(seed, 'e');
    const Case spec = random_case(draw, kernel, seed);
    const test::BlockListWish wish = list_wish(draw, kernel, spec);
    std::unique_ptr<test::BlockLists> lists;
    const auto complete = [&](cases::Problem &problem) {
      functions.give(problem);
      if (!kernel.block_sparse) return;
      if (lists == nullptr) lists = std::make_unique<test::BlockLists>(problem.params, wish, seed);
      lists->give(problem.params);
    };
    cases::Problem problem(spec);
    complete(problem);
    if (!can_run(kernel, problem) || !takes_lists_as(kernel, problem.params)) continue;
    EXPECT_EQ(check(spec, &kernel, seed, complete), "") << wish.size_q << " x " << wish.size_k;
    ++ran;
  }
}

// Of every other seed lengths and paddings, too, which derived lists follow.
void make_lengths_wild(Draw &draw, const Params &p) {
  constexpr int32_t kValues[] = {INT32_MIN, -7, 0, 1, 9, 30, 300, 1 << 30, INT32_MAX};
  for (const int32_t *numbers : {p.cu_seqlens_q, p.seqused_q, p.seqused_k, p.leftpad_k}) {
    if (numbers == nullptr) continue;
    for (int64_t n = 0; n < p.num_seqs; ++n)
      const_cast<int32_t *>(numbers)[n] = kValues[draw.below(std::size(kValues))];
  }
}

// Counts and blocks that are out of range: whatever the result is, nothing outside the tensors is read.
TEST_P(EveryFunctionKernel, SurvivesWildLists) {
  const Kernel &kernel = GetParam();
  if (!kernel.block_sparse) return;
  const KernelFunctions functions(kernel);
  constexpr int32_t kValues[] = {INT32_MIN, -100000, -1, 0, 1, 2, 3, 100000, 1 << 30, INT32_MAX};
  for (uint64_t seed = 1; seed <= 12; ++seed) {
    Draw draw(seed, 'e');
    Case spec = random_case(draw, kernel, seed);
    spec.lens = {{20, 400}, {1, 90}};
    const test::BlockListWish wish = list_wish(draw, kernel, spec);
    cases::Problem problem(spec);
    functions.give(problem);
    const test::BlockLists lists(problem.params, wish, seed);
    lists.give(problem.params);
    // Arrays of their own, which end where the lists do.
    const int64_t rows = lists.batch() * lists.heads() * lists.blocks_q();
    std::vector<std::vector<int32_t>> arrays;
    for (flashspark_block_list *list : {&problem.params.masked_blocks, &problem.params.full_blocks}) {
      if (list->counts == nullptr) continue;
      list->width = 2;
      list->count_block_stride = 1, list->index_block_stride = 2;
      list->count_head_stride = lists.blocks_q(), list->index_head_stride = 2 * lists.blocks_q();
      list->count_batch_stride = lists.heads() * lists.blocks_q(),
      list->index_batch_stride = 2 * list->count_batch_stride;
      for (const int64_t width : {1, 2}) {
        std::vector<int32_t> &numbers = arrays.emplace_back(static_cast<size_t>(rows * width));
        for (int32_t &number : numbers) number = kValues[draw.below(std::size(kValues))];
        (width == 1 ? list->counts : list->indices) = numbers.data();
      }
    }
    if (!can_run(kernel, problem) || !takes_lists_as(kernel, problem.params)) continue;
    if (seed % 2 == 0) make_lengths_wild(draw, problem.params);
    EXPECT_NO_THROW(execute(problem.params, &kernel, seed)) << "seed " << seed;
  }
}

std::vector<Kernel> all() {
  return {kernels().begin(), kernels().end()};
}
INSTANTIATE_TEST_SUITE_P(Functions, EveryFunctionKernel, testing::ValuesIn(all()),
                         [](const auto &kernel) { return name_of(kernel.param); });

// What CMake lists.
TEST(Functions, KernelsAreLinkedIn) {
  std::set<std::string> names;
  int lists = 0, block_tiles = 0, native = 0, e4m3 = 0, dropout = 0;
  for (const Kernel &kernel : kernels()) {
    EXPECT_TRUE(names.insert(name_of(kernel)).second) << name_of(kernel);
    EXPECT_NE(test::named(kernel.functions).name, nullptr) << name_of(kernel);
    lists += kernel.block_sparse ? 1 : 0;
    block_tiles += kernel.block_tiles ? 1 : 0;
    native += is_native(kernel) ? 1 : 0;
    dropout += kernel.dropout ? 1 : 0;
    e4m3 += kernel.dtype == FLASHSPARK_FLOAT8_E4M3 ? 1 : 0;
  }
  EXPECT_GE(names.size(), 18u);
  EXPECT_TRUE(lists >= 5 && block_tiles >= 6 && native >= 2 && e4m3 >= 2 && dropout >= 8);
}

}  // namespace
}  // namespace flashspark::emulator
