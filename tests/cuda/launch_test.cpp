// From the C interface to the driver, with a driver that has no GPU: which kernels are launched and how, contexts,
// captures, scratch memory, threads, fork, and what is said where something is missing.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <set>
#include <thread>
#include <vector>

#include "cuda/device.hpp"
#include "cuda/fake_cuda.hpp"
#include "cuda/fatbins.hpp"
#include "cuda/module.hpp"
#include "cuda/plan.hpp"
#include "cuda/processes.hpp"
#include "error.hpp"
#include "flashspark/flashspark.h"

namespace flashspark::cuda {
namespace {

// Kernels that are compiled here do not belong into the user's cache.
[[maybe_unused]] const int kNoCache = setenv("FLASHSPARK_CACHE", "0", 1);

constexpr int kOld = 2, kDatacenter = 3, kHopper = 4;  // of the fake's devices; 0 and 1 are SM12x

void *address(uintptr_t n) {
  return reinterpret_cast<void *>(n << 32);  // far apart: memory that results share with tensors is refused
}

// Decode over a paged cache: device memory that is never looked at.
Params decode(int64_t keys = 256, int64_t width = 128) {
  Params p;
  flashspark_attention_params_init(&p);
  p.device = FLASHSPARK_CUDA;
  p.stream = address(99);
  p.num_seqs = 4, p.num_heads_q = 16, p.num_heads_kv = 4, p.head_dim = p.head_dim_v = width;
  p.max_seqlen_q = 1, p.max_seqlen_k = keys;
  p.num_pages = 1000, p.page_size = 16, p.num_page_slots = p.page_table_stride = (keys + 15) / 16;
  const auto tensor = [&](uintptr_t n, int64_t tokens, int64_t heads) {
    return flashspark_tensor{address(n), tokens * heads * width, heads * width, width, FLASHSPARK_BFLOAT16, 0};
  };
  p.q = tensor(1, 1, 16);
  p.k = tensor(2, 16, 4);
  p.v = tensor(3, 16, 4);
  p.out = tensor(4, 1, 16);
  p.seqused_k = static_cast<int32_t *>(address(5));
  p.page_table = static_cast<int32_t *>(address(6));
  p.causal = 1;
  p.num_splits = 1;
  return p;
}

Params split(int pieces) {
  Params p = decode(65536);
  p.num_splits = pieces;
  return p;
}

const char *name_of(const void *image) {
  for (const Fatbin &fatbin : fatbins()) {
    if (fatbin.begin == image) return fatbin.name;
  }
  return "no fatbin";
}

std::string explain(const Params &p, flashspark_status expected) {
  std::string text(8192, '\0');
  EXPECT_EQ(flashspark_attention_explain(&p, text.data(), text.size()), expected) << flashspark_last_error();
  return text.c_str();
}

bool contains(const std::string &text, const std::string &part) {
  return text.find(part) != std::string::npos;
}

class Cuda : public testing::Test {
 protected:
  void SetUp() override {
    fake_cuda::State &s = fake_cuda::state();
    s.launches.clear(), s.order.clear(), s.loads.clear();
    s.pushes = s.pops = 0;
    s.launch_result = s.allocate_result = 0;
    s.capturing = false;
    fake_cuda::set_current_device(0);
  }
  static void run(const Params &p) {
    ASSERT_EQ(flashspark_attention_forward(&p), FLASHSPARK_OK) << flashspark_last_error();
  }
  fake_cuda::State &fake = fake_cuda::state();
};
using CudaDeath = Cuda;  // tests that start a process of their own

// The build makes the fatbins from kernels.json, the loader finds them by key: both follow the same data.
TEST(Fatbins, EveryKernelIsThere) {
  std::vector<std::string> expected, found;
  for (const KernelKey &key : all_kernels()) expected.push_back(key.name());
  for (const Fatbin &fatbin : fatbins()) {
    found.push_back(fatbin.name);
    ASSERT_GT(fatbin.end - fatbin.begin, 1000) << fatbin.name;
    uint32_t magic = 0;
    std::memcpy(&magic, fatbin.begin, sizeof magic);
    EXPECT_EQ(magic, 0xba55ed50u) << fatbin.name << " is no fatbin";
    EXPECT_EQ(reinterpret_cast<uintptr_t>(fatbin.begin) % 8, 0u);
  }
  EXPECT_EQ(found, expected);
}

TEST_F(Cuda, LaunchesWhatThePlanSays) {
  for (const int32_t dtype : {FLASHSPARK_BFLOAT16, FLASHSPARK_FLOAT16}) {
    Params p = decode();
    p.q.dtype = p.k.dtype = p.v.dtype = p.out.dtype = dtype;
    fake.launches.clear();
    run(p);
    const Plan plan = make_plan(p, device_facts(0).machine);
    ASSERT_EQ(fake.launches.size(), 1u);
    const fake_cuda::Launch &launch = fake.launches[0];
    const std::string name =
        dtype == FLASHSPARK_BFLOAT16 ? "attention_forward_d128_decode_bf16" : "attention_forward_d128_decode_fp16";
    EXPECT_EQ(plan.forward_key().name(), name);
    EXPECT_EQ(name_of(launch.image), name);
    EXPECT_EQ(launch.function, "flashspark_" + name);
    for (int n = 0; n < 3; ++n) EXPECT_EQ(launch.grid[n], plan.forward.grid[n]);
    EXPECT_EQ(launch.threads, plan.forward.threads);
    EXPECT_EQ(launch.shared_bytes, plan.forward.shared_bytes);
    EXPECT_TRUE(launch.early);
    EXPECT_EQ(launch.stream, p.stream);
    EXPECT_EQ(launch.arguments.q, p.q.data);
    EXPECT_EQ(launch.arguments.page_table, p.page_table);
  }
  EXPECT_EQ(fake.pushes, 0) << "the caller's context is of this device";
}

TEST_F(Cuda, RowsOfPagesAreFoundInSteps) {
  Params p = decode();
  p.v.batch_stride = -3 * p.v.batch_stride;  // a cache that runs backwards
  run(p);
  const ForwardArguments &a = fake.launches[0].arguments;
  for (const auto &[steps, tensor] : {std::pair{a.k_pages, p.k}, std::pair{a.v_pages, p.v}}) {
    EXPECT_EQ(int64_t{steps.page} * steps.unit, tensor.batch_stride * 2);
    EXPECT_EQ(int64_t{steps.slot} * steps.unit, tensor.token_stride * 2);
    EXPECT_GE(steps.unit, 16);
  }
  p.k.batch_stride = (int64_t{1} << 40) + 8;  // in units of 16 bytes: further than 31 bits reach
  EXPECT_TRUE(contains(explain(p, FLASHSPARK_UNSUPPORTED), "within 2^31 units"));
}

// Kernels of their own for keys and values in e4m3: with factors, whatever 16 bits q has, or e4m3 itself.
TEST_F(Cuda, KeysInE4m3) {
  Params p = decode();
  p.k.dtype = p.v.dtype = FLASHSPARK_FLOAT8_E4M3;
  const float *scale = static_cast<const float *>(address(8));
  p.k_descale = {scale, 0, 1};
  p.q_descale = {scale, 0, 0};  // not read: q is no e4m3
  run(p);
  EXPECT_STREQ(name_of(fake.launches[0].image), "attention_forward_d128_decode_e4m3");
  const ForwardArguments &a = fake.launches[0].arguments;
  EXPECT_EQ(a.k_descale.data, scale);
  EXPECT_EQ(a.k_descale.head_stride, 1);
  EXPECT_EQ(a.q_descale.data, nullptr);
  EXPECT_EQ(int64_t{a.k_pages.page} * a.k_pages.unit, p.k.batch_stride) << "bytes of e4m3";
  EXPECT_TRUE(contains(explain(p, FLASHSPARK_OK), "d128_decode_e4m3): chosen"));
  p.q.dtype = FLASHSPARK_FLOAT8_E4M3;
  run(p);
  EXPECT_EQ(fake.launches[1].arguments.q_descale.data, scale);
  EXPECT_EQ(fake.launches[1].arguments.q_dtype, DType::e4m3);
  p.num_splits = 3, p.max_seqlen_k = 4096, p.num_page_slots = p.page_table_stride = 256;
  run(p);
  EXPECT_STREQ(name_of(fake.launches[3].image), "attention_forward_combine_bf16") << "by the type of out";
  Params odd = decode(256, 72);
  odd.k.dtype = odd.v.dtype = FLASHSPARK_FLOAT8_E4M3;
  EXPECT_TRUE(contains(explain(odd, FLASHSPARK_UNSUPPORTED), "head_dim 72: must be a multiple of 16"));
  p.k.token_stride += 8;
  EXPECT_TRUE(contains(explain(p, FLASHSPARK_UNSUPPORTED), "is not a multiple of 16 elements"));
}

// A result in e4m3: 16-bit numbers in scratch memory, then one more launch.
TEST_F(Cuda, ResultsInE4m3) {
  Params p = decode();
  p.out.dtype = FLASHSPARK_FLOAT8_E4M3;
  p.output_scale = static_cast<const float *>(address(8));
  run(p);
  ASSERT_EQ(fake.launches.size(), 2u);
  EXPECT_STREQ(name_of(fake.launches[0].image), "attention_forward_d128_decode_bf16");
  EXPECT_STREQ(name_of(fake.launches[1].image), "attention_forward_quantize");
  EXPECT_EQ(fake.order.front(), "alloc " + std::to_string(4 * 16 * 128 * 2));
  EXPECT_NE(fake.launches[0].arguments.out, p.out.data);
  EXPECT_EQ(fake.launches[0].arguments.out_strides.token, 16 * 128);
  size_t bytes = 0;
  ASSERT_EQ(flashspark_attention_workspace_size(&p, &bytes), FLASHSPARK_OK);
  EXPECT_EQ(bytes, size_t{4 * 16 * 128 * 2});
  p.workspace = address(10), p.workspace_size = bytes;
  run(p);
  EXPECT_EQ(fake.launches[2].arguments.out, p.workspace);
  p.workspace_size -= 1;
  EXPECT_EQ(flashspark_attention_forward(&p), FLASHSPARK_INVALID_ARGUMENT);
}

// Lists of blocks that the kernel's tile does not divide: one more launch before it, in the same scratch memory.
TEST_F(Cuda, BlockListsOfAnySize) {
  if (!has_nvrtc()) GTEST_SKIP() << description_in_a_child();
  Params p = split(2);
  p.masked_blocks.counts = static_cast<int32_t *>(address(11));
  p.masked_blocks.indices = static_cast<int32_t *>(address(12));
  p.masked_blocks.width = 70000;
  p.block_size_q = 16, p.block_size_k = 48, p.num_blocks_q = p.block_batch = p.block_heads = 1;
  Plan plan = make_plan(p, device_facts(0).machine);
  ASSERT_TRUE(plan.functions && plan.block_tiles() != nullptr);
  EXPECT_GT(plan.workspace, plan.partial_bytes());
  EXPECT_TRUE(contains(explain(p, FLASHSPARK_OK), "attention_block_tiles: grid 1 x 1 x 1, 128 threads"));
  size_t bytes = 0;
  ASSERT_EQ(flashspark_attention_workspace_size(&p, &bytes), FLASHSPARK_OK);
  EXPECT_EQ(bytes, plan.workspace);
  p.workspace = address(7), p.workspace_size = bytes;
  run(p);
  ASSERT_EQ(fake.order,
            (std::vector<std::string>{"flashspark_attention_block_tiles", "flashspark_attention_forward_functions",
                                      "flashspark_attention_forward_combine_bf16"}));
  plan.bind(p.workspace);
  const BlockTileArguments &a = fake.launches[0].block_tiles;
  EXPECT_EQ(a.lists[0].indices, p.masked_blocks.indices);
  EXPECT_EQ(a.lists[1].counts, nullptr);
  EXPECT_EQ(a.statuses, static_cast<uint8_t *>(p.workspace) + plan.partial_bytes());
  EXPECT_EQ(a.indices[1], plan.functions->arguments.blocks.full.indices);
  EXPECT_EQ(fake.launches[1].arguments.partial_out, p.workspace);
  for (const fake_cuda::Launch &launch : fake.launches) EXPECT_TRUE(launch.early);
  p.workspace_size -= 1;
  EXPECT_EQ(flashspark_attention_forward(&p), FLASHSPARK_INVALID_ARGUMENT);
}

// What the host cannot see is read back where the caller asks for it, and the errors are the CPU's.
TEST_F(Cuda, CheckOfDeviceMetadata) {
  std::vector<int32_t> used{1, 2, 3, 256}, pages(4 * 16, 7);
  Params p = decode();
  p.seqused_k = used.data(), p.page_table = pages.data();
  p.check_device = 1;
  run(p);
  EXPECT_EQ(fake.order.front(), "synchronize");
  const size_t launched = fake.launches.size();
  used[2] = 257;
  EXPECT_EQ(flashspark_attention_forward(&p), FLASHSPARK_INVALID_ARGUMENT);
  EXPECT_TRUE(contains(flashspark_last_error(), "seqused_k[2] = 257")) << flashspark_last_error();
  used[2] = 3, pages[16] = 1000;
  EXPECT_EQ(flashspark_attention_forward(&p), FLASHSPARK_INVALID_ARGUMENT);
  EXPECT_TRUE(contains(flashspark_last_error(), "page_table[1,0] = 1000")) << flashspark_last_error();
  pages[16] = 0;
  fake.capturing = true;
  EXPECT_EQ(flashspark_attention_forward(&p), FLASHSPARK_INVALID_ARGUMENT);
  EXPECT_TRUE(contains(flashspark_last_error(), "check_device = 1")) << flashspark_last_error();
  fake.capturing = false;
  EXPECT_EQ(fake.launches.size(), launched) << "nothing is launched after an error";
  p.check_device = 0;
  used[0] = -5;
  run(p);
  EXPECT_EQ(fake.launches.size(), launched + 1) << "nobody asked";
}

TEST_F(Cuda, AppendIsOneLaunch) {
  flashspark_append_params p;
  flashspark_append_params_init(&p);
  p.device = FLASHSPARK_CUDA;
  p.stream = address(99);
  p.num_seqs = 3, p.num_heads_kv = 2, p.head_dim = p.head_dim_v = 64, p.seqlen_new = 5;
  p.num_pages = 100, p.page_size = 16, p.num_page_slots = p.page_table_stride = 4;
  p.page_table = static_cast<int32_t *>(address(6));
  p.k_new = p.v_new = {address(1), 5 * 128, 128, 64, FLASHSPARK_BFLOAT16, 0};
  p.k_cache = {address(2), 16 * 128, 128, 64, FLASHSPARK_BFLOAT16, 0};
  p.v_cache = {address(3), 16 * 128, 128, 64, FLASHSPARK_BFLOAT16, 0};
  ASSERT_EQ(flashspark_append_kv(&p), FLASHSPARK_OK) << flashspark_last_error();
  ASSERT_EQ(fake.launches.size(), 1u);
  EXPECT_STREQ(name_of(fake.launches[0].image), "append_kv");
  EXPECT_EQ(fake.launches[0].grid[0], 15u);
  EXPECT_EQ(fake.launches[0].append.capacity, 64);
  EXPECT_EQ(fake.launches[0].append.k_descale.data, nullptr);
  p.seqlen_new = 0;
  EXPECT_EQ(flashspark_append_kv(&p), FLASHSPARK_OK);
  EXPECT_EQ(fake.launches.size(), 1u) << "no rows, no launch";
  p.page_table = nullptr, p.num_seqs = 1, p.total_new = 7;
  p.slot_mapping = static_cast<int64_t *>(address(7));
  ASSERT_EQ(flashspark_append_kv(&p), FLASHSPARK_OK) << flashspark_last_error();
  ASSERT_EQ(fake.launches.size(), 2u);
  EXPECT_EQ(fake.launches[1].grid[0], 7u);
  EXPECT_EQ(fake.launches[1].append.capacity, 1600);
  EXPECT_EQ(fake.launches[1].append.slot_mapping, address(7));
  p.rotary_cos = p.rotary_sin = address(8);
  p.rotary_dtype = FLASHSPARK_BFLOAT16, p.rotary_dim = 32, p.seqlen_rotary = 4096;
  p.rotary_positions = static_cast<int64_t *>(address(9));
  ASSERT_EQ(flashspark_append_kv(&p), FLASHSPARK_OK) << flashspark_last_error();
  EXPECT_EQ(fake.launches[2].append.rotary_positions, address(9));
  EXPECT_EQ(fake.launches[2].append.rotary_stride, 16);
  p.rotary_stride = 32;
  ASSERT_EQ(flashspark_append_kv(&p), FLASHSPARK_OK) << flashspark_last_error();
  EXPECT_EQ(fake.launches[3].append.rotary_stride, 32);
  p.device_index = kOld;
  EXPECT_EQ(flashspark_append_kv(&p), FLASHSPARK_UNSUPPORTED);
}

// Few rows go to key groups, grids that fill the GPU to the tiles that read K and V least often.
TEST_F(Cuda, TheChoiceOfKernelFollowsTheGrid) {
  const Machine machine = device_facts(0).machine;
  Params p = decode(4096);
  p.page_table = nullptr, p.seqused_k = nullptr, p.num_pages = p.page_size = p.num_page_slots = 0;
  const auto kind_of = [&](int64_t num_seqs, int64_t rows) {
    p.num_seqs = num_seqs, p.max_seqlen_q = p.max_seqlen_k = rows;
    return make_plan(p, machine).instance->tiling;
  };
  EXPECT_EQ(kind_of(1, 1), Tiling::decode);
  EXPECT_EQ(kind_of(1, 16), Tiling::short_q);
  EXPECT_EQ(kind_of(1, 512), Tiling::short_q);
  EXPECT_EQ(kind_of(64, 4096), Tiling::prefill);
}

TEST_F(Cuda, LoadsOnceADeviceAndKernel) {
  Params p = decode(256, 64);
  p.softcap = 5;
  for (int n = 0; n < 3; ++n) run(p);
  EXPECT_EQ(fake.loads.size(), 1u);
  p.device_index = 1;
  run(p);  // the limit of shared memory is set a device: without it the launch would fail
  EXPECT_EQ(fake.loads.size(), 1u);
  EXPECT_EQ(fake.launches.back().device, 1);
}

TEST_F(Cuda, SplitsAreMergedInTheCallersMemory) {
  Params p = split(4);
  size_t bytes = 0;
  ASSERT_EQ(flashspark_attention_workspace_size(&p, &bytes), FLASHSPARK_OK) << flashspark_last_error();
  const Plan plan = make_plan(p, device_facts(0).machine);
  // A place for each piece of each row tile.
  const size_t rows = size_t{4} * plan.forward.grid[0] * static_cast<size_t>(plan.arguments.tile_rows);
  ASSERT_GE(rows, 4u * 4 * 16);
  ASSERT_EQ(bytes, rows * (128 + 1) * sizeof(float));
  p.workspace = address(7);
  p.workspace_size = bytes;
  run(p);
  ASSERT_EQ(fake.order, (std::vector<std::string>{"flashspark_attention_forward_d128_decode_bf16",
                                                  "flashspark_attention_forward_combine_bf16"}));
  EXPECT_STREQ(name_of(fake.launches[1].image), "attention_forward_combine_bf16");
  for (const fake_cuda::Launch &launch : fake.launches) {
    EXPECT_EQ(launch.arguments.partial_out, p.workspace);
    EXPECT_EQ(launch.arguments.partial_lse, launch.arguments.partial_out + rows * 128);
    EXPECT_EQ(launch.arguments.num_splits, 4);
    EXPECT_TRUE(launch.early);
  }
  p.workspace_size = bytes - 1;
  EXPECT_EQ(flashspark_attention_forward(&p), FLASHSPARK_INVALID_ARGUMENT);
  EXPECT_TRUE(contains(flashspark_last_error(), "workspace_size = " + std::to_string(bytes - 1)))
      << flashspark_last_error();
  p.workspace_size = bytes;
  p.workspace = static_cast<char *>(p.workspace) + 8;
  EXPECT_EQ(flashspark_attention_forward(&p), FLASHSPARK_INVALID_ARGUMENT);
  EXPECT_EQ(fake.launches.size(), 2u);
}

// A grid and scratch memory that follow from the GPU, and from nothing that a batch may change.
TEST_F(Cuda, DecodeTakesEvenShares) {
  const Machine machine = device_facts(0).machine;
  size_t bytes = 0;
  for (const int64_t num_seqs : {1, 4, 300}) {
    Params p = decode(4096);
    p.num_splits = 0, p.num_seqs = num_seqs;
    const Plan plan = make_plan(p, machine);
    const auto shares = static_cast<int64_t>(plan.arguments.stream_k.ctas);
    EXPECT_EQ(plan.instance->tiling, Tiling::decode);
    EXPECT_GE(shares, machine.sm_count);
    EXPECT_EQ(shares % machine.sm_count, 0);
    EXPECT_EQ(plan.forward.grid[0], shares);
    EXPECT_EQ(plan.forward.grid[1], 1u);
    // Where the mean row tile is in few pieces, all shares that meet in one join it.
    EXPECT_EQ(plan.combine.grid[0], num_seqs == 1 ? p.num_heads_kv : shares);
    EXPECT_EQ(plan.combine_row_tiles, num_seqs == 1 ? 1 : 0);
    if (bytes == 0) bytes = plan.workspace;
    EXPECT_EQ(plan.workspace, bytes) << num_seqs;
    p.deterministic = 1;
    EXPECT_EQ(make_plan(p, machine).workspace, 0u) << "a sequence must not depend on its neighbours";
    p.deterministic = 0, p.num_splits = 1;
    EXPECT_EQ(make_plan(p, machine).workspace, 0u);
  }
  // Several row tiles of a sequence, where the L2 holds what they all read.
  Params p = decode(4096);
  p.num_splits = 0, p.num_seqs = 1, p.max_seqlen_q = 40;
  EXPECT_GT(make_plan(p, machine).arguments.stream_k.ctas, 0);
  EXPECT_EQ(make_plan(p, machine).instance->tiling, Tiling::short_q);
  Params one_head = p;
  one_head.num_heads_q /= one_head.num_heads_kv, one_head.num_heads_kv = 1;
  EXPECT_GT(make_plan(one_head, machine).combine_row_tiles, 1);
  p.num_seqs = 300;
  EXPECT_EQ(make_plan(p, machine).arguments.stream_k.ctas, 0);
}

TEST_F(Cuda, AScheduleIsWrittenOnceAndGivenToTheCalls) {
  Params p = decode(4096);
  p.num_splits = 0;
  Params asked = p;  // as an engine asks before it has tensors
  asked.q.data = asked.k.data = asked.v.data = asked.out.data = nullptr, asked.page_table = nullptr;
  asked.page_size = asked.num_pages = asked.num_page_slots = asked.page_table_stride = 0;
  int64_t size = 0;
  ASSERT_EQ(flashspark_attention_schedule_size(&asked, &size), FLASHSPARK_OK) << flashspark_last_error();
  const Plan plan = make_plan(p, device_facts(0).machine);
  ASSERT_EQ(size, 32 * int64_t{plan.forward.grid[0]});
  EXPECT_EQ(flashspark_attention_schedule(&asked), FLASHSPARK_INVALID_ARGUMENT);
  EXPECT_TRUE(contains(flashspark_last_error(), "scheduler_metadata = NULL")) << flashspark_last_error();
  asked.scheduler_metadata = static_cast<int32_t *>(address(9));
  asked.scheduler_metadata_size = size - 1;
  EXPECT_EQ(flashspark_attention_schedule(&asked), FLASHSPARK_INVALID_ARGUMENT);
  EXPECT_TRUE(contains(flashspark_last_error(), "scheduler_metadata_size = " + std::to_string(size - 1)));
  ASSERT_TRUE(fake.launches.empty());
  asked.scheduler_metadata_size = size;
  ASSERT_EQ(flashspark_attention_schedule(&asked), FLASHSPARK_OK) << flashspark_last_error();
  ASSERT_EQ(fake.launches.size(), 1u);
  EXPECT_STREQ(name_of(fake.launches[0].image), "attention_schedule");
  EXPECT_EQ(fake.launches[0].function, "flashspark_attention_schedule");
  EXPECT_EQ(fake.launches[0].grid[0], plan.forward.grid[0]);
  EXPECT_EQ(fake.launches[0].threads, 32u);
  EXPECT_EQ(fake.launches[0].stream, p.stream);
  const ForwardArguments written = fake.launches[0].arguments;
  EXPECT_EQ(written.scheduler_metadata, asked.scheduler_metadata);
  // The call finds it by the same key, and looks no further than its page table reaches.
  p.scheduler_metadata = asked.scheduler_metadata, p.scheduler_metadata_size = size;
  run(p);
  EXPECT_EQ(fake.launches[1].arguments.scheduler_metadata, p.scheduler_metadata);
  EXPECT_EQ(fake.launches[1].arguments.metadata_fingerprint, written.metadata_fingerprint);
  EXPECT_EQ(fake.launches[1].arguments.key_rows, 4096);
  EXPECT_GE(written.key_rows, 4096) << "the schedule kernel knows no page table";
  // One that is too small is none.
  p.scheduler_metadata_size = size - 1;
  fake.launches.clear();
  run(p);
  EXPECT_EQ(fake.launches[0].arguments.scheduler_metadata, nullptr);
}

// Whatever moves a share makes another key; what does not, does not: a graph keeps the bounds it was captured with.
TEST_F(Cuda, AScheduleIsOfOneProblem) {
  const auto key = [](const Params &p) {
    const Plan plan = make_plan(p, device_facts(0).machine);
    EXPECT_GT(plan.schedule_size(), 0);
    return plan.arguments.metadata_fingerprint;
  };
  Params p = decode(4096);
  p.num_splits = 0;
  const int32_t same = key(p);
  Params q = p;
  q.max_seqlen_k = 8192, q.num_page_slots = q.page_table_stride = 512,
  q.seqused_k = static_cast<int32_t *>(address(77));
  q.softmax_scale = 3, q.sinks = address(8), q.sinks_dtype = FLASHSPARK_FLOAT32;
  EXPECT_EQ(key(q), same);
  const auto differs = [&](auto change) {
    Params r = p;
    change(r);
    return key(r) != same;
  };
  int32_t *lengths = static_cast<int32_t *>(address(7));
  EXPECT_TRUE(differs([](Params &r) { r.num_seqs = 5; }));
  EXPECT_TRUE(differs([](Params &r) { r.num_heads_kv = 8; }));
  EXPECT_TRUE(differs([](Params &r) { r.head_dim = r.head_dim_v = 64; })) << "other tiles";
  EXPECT_TRUE(differs([](Params &r) { r.max_seqlen_q = 2; }));
  EXPECT_TRUE(differs([](Params &r) { r.causal = 0; }));
  EXPECT_TRUE(differs([](Params &r) { r.window_left = 500; }));
  EXPECT_TRUE(differs([](Params &r) { r.window_right = 5; }));
  EXPECT_TRUE(differs([](Params &r) { r.attention_chunk = 512; }));
  EXPECT_TRUE(differs([&](Params &r) { r.causal_per_seq = lengths; }));
  EXPECT_TRUE(differs([&](Params &r) { r.leftpad_k = lengths; }));
  EXPECT_TRUE(differs([&](Params &r) { r.seqused_q = lengths; }));
  EXPECT_TRUE(differs([&](Params &r) { r.cu_seqlens_q = lengths, r.total_q = 4; }));
  const auto none = [&](auto change) {
    Params r = p;
    change(r);
    int64_t size = 99;
    EXPECT_EQ(flashspark_attention_schedule_size(&r, &size), FLASHSPARK_OK) << flashspark_last_error();
    return size == 0;
  };
  EXPECT_TRUE(none([](Params &r) { r.num_splits = 1; }));
  EXPECT_TRUE(none([](Params &r) { r.deterministic = 1; }));
  EXPECT_FALSE(none([](Params &r) { r.softcap = 30; }));
  // Their masks follow from more than lengths.
  EXPECT_TRUE(none([&](Params &r) { r.rswa_window = 100, r.rswa_prefix_lens = lengths; }));
  EXPECT_TRUE(none([&](Params &r) {
    r.prefix_mode = FLASHSPARK_PREFIX_PER_SEQ, r.num_prefix_ranges = 1, r.prefix_ranges = lengths;
  }));
  EXPECT_TRUE(none([](Params &r) { r.max_seqlen_q = 4096; }));
  EXPECT_TRUE(none([](Params &r) { r.num_seqs = 0; }));
  p.device_index = kOld;
  int64_t size = 0;
  EXPECT_EQ(flashspark_attention_schedule_size(&p, &size), FLASHSPARK_UNSUPPORTED);
}

TEST_F(Cuda, SplitsThatWouldTakeTheMemoryOfTheGpuAreCut) {
  Params p = split(7);
  EXPECT_EQ(make_plan(p, device_facts(0).machine).arguments.num_splits, 7);
  p.max_seqlen_q = p.max_seqlen_k = 1 << 14;
  p.num_seqs = 200;
  const Plan plan = make_plan(p, device_facts(0).machine);
  EXPECT_LT(plan.arguments.num_splits, 7);
  EXPECT_LE(plan.workspace, size_t{1} << 31);
}

TEST_F(Cuda, SplitsTakeMemoryOfTheStreamWhereNoneIsGiven) {
  const Params p = split(3);
  run(p);
  const size_t bytes = make_plan(p, device_facts(0).machine).workspace;
  ASSERT_GE(bytes, 3u * 4 * 16 * (128 + 1) * sizeof(float));
  ASSERT_EQ(fake.order,
            (std::vector<std::string>{"alloc " + std::to_string(bytes), "flashspark_attention_forward_d128_decode_bf16",
                                      "flashspark_attention_forward_combine_bf16", "free"}));
  for (const fake_cuda::Launch &launch : fake.launches)
    EXPECT_EQ(reinterpret_cast<uintptr_t>(launch.arguments.partial_out), 0x70000000u);
  fake.order.clear();
  fake.launch_result = 700;
  EXPECT_EQ(flashspark_attention_forward(&p), FLASHSPARK_DEVICE_ERROR);
  EXPECT_EQ(fake.order.back(), "free");
  fake.allocate_result = 2;
  EXPECT_EQ(flashspark_attention_forward(&p), FLASHSPARK_OUT_OF_MEMORY);
  EXPECT_STREQ(flashspark_last_error(), "cuMemAllocAsync: CUDA_ERROR_OUT_OF_MEMORY (2)");
}

// One check and one plan a call, for callers with an allocator of their own.
TEST_F(Cuda, SplitsTakeTheCallersAllocator) {
  struct Allocator {
    std::vector<size_t> asked;
    void *memory = address(11);
  } allocator;
  const auto allocate = [](void *context, size_t bytes) {
    static_cast<Allocator *>(context)->asked.push_back(bytes);
    return static_cast<Allocator *>(context)->memory;
  };
  const auto call = [&](const Params &p) {
    allocator.asked.clear(), fake.launches.clear(), fake.order.clear();
    return flashspark_attention_forward_with_allocator(&p, allocate, &allocator);
  };
  Params p = split(3);
  size_t bytes = 0;
  ASSERT_EQ(flashspark_attention_workspace_size(&p, &bytes), FLASHSPARK_OK);
  ASSERT_EQ(call(p), FLASHSPARK_OK) << flashspark_last_error();
  EXPECT_EQ(allocator.asked, std::vector<size_t>{bytes});
  EXPECT_EQ(fake.order.size(), 2u) << "the driver is asked for no memory";
  for (const fake_cuda::Launch &launch : fake.launches) EXPECT_EQ(launch.arguments.partial_out, allocator.memory);
  p.out.dtype = FLASHSPARK_FLOAT8_E4M3;  // 16-bit results and partial results, in one piece
  ASSERT_EQ(flashspark_attention_workspace_size(&p, &bytes), FLASHSPARK_OK);
  ASSERT_EQ(call(p), FLASHSPARK_OK) << flashspark_last_error();
  EXPECT_EQ(allocator.asked, std::vector<size_t>{bytes});
  EXPECT_EQ(fake.launches[0].arguments.out, allocator.memory);
  EXPECT_EQ(fake.launches[1].arguments.partial_out,
            reinterpret_cast<float *>(static_cast<char *>(allocator.memory) + 4 * 16 * 128 * 2));
  p.workspace = address(7), p.workspace_size = bytes;
  ASSERT_EQ(call(p), FLASHSPARK_OK) << flashspark_last_error();
  EXPECT_TRUE(allocator.asked.empty()) << "the caller's workspace comes first";
  ASSERT_EQ(call(decode()), FLASHSPARK_OK) << flashspark_last_error();
  EXPECT_TRUE(allocator.asked.empty()) << "no scratch memory is needed";
  for (void *const memory : {static_cast<void *>(nullptr), static_cast<void *>(static_cast<char *>(address(1)) + 8)}) {
    allocator.memory = memory;
    EXPECT_EQ(call(split(3)), memory == nullptr ? FLASHSPARK_OUT_OF_MEMORY : FLASHSPARK_INVALID_ARGUMENT);
    EXPECT_TRUE(fake.launches.empty());
  }
  Params bad = split(3);
  bad.window_left = -5;
  EXPECT_EQ(call(bad), FLASHSPARK_INVALID_ARGUMENT);
  EXPECT_TRUE(allocator.asked.empty());
}

TEST_F(Cuda, NothingToComputeLaunchesNothing) {
  Params p = decode();
  p.num_seqs = 0;
  run(p);
  p = split(4);  // max_seqlen_q bounds the rows of a sequence, whatever total_q and the offsets say
  p.cu_seqlens_q = static_cast<int32_t *>(address(8)), p.total_q = 4, p.max_seqlen_q = 0;
  run(p);
  EXPECT_TRUE(fake.launches.empty());
  EXPECT_TRUE(fake.order.empty());
}

TEST_F(Cuda, TheFirstCallMayBeCaptured) {
  fake.capturing = true;
  Params p = split(2);
  p.head_dim = p.head_dim_v = 96;  // a kernel that no other test here loads
  run(p);
  EXPECT_GE(fake.loads.size(), 1u);
  EXPECT_EQ(fake.launches.size(), 2u);
}

TEST_F(Cuda, TheProblemsDeviceIsCurrentDuringTheCallOnly) {
  Params p = decode();
  for (const int current : {-1, 0, 1}) {
    for (const int wanted : {0, 1}) {
      for (const int result : {0, 700}) {
        fake_cuda::set_current_device(current);
        p.device_index = wanted;
        fake.pushes = fake.pops = 0;
        fake.launch_result = result;
        EXPECT_EQ(flashspark_attention_forward(&p), result == 0 ? FLASHSPARK_OK : FLASHSPARK_DEVICE_ERROR);
        EXPECT_EQ(fake.pushes, current == wanted ? 0 : 1);
        EXPECT_EQ(fake.pops, fake.pushes);
        EXPECT_EQ(fake_cuda::current_device(), current);
        if (result == 0) {
          EXPECT_EQ(fake.launches.back().device, wanted);
        }
      }
    }
  }
  EXPECT_STREQ(flashspark_last_error(), "cuLaunchKernelEx: CUDA_ERROR_ILLEGAL_ADDRESS (700)");
}

TEST_F(Cuda, ManyThreadsLoadAKernelOnce) {
  const Params p = decode(256, 256);
  std::vector<std::thread> threads;
  std::atomic<int> failed{0};
  for (int n = 0; n < 16; ++n) {
    threads.emplace_back([&] {
      for (int call = 0; call < 20; ++call) failed += flashspark_attention_forward(&p) != FLASHSPARK_OK;
    });
  }
  for (std::thread &thread : threads) thread.join();
  EXPECT_EQ(failed, 0);
  EXPECT_EQ(fake.loads.size(), 1u);
  EXPECT_EQ(fake.launches.size(), 320u);
}

TEST_F(Cuda, ExplainNamesTheGpuTheKernelsAndTheSplits) {
  const std::string text = explain(split(4), FLASHSPARK_OK);
  EXPECT_TRUE(contains(text, "cuda (NVIDIA Imagined, sm_120f kernels, d128_decode, 4 splits): chosen")) << text;
  EXPECT_TRUE(contains(text, "cpu-engine (")) << text;
  EXPECT_TRUE(fake.launches.empty());
}

// All that the call would launch, below the line of the implementation that is chosen.
TEST_F(Cuda, ExplainPrintsThePlan) {
  Params p = split(4);
  std::string plan = "chosen\n  " + to_string(make_plan(p, device_facts(0).machine));
  for (size_t at = plan.find("\n", 8); at + 1 < plan.size(); at = plan.find("\n", at + 1)) plan.insert(at + 1, "  ");
  EXPECT_TRUE(contains(explain(p, FLASHSPARK_OK), plan)) << plan << explain(p, FLASHSPARK_OK);
  EXPECT_FALSE(contains(explain(p, FLASHSPARK_OK), "quantize"));
  p.out.dtype = FLASHSPARK_FLOAT8_E4M3;
  EXPECT_TRUE(contains(explain(p, FLASHSPARK_OK),
                       "16-bit results: 16384 bytes of scratch memory\n"
                       "  attention_forward_quantize: grid "));
  p.num_seqs = 0;
  EXPECT_FALSE(contains(explain(p, FLASHSPARK_OK), "grid"));
}

TEST_F(Cuda, AnotherGpuTakesItsOwnKernelsIfTheyAreBuilt) {
  Params p = decode();
  p.device_index = kHopper;
  if (contains(fatbin_architectures(), "sm_90")) {
    EXPECT_TRUE(contains(explain(p, FLASHSPARK_OK), "NVIDIA Hopper, sm_90 kernels"));
  } else {
    EXPECT_TRUE(contains(explain(p, FLASHSPARK_UNSUPPORTED), "NVIDIA Hopper needs sm_90 kernels; this build has"));
  }
}

TEST_F(Cuda, DevicesWithoutKernelsAreRefusedByName) {
  Params p = decode();
  for (const auto &[index, capability] : {std::pair{kOld, "7.5"}, {kDatacenter, "10.0"}}) {
    p.device_index = index;
    EXPECT_EQ(flashspark_attention_forward(&p), FLASHSPARK_UNSUPPORTED);
    const std::string text = flashspark_last_error();
    EXPECT_TRUE(contains(text, std::string("has compute capability ") + capability)) << text;
    EXPECT_TRUE(contains(text, "8.x, 9.0 and 12.x")) << text;
  }
  p.device_index = 17;
  EXPECT_TRUE(contains(explain(p, FLASHSPARK_UNSUPPORTED), "there is no CUDA device 17: the driver has 5"));
}

TEST(Capabilities, ACubinServesLaterMinorsOfItsMajor) {
  Architecture arch{};
  for (const auto &[major, minor, name] : {std::tuple{8, 0, "sm_80"},
                                           {8, 6, "sm_80"},
                                           {8, 9, "sm_80"},
                                           {9, 0, "sm_90"},
                                           {12, 0, "sm_120f"},
                                           {12, 1, "sm_120f"}}) {
    ASSERT_TRUE(architecture_of(major, minor, arch)) << major << "." << minor;
    EXPECT_STREQ(architecture_name(arch), name);
  }
  for (const auto &[major, minor] : {std::pair{7, 5}, {10, 0}, {10, 3}, {11, 0}, {13, 0}})
    EXPECT_FALSE(architecture_of(major, minor, arch)) << major << "." << minor;
}

TEST_F(Cuda, OtherTypesAreLackedByName) {
  Params p = decode();
  p.out.dtype = FLASHSPARK_FLOAT32;
  const std::string text = explain(p, FLASHSPARK_UNSUPPORTED);
  EXPECT_TRUE(contains(text, "lacks float32; out must have q's type or be float8_e4m3 unless k and v are")) << text;
}

TEST_F(Cuda, AForkedChildIsToldWhatToDo) {
  run(decode());
  const pid_t child = fork();
  if (child == 0) {
    const Params p = decode();
    const bool refused = flashspark_attention_forward(&p) == FLASHSPARK_DEVICE_ERROR &&
                         contains(flashspark_last_error(), "before fork()") &&
                         contains(flashspark_last_error(), "spawn");
    _exit(refused ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
  run(decode());  // the parent goes on
}

using CudaLast = Cuda;  // loads what other tests count the loads of

TEST_F(CudaLast, EveryKeyHasAKernelOfItsOwn) {
  const CurrentDevice current(0);
  std::set<Kernel> kernels;
  for (const KernelKey &key : all_kernels()) {
    const Kernel kernel = get(key, 0);
    EXPECT_TRUE(kernels.insert(kernel).second) << key.name();
    EXPECT_EQ(fake_cuda::function_of(kernel), "flashspark_" + key.name());
    EXPECT_EQ(get(key, 0), kernel);
  }
  const KernelKey none{Operation::attention_forward};
  EXPECT_THROW(get(none, 0), Error) << "a key of no kernel";
}

}  // namespace
}  // namespace flashspark::cuda
