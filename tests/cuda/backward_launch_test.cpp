// attention_backward on a GPU, with a driver that computes nothing: what is launched, with which arguments and scratch
// memory, and what is refused.
#include <gtest/gtest.h>

#include <algorithm>

#include "cuda/backward.hpp"
#include "cuda/device.hpp"
#include "cuda/fake_cuda.hpp"
#include "cuda/processes.hpp"
#include "flashspark/flashspark.h"
#include "support/functions.hpp"
#include "support/named_graphs.hpp"

namespace flashspark::cuda {
namespace {

void *address(uintptr_t n) {
  return reinterpret_cast<void *>(n << 32);  // far apart: memory that gradients share with tensors is refused
}

class Backward : public testing::Test {
 protected:
  Backward() {
    fake.launches.clear(), fake.order.clear();
    fake_cuda::set_current_device(0);
    flashspark_attention_backward_params_init(&b);
    Params &p = b.forward;
    p.device = FLASHSPARK_CUDA, p.stream = address(99);
    p.num_seqs = 2, p.num_heads_q = 8, p.num_heads_kv = 2, p.head_dim = p.head_dim_v = 128;
    p.max_seqlen_q = 100, p.max_seqlen_k = 300;
    p.q = tensor(1, 100, 8), p.k = tensor(2, 300, 2), p.v = tensor(3, 300, 2), p.out = tensor(4, 100, 8);
    p.lse = static_cast<float *>(address(5));
    p.lse_batch_stride = 800, p.lse_head_stride = 100, p.lse_token_stride = 1;
    b.dout = tensor(6, 100, 8), b.dq = tensor(7, 100, 8), b.dk = tensor(8, 300, 2), b.dv = tensor(9, 300, 2);
  }
  static flashspark_tensor tensor(uintptr_t n, int64_t tokens, int64_t heads) {
    return {address(n), tokens * heads * 128, heads * 128, 128, FLASHSPARK_BFLOAT16, 0};
  }
  void run() { ASSERT_EQ(flashspark_attention_backward(&b), FLASHSPARK_OK) << flashspark_last_error(); }
  std::string explain(flashspark_status expected) {
    std::string text(8192, '\0');
    EXPECT_EQ(flashspark_attention_backward_explain(&b, text.data(), text.size()), expected) << flashspark_last_error();
    return text.c_str();
  }
  void expect_refused(const std::string &why) {
    EXPECT_NE(explain(FLASHSPARK_UNSUPPORTED).find(why), std::string::npos) << explain(FLASHSPARK_UNSUPPORTED);
    EXPECT_EQ(flashspark_attention_backward(&b), FLASHSPARK_UNSUPPORTED);
  }

  fake_cuda::State &fake = fake_cuda::state();
  flashspark_attention_backward_params b;
};

// Of dk and dv: three tiles of 128 keys of two sequences and two heads.
constexpr int64_t kKeySums = int64_t{12} * 128 * (128 + 128);

TEST_F(Backward, LaunchesThreeKernels) {
  run();
  const BackwardPlan plan = make_backward_plan(b, device_facts(0).machine);
  const std::string main = "flashspark_" + plan.main_key().name();
  EXPECT_EQ(fake.order, (std::vector<std::string>{"alloc " + std::to_string(plan.workspace()),
                                                  "flashspark_attention_backward_preprocess_bf16", main,
                                                  "flashspark_attention_backward_postprocess_bf16", "free"}));
  ASSERT_EQ(fake.launches.size(), 3u);
  const Launch *shapes[] = {&plan.preprocess, &plan.main, &plan.postprocess};
  for (size_t n = 0; n < 3; ++n) {
    const fake_cuda::Launch &launch = fake.launches[n];
    EXPECT_EQ(launch.grid[0], shapes[n]->grid[0]);
    EXPECT_EQ(launch.threads, shapes[n]->threads);
    EXPECT_EQ(launch.shared_bytes, shapes[n]->shared_bytes);
    EXPECT_EQ(launch.stream, address(99));
    EXPECT_TRUE(launch.early);
    const BackwardArguments &a = launch.backward;
    EXPECT_TRUE(a.q == address(1) && a.dout == address(6) && a.dq == address(7) && a.dk == address(8) &&
                a.dv == address(9));
    EXPECT_EQ(a.dk_strides.token, 256);
    EXPECT_FLOAT_EQ(a.scale_log2, b.forward.softmax_scale * 1.44269504f);
  }
  const BackwardArguments &a = fake.launches[1].backward;
  EXPECT_EQ(a.padded_rows, 2 * 128);  // of two sequences of 100 tokens each
  EXPECT_EQ(a.head_parts, 4);         // the heads of a group are of a CTA each, and dk and dv have sums
  EXPECT_EQ(a.num_pieces, 0);
  EXPECT_EQ(plan.postprocess.grid[0], plan.preprocess.grid[0] + 12 * 4);
  EXPECT_EQ(plan.workspace(), (size_t{8} * 256 * (128 + 2) + kKeySums) * sizeof(float));
  EXPECT_EQ(a.dk_sum - a.dq_sum, 8 * 256 * 128);
  EXPECT_EQ(a.dv_sum - a.dk_sum, kKeySums / 2);
  EXPECT_EQ(a.row_lse - a.dv_sum, kKeySums / 2);
  EXPECT_EQ(a.row_delta - a.row_lse, 8 * 256);
  EXPECT_EQ(a.piece_sums, nullptr);
  EXPECT_EQ(a.piece_flags, nullptr);
  EXPECT_EQ(a.added_blocks, nullptr);
  EXPECT_NE(explain(FLASHSPARK_OK).find(plan.main_key().name() + ": grid "), std::string::npos);
}

// Four CTAs an equal tile; where lengths differ no CTA knows what the others do.
TEST_F(Backward, EqualPartsOfTiles) {
  Params &p = b.forward;
  p.max_seqlen_q = 400;
  p.q = tensor(1, 400, 8), p.out = tensor(4, 400, 8), b.dout = tensor(6, 400, 8), b.dq = tensor(7, 400, 8);
  p.lse_batch_stride = 3200, p.lse_head_stride = 400;
  run();
  const BackwardPlan plan = make_backward_plan(b, device_facts(0).machine);
  const BackwardArguments &a = fake.launches[1].backward;
  EXPECT_EQ(a.num_pieces, 48);
  EXPECT_EQ(a.head_parts, 1);
  EXPECT_EQ(a.head_length.value, 2u + 4 * 13 + 2 + 4 * 13 + 2 + 4 * 13);  // in blocks of 32 rows
  EXPECT_EQ(a.piece_length, 162 * 4 / 48);
  EXPECT_EQ(a.longer_pieces, 162 * 4 % 48);
  EXPECT_EQ(plan.main.grid[0], 48u);
  EXPECT_EQ(plan.postprocess.grid[0], plan.preprocess.grid[0]);  // dq alone
  EXPECT_EQ(a.piece_sums - a.dq_sum, int64_t{8} * a.padded_rows * 128);
  EXPECT_EQ(reinterpret_cast<float *>(a.piece_flags) - a.piece_sums, int64_t{48} * 128 * (128 + 128));
  EXPECT_EQ(a.added_blocks - a.piece_flags, 48 * 8);
  EXPECT_EQ(a.head_blocks, 3 * 13);
  EXPECT_EQ(a.row_lse - reinterpret_cast<float *>(a.added_blocks), 2 * 8);
  EXPECT_EQ(a.dk_sum, nullptr);
  EXPECT_NE(explain(FLASHSPARK_OK).find(", equal parts of all tiles"), std::string::npos);
  p.seqused_k = static_cast<int32_t *>(address(40));
  EXPECT_EQ(make_backward_plan(b, device_facts(0).machine).arguments.num_pieces, 0);
}

TEST_F(Backward, ScratchMemoryOfTheCaller) {
  size_t bytes = 0;
  ASSERT_EQ(flashspark_attention_backward_workspace_size(&b, &bytes), FLASHSPARK_OK);
  b.workspace = address(20), b.workspace_size = bytes;
  run();
  EXPECT_EQ(fake.order.size(), 3u) << "no memory is taken";
  EXPECT_EQ(fake.launches[0].backward.dq_sum, b.workspace);
  b.workspace_size -= 1;
  EXPECT_EQ(flashspark_attention_backward(&b), FLASHSPARK_INVALID_ARGUMENT);
}

TEST_F(Backward, WithoutDqNothingIsSummed) {
  b.dq.data = nullptr;
  run();
  ASSERT_EQ(fake.launches.size(), 3u);  // the last one for dk and dv
  EXPECT_EQ(fake.launches[1].backward.dq_sum, nullptr);
  EXPECT_EQ(fake.launches[2].grid[0], 12 * 4);
  b.dk.data = b.dv.data = nullptr, b.dq = tensor(7, 100, 8);
  run();
  EXPECT_EQ(fake.launches.back().backward.dk_sum, nullptr);
  EXPECT_EQ(fake.launches.back().backward.dv_sum, nullptr);
}

TEST_F(Backward, DeterministicOnesTakeTurns) {
  b.forward.deterministic = 1, b.forward.seqused_k = static_cast<const int32_t *>(address(40));
  run();
  const BackwardPlan plan = make_backward_plan(b, device_facts(0).machine);
  const BackwardArguments &a = fake.launches[1].backward;
  EXPECT_EQ(a.head_parts, 2);  // of four query heads: two sums are added to 0
  EXPECT_NE(a.dk_sum, nullptr);
  EXPECT_EQ(a.dq_sum_rows, 0);
  ASSERT_NE(a.dq_turns, nullptr);
  EXPECT_EQ(reinterpret_cast<char *>(a.dq_sum) - reinterpret_cast<char *>(a.dq_turns),
            int64_t{8} * a.num_row_blocks * 4);
  EXPECT_EQ(plan.workspace(), (size_t{8} * (256 * (128 + 2) + static_cast<size_t>(a.num_row_blocks)) + kKeySums) * 4);
  b.dq.data = nullptr;
  run();
  EXPECT_EQ(fake.launches.back().backward.dq_turns, nullptr);
}

TEST_F(Backward, DeterministicOnesHaveTwoSumsOfDqOnSmallGrids) {
  b.forward.deterministic = 1, b.forward.max_seqlen_k = 200;
  run();
  const BackwardPlan plan = make_backward_plan(b, device_facts(0).machine);
  const BackwardArguments &a = fake.launches[1].backward;
  EXPECT_GT(a.num_walks, 0);
  EXPECT_EQ(a.dq_sum_rows, 8 * 256);
  EXPECT_EQ(plan.dq_bytes, size_t{2} * 8 * 256 * 128 * sizeof(float));
  EXPECT_EQ(reinterpret_cast<char *>(a.dq_sum) - reinterpret_cast<char *>(a.dq_turns),
            int64_t{2} * 8 * a.num_row_blocks * 4);
  EXPECT_NE(explain(FLASHSPARK_OK).find("dq in float32, twice"), std::string::npos);
}

// Parts of dsinks and dalibi_slopes lie behind dq's sums and the rows' values; a fourth kernel adds them.
TEST_F(Backward, GradientsOfSinksAndSlopesAreSummedInOrder) {
  b.forward.sinks = address(30), b.forward.sinks_dtype = FLASHSPARK_FLOAT32;
  b.forward.alibi_slopes = static_cast<float *>(address(31)), b.forward.alibi_batch_stride = 8;
  b.dsinks = static_cast<float *>(address(32)), b.dalibi_slopes = static_cast<float *>(address(33));
  run();
  const BackwardPlan plan = make_backward_plan(b, device_facts(0).machine);
  ASSERT_EQ(fake.launches.size(), 4u);
  EXPECT_EQ(fake.order[4], "flashspark_attention_backward_sums");
  EXPECT_EQ(fake.launches[3].grid[0], (8 + 2 * 8) / 4);  // a warp a number
  const BackwardArguments &a = fake.launches[3].backward;
  EXPECT_TRUE(a.dsinks == b.dsinks && a.dalibi_slopes == b.dalibi_slopes);
  EXPECT_EQ(a.key_tile, plan.tile->keys());
  EXPECT_EQ(a.key_slots, 2 * ((300 + a.key_tile - 1) / a.key_tile));
  EXPECT_EQ(a.sink_sums - a.row_delta, 8 * a.padded_rows);
  EXPECT_EQ(a.slope_sums - a.sink_sums, 8 * a.num_row_blocks * 4);
  EXPECT_EQ(plan.workspace(), (size_t{8} * 256 * (128 + 2) + kKeySums + static_cast<size_t>(8 * a.num_row_blocks * 4) +
                               size_t{8} * static_cast<size_t>(a.key_slots * plan.tile->warps)) *
                                  sizeof(float));
  EXPECT_NE(explain(FLASHSPARK_OK).find("attention_backward_sums: grid "), std::string::npos);
}

TEST_F(Backward, ABiasWithoutAGradientHasNoSums) {
  b.forward.alibi_slopes = static_cast<float *>(address(31));
  b.forward.rel_logits = address(32), b.forward.rel_dtype = FLASHSPARK_FLOAT32;
  b.forward.rel_extent = 64, b.forward.rel_head_stride = 64, b.forward.rel_token_stride = 512;
  run();
  ASSERT_EQ(fake.launches.size(), 3u);
  EXPECT_EQ(fake.launches[1].backward.slope_sums, nullptr);
  EXPECT_EQ(fake.launches[1].backward.rel_logits, address(32));
  b.drel_logits = static_cast<float *>(address(33));
  run();
  ASSERT_EQ(fake.launches.size(), 6u);
  EXPECT_EQ(fake.launches[4].backward.drel_logits, b.drel_logits);
}

TEST_F(Backward, KernelsByHeadTypeAndModification) {
  const auto kernel = [&] { return make_backward_plan(b, device_facts(0).machine).main_key().name(); };
  b.forward.softcap = 5;
  EXPECT_EQ(kernel(), "attention_backward_d128_mod_bf16");
  b.forward.softcap = 0, b.forward.dropout_p = 0.1f, b.forward.head_dim = b.forward.head_dim_v = 72;
  EXPECT_EQ(kernel(), "attention_backward_d96_mod_bf16");
  b.forward.dropout_p = 0, b.forward.head_dim = b.forward.head_dim_v = 64, b.forward.q.dtype = FLASHSPARK_FLOAT16;
  EXPECT_EQ(kernel(), "attention_backward_d64_fp16");
  b.forward.head_dim = 72;
  EXPECT_EQ(kernel(), "attention_backward_d96_fp16");
  b.forward.head_dim = 136;
  EXPECT_EQ(kernel(), "attention_backward_d192_fp16");
  b.forward.head_dim = 256;
  EXPECT_EQ(kernel(), "attention_backward_d256_fp16");
  b.forward.softcap = 5;
  EXPECT_EQ(kernel(), "attention_backward_d256_mod_fp16");
  b.forward.softcap = 0, b.forward.dropout_p = 0.1f, b.forward.head_dim = 192;
  EXPECT_EQ(kernel(), "attention_backward_d192_mod_fp16");
  b.forward.head_dim = b.forward.head_dim_v = 128;
  EXPECT_EQ(kernel(), "attention_backward_d128_dropout_fp16");
  b.forward.head_dim = 104;
  EXPECT_EQ(kernel(), "attention_backward_d128_dropout_fp16");
  b.forward.deterministic = 1;  // it knows no turns
  EXPECT_EQ(kernel(), "attention_backward_d128_mod_fp16");
  b.forward.deterministic = 0, b.forward.dropout_p = 0.995f;  // P times the scale would leave fp16
  EXPECT_EQ(kernel(), "attention_backward_d128_mod_fp16");
  b.forward.dropout_p = 0.1f, b.forward.softcap = 5;
  EXPECT_EQ(kernel(), "attention_backward_d128_mod_fp16");
  b.forward.softcap = 0, b.forward.dropout_p = 0, b.forward.head_dim = b.forward.head_dim_v = 128;
  // Each of these is a modification.
  const auto modified = [&](auto set) {
    const Params before = b.forward;
    set(b.forward);
    EXPECT_EQ(kernel(), "attention_backward_d128_mod_fp16");
    b.forward = before;
  };
  modified([](Params &p) { p.alibi_slopes = static_cast<float *>(address(31)); });
  modified([](Params &p) { p.rel_logits = address(32); });
  modified([](Params &p) { p.prefix_mode = FLASHSPARK_PREFIX_PER_SEQ; });
  modified([](Params &p) { p.rswa_window = 64; });
  modified([](Params &p) { p.attention_chunk = 64; });
}

// A function that captures a tensor, and lists: two launches more, before the others, and the lists' bytes.
TEST_F(Backward, FunctionsAndLists) {
  if (!has_nvrtc()) GTEST_SKIP() << description_in_a_child();
  const graph::Graph alibi = *test::named("alibi").score();
  flashspark_mod *mod = test::make_mod(alibi, true);
  const flashspark_captured_tensor slopes{address(40), FLASHSPARK_FLOAT32, 1, {8}, {2}};
  const flashspark_captured_gradient gradient{static_cast<float *>(address(41)), {3}};
  Params &p = b.forward;
  p.score_mod = {mod, &slopes, nullptr, 1, 0};
  b.dtensors = &gradient;
  p.masked_blocks.counts = static_cast<int32_t *>(address(42));
  p.masked_blocks.indices = static_cast<int32_t *>(address(43));
  p.masked_blocks.width = 5;
  p.block_size_q = 16, p.block_size_k = 64, p.num_blocks_q = 7, p.block_batch = 2, p.block_heads = 8;
  run();
  BackwardPlan plan = make_backward_plan(b, device_facts(0).machine);
  ASSERT_TRUE(plan.functions);
  EXPECT_EQ(plan.main_key().name(), "attention_backward_d128_functions_mod_bf16");
  EXPECT_EQ(plan.functions->bytes, size_t{2 * 8 * 7 * 5});
  EXPECT_EQ(fake.order,
            (std::vector<std::string>{
                "alloc " + std::to_string(plan.workspace()), "flashspark_attention_backward_clear",
                "flashspark_attention_backward_blocks", "flashspark_attention_backward_preprocess_bf16",
                "flashspark_attention_backward_functions", "flashspark_attention_backward_postprocess_bf16", "free"}));
  ASSERT_EQ(fake.launches.size(), 5u);
  const ClearArguments &clear = fake.launches[0].clear;
  EXPECT_TRUE(clear.num_tensors == 1 && clear.tensors[0].gradient.data == gradient.data &&
              clear.tensors[0].elements == 8 && clear.tensors[0].gradient.strides[0] == 3);
  const FunctionBackwardArguments &a = fake.launches[3].backward_functions;
  EXPECT_TRUE(a.q == p.q.data && a.gradients[0].data == gradient.data && a.functions.tensors[0].data == slopes.data);
  EXPECT_EQ(a.group.value, 4u) << "heads of a group stay together, whatever the lists are";
  EXPECT_EQ(a.blocks.data, fake.launches[1].blocks.table.data);
  EXPECT_TRUE(a.blocks.query_blocks == 7 && a.blocks.key_blocks == 5 && a.blocks.head_stride == 35);
  EXPECT_EQ(a.blocks.data - reinterpret_cast<uint8_t *>(a.row_delta), 8 * 256 * 4);
  EXPECT_NE(explain(FLASHSPARK_OK).find("compiled at run time, over block lists"), std::string::npos);

  // Pairs of warps that hand on P^T have no gradients of captured tensors, and 32 keys a warp, which lie in one block.
  const auto chosen = [&] { return make_backward_plan(b, device_facts(0).machine).main_key().name(); };
  b.dtensors = nullptr;
  EXPECT_EQ(chosen(), "attention_backward_d128_functions_bf16");
  p.block_size_k = 48;
  EXPECT_EQ(chosen(), "attention_backward_d128_functions_mod_bf16");
  p.block_size_k = 32, p.dropout_p = 0.5f;
  EXPECT_EQ(chosen(), "attention_backward_d128_functions_mod_bf16");
  p.dropout_p = 0, p.softcap = 5;
  EXPECT_EQ(chosen(), "attention_backward_d128_functions_mod_bf16");
  p.softcap = 0;
  EXPECT_EQ(chosen(), "attention_backward_d128_functions_bf16");
  b.dtensors = &gradient, p.block_size_k = 64;

  flashspark_mod_release(mod);
}

// Built-in biases and masks beside functions: a kernel of its own for each of both, which is compiled once. Their
// gradients come of the launches that they come of without functions.
TEST_F(Backward, BiasesAndMasksBesideFunctions) {
  if (!has_nvrtc()) GTEST_SKIP() << description_in_a_child();
  flashspark_mod *mod = test::make_mod(*test::named("softcap").score(), true);
  Params &p = b.forward;
  p.score_mod = {mod, nullptr, nullptr, 0, 0};
  const auto plan = [&] { return make_backward_plan(b, device_facts(0).machine); };
  EXPECT_FALSE(plan().functions->native);
  EXPECT_EQ(plan().main_key().name(), "attention_backward_d128_functions_bf16");
  EXPECT_EQ(explain(FLASHSPARK_OK).find("beside built-in"), std::string::npos);
  const auto beside = [&](auto set) {
    const Params before = p;
    set(p);
    EXPECT_TRUE(plan().functions->native);
    EXPECT_EQ(plan().main_key().name(), "attention_backward_d128_functions_mod_bf16");
    const CompileRequest request =
        backward_function_request(p, *plan().functions, plan().main_key(), Architecture::sm_120f);
    EXPECT_NE(std::find(request.macros.begin(), request.macros.end(), "FLASHSPARK_NATIVE=1"), request.macros.end());
    EXPECT_NE(explain(FLASHSPARK_OK).find("compiled at run time, beside built-in biases or masks"), std::string::npos);
    p = before;
  };
  beside([](Params &q) { q.alibi_slopes = static_cast<float *>(address(31)); });
  beside([](Params &q) { q.rel_logits = address(32), q.rel_dtype = FLASHSPARK_FLOAT32, q.rel_extent = 8; });
  beside([](Params &q) {
    q.prefix_mode = FLASHSPARK_PREFIX_PER_SEQ, q.num_prefix_ranges = 1;
    q.prefix_ranges = static_cast<int32_t *>(address(33));
  });
  beside([](Params &q) { q.rswa_window = 64, q.rswa_prefix_lens = static_cast<int32_t *>(address(34)); });
  beside([](Params &q) { q.attention_chunk = 64; });

  run();
  p.alibi_slopes = static_cast<float *>(address(31));
  p.rel_logits = address(32), p.rel_dtype = FLASHSPARK_FLOAT32, p.rel_extent = 8;
  p.rel_head_stride = 8, p.rel_token_stride = 64;
  b.dalibi_slopes = static_cast<float *>(address(35)), b.drel_logits = static_cast<float *>(address(36));
  fake.order.clear(), fake.launches.clear();
  run();
  ASSERT_EQ(fake.launches.size(), 4u);
  EXPECT_EQ(fake.order[2], "flashspark_attention_backward_functions");
  EXPECT_EQ(fake.order[4], "flashspark_attention_backward_sums");
  const FunctionBackwardArguments &a = fake.launches[1].backward_functions;
  EXPECT_TRUE(a.alibi_slopes == p.alibi_slopes && a.rel_logits == p.rel_logits && a.drel_logits == b.drel_logits);
  EXPECT_NE(a.slope_sums, nullptr);
  p.deterministic = 1;
  EXPECT_TRUE(plan().functions->in_turns && plan().functions->native);
  explain(FLASHSPARK_OK);
  flashspark_mod_release(mod);
}

// Exact sums of captured tensors' gradients: they are cleared and rounded in the gradients' place, and what does not
// fit at once takes passes of clear, main kernel and round.
TEST_F(Backward, DeterministicGradientsOfCapturedTensors) {
  if (!has_nvrtc()) GTEST_SKIP() << description_in_a_child();
  const graph::Graph bias = *test::named("bias_3d").score();
  flashspark_mod *mod = test::make_mod(bias, true);
  flashspark_captured_tensor tensor{address(40), FLASHSPARK_BFLOAT16, 3, {8, 200, 300}, {60000, 300, 1}};
  flashspark_captured_gradient gradient{static_cast<float *>(address(41)), {1, 8, 1600}};
  b.forward.score_mod = {mod, &tensor, nullptr, 1, 0};
  b.dtensors = &gradient;
  const auto plan = [&] { return make_backward_plan(b, device_facts(0).machine); };
  EXPECT_FALSE(plan().functions->sums_exactly());
  b.forward.deterministic = 1;
  run();
  EXPECT_EQ(plan().main_key().name(), "attention_backward_d128_functions_mod_bf16");
  const std::vector<std::string> order{
      "flashspark_attention_backward_clear", "flashspark_attention_backward_preprocess_bf16",
      "flashspark_attention_backward_functions", "flashspark_attention_backward_postprocess_bf16",
      "flashspark_attention_backward_round"};
  const auto launched = [&] { return std::vector<std::string>(fake.order.begin() + 1, fake.order.end() - 1); };
  EXPECT_EQ(launched(), order);
  const int64_t elements = 8 * 200 * 300;
  const RoundArguments round = fake.launches[4].round;
  EXPECT_TRUE(round.num_tensors == 1 && round.tensors[0].gradient.data == gradient.data && round.first == 0);
  EXPECT_EQ(round.sums.count, elements);
  EXPECT_EQ(plan().functions->bytes, static_cast<size_t>(elements * 84));
  EXPECT_EQ(reinterpret_cast<char *>(round.sums.words) - reinterpret_cast<char *>(round.sums.special), elements * 4);
  const ClearArguments &clear = fake.launches[0].clear;
  EXPECT_TRUE(clear.num_tensors == 1 && clear.tensors[0].gradient.data == round.sums.special);
  EXPECT_EQ(clear.tensors[0].elements, elements * 21);
  const FunctionBackwardArguments &a = fake.launches[2].backward_functions;
  EXPECT_TRUE(a.gradients[0].data == round.sums.special && a.gradients[0].strides[0] == 60000 &&
              a.gradients[0].strides[1] == 300 && a.gradients[0].strides[2] == 1);
  EXPECT_EQ(a.exact_sums.words, round.sums.words);
  EXPECT_NE(explain(FLASHSPARK_OK).find("exact sums for captured tensors"), std::string::npos);

  tensor.shape[1] = 2000, tensor.shape[2] = 4000, gradient.strides[2] = 16000;
  fake.order.clear(), fake.launches.clear();
  run();
  std::vector<std::string> passes = order;
  for (const int more : {1, 2}) {
    (void)more;
    passes.insert(passes.end(), {order[0], order[2], order[4]});
  }
  EXPECT_EQ(launched(), passes);
  EXPECT_LE(plan().functions->bytes, size_t{2} << 30);
  EXPECT_NE(explain(FLASHSPARK_OK).find("in 3 passes"), std::string::npos);
  const int64_t of_pass = 8 * 2000 * 4000 / 3 + 1;
  const size_t main_of_pass[] = {2, 6, 9};
  for (int64_t pass = 0; pass < 3; ++pass) {
    const FunctionBackwardArguments &main = fake.launches[main_of_pass[pass]].backward_functions;
    const RoundArguments &its_round = fake.launches[pass == 0 ? 4 : main_of_pass[pass] + 1].round;
    EXPECT_EQ(its_round.first, pass * of_pass);
    EXPECT_EQ(its_round.sums.special - main.gradients[0].data, pass * of_pass);
    EXPECT_EQ(main.dq_sum != nullptr, pass == 0);
    EXPECT_EQ(main.dk != nullptr, pass == 0);
  }
  flashspark_mod_release(mod);
}

TEST_F(Backward, RefusesWhatItCannotDo) {
  b.dout.token_stride = 1028, b.dout.batch_stride = 1028 * 200;
  expect_refused("dout token_stride 1028 is not a multiple of 8");
}

}  // namespace
}  // namespace flashspark::cuda
