// The C boundary: versions, null pointers, names, and the header as C.
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "flashspark/flashspark.h"
#include "support/model.hpp"

extern "C" int flashspark_header_in_c(void);

namespace flashspark {
namespace {

TEST(Abi, HeaderCompilesAsCAndAgreesOnTheStructs) {
  EXPECT_EQ(flashspark_header_in_c(), 0);
}

TEST(Abi, ZeroedStructsAreRefused) {
  flashspark_attention_params attention;
  std::memset(&attention, 0, sizeof attention);
  EXPECT_EQ(flashspark_attention_forward(&attention), FLASHSPARK_VERSION_MISMATCH);
  EXPECT_NE(std::string(flashspark_last_error()).find("struct_size = 0"), std::string::npos) << flashspark_last_error();
  flashspark_attention_backward_params backward;
  std::memset(&backward, 0, sizeof backward);
  EXPECT_EQ(flashspark_attention_backward(&backward), FLASHSPARK_VERSION_MISMATCH);
  EXPECT_NE(std::string(flashspark_last_error()).find("flashspark_attention_backward_params"), std::string::npos);
  flashspark_append_params append;
  std::memset(&append, 0, sizeof append);
  EXPECT_EQ(flashspark_append_kv(&append), FLASHSPARK_VERSION_MISMATCH);
  EXPECT_NE(std::string(flashspark_last_error()).find("flashspark_append_params"), std::string::npos);
}

// A caller built against another header hands over another size: nothing behind the two version fields may be read.
TEST(Abi, AnotherVersionIsRefusedWithoutReadingFurther) {
  struct Head {
    uint32_t struct_size, abi_version;
  };
  for (const Head head : {Head{8, 1}, Head{8, 2}, Head{sizeof(flashspark_attention_params), 2}, Head{0xffffffff, 1}}) {
    std::vector<unsigned char> memory(sizeof head);  // exact: a sanitizer sees one byte too many
    std::memcpy(memory.data(), &head, sizeof head);
    const auto *params = reinterpret_cast<const flashspark_attention_params *>(memory.data());
    EXPECT_EQ(flashspark_attention_forward(params), FLASHSPARK_VERSION_MISMATCH);
    EXPECT_EQ(flashspark_attention_validate(params), FLASHSPARK_VERSION_MISMATCH);
    const auto *backward = reinterpret_cast<const flashspark_attention_backward_params *>(memory.data());
    EXPECT_EQ(flashspark_attention_backward(backward), FLASHSPARK_VERSION_MISMATCH);
    EXPECT_EQ(flashspark_attention_backward_validate(backward), FLASHSPARK_VERSION_MISMATCH);
    EXPECT_EQ(flashspark_append_kv(reinterpret_cast<const flashspark_append_params *>(memory.data())),
              FLASHSPARK_VERSION_MISMATCH);
    EXPECT_EQ(flashspark_create_block_mask(reinterpret_cast<const flashspark_block_mask_params *>(memory.data())),
              FLASHSPARK_VERSION_MISMATCH);
  }
}

TEST(Abi, NullPointersAreRefused) {
  size_t size = 0;
  EXPECT_EQ(flashspark_attention_forward(nullptr), FLASHSPARK_INVALID_ARGUMENT);
  EXPECT_EQ(std::string(flashspark_last_error()).rfind("params = NULL", 0), 0u) << flashspark_last_error();
  EXPECT_EQ(flashspark_attention_validate(nullptr), FLASHSPARK_INVALID_ARGUMENT);
  EXPECT_EQ(flashspark_attention_workspace_size(nullptr, &size), FLASHSPARK_INVALID_ARGUMENT);
  EXPECT_EQ(flashspark_attention_explain(nullptr, nullptr, 0), FLASHSPARK_INVALID_ARGUMENT);
  EXPECT_EQ(flashspark_append_kv(nullptr), FLASHSPARK_INVALID_ARGUMENT);
  EXPECT_EQ(flashspark_attention_backward(nullptr), FLASHSPARK_INVALID_ARGUMENT);
  EXPECT_EQ(flashspark_attention_backward_with_allocator(nullptr, nullptr, nullptr), FLASHSPARK_INVALID_ARGUMENT);
  EXPECT_EQ(flashspark_attention_backward_validate(nullptr), FLASHSPARK_INVALID_ARGUMENT);
  EXPECT_EQ(flashspark_attention_backward_workspace_size(nullptr, &size), FLASHSPARK_INVALID_ARGUMENT);
  EXPECT_EQ(flashspark_attention_backward_explain(nullptr, nullptr, 0), FLASHSPARK_INVALID_ARGUMENT);
}

TEST(Abi, InitSetsTheDefaultsThatAreNotZero) {
  flashspark_attention_params p;
  std::memset(&p, 0xee, sizeof p);
  flashspark_attention_params_init(&p);
  EXPECT_EQ(p.struct_size, sizeof p);
  EXPECT_EQ(p.abi_version, FLASHSPARK_ABI_VERSION);
  EXPECT_EQ(p.window_left, -1);
  EXPECT_EQ(p.window_right, -1);
  EXPECT_EQ(p.softmax_scale, 1.0f);
  EXPECT_EQ(p.causal, 0);
  EXPECT_EQ(p.num_seqs, 0);
  EXPECT_EQ(p.q.data, nullptr);
  EXPECT_EQ(p.lse, nullptr);
  EXPECT_EQ(p.implementation, nullptr);
  EXPECT_EQ(p.workspace, nullptr);
}

TEST(Abi, InitOfTheBackwardPassInitsTheForwardProblem) {
  flashspark_attention_backward_params p;
  std::memset(&p, 0xee, sizeof p);
  flashspark_attention_backward_params_init(&p);
  EXPECT_EQ(p.struct_size, sizeof p);
  EXPECT_EQ(p.abi_version, FLASHSPARK_ABI_VERSION);
  EXPECT_EQ(p.forward.struct_size, sizeof p.forward);
  EXPECT_EQ(p.forward.window_left, -1);
  EXPECT_EQ(p.forward.softmax_scale, 1.0f);
  EXPECT_EQ(p.dq.data, nullptr);
  EXPECT_EQ(p.dlse, nullptr);
  EXPECT_EQ(p.dtensors, nullptr);
  EXPECT_EQ(p.workspace, nullptr);
}

TEST(Abi, NamesAreStable) {
  EXPECT_STREQ(flashspark_version(), FLASHSPARK_TEST_VERSION);
  EXPECT_GE(flashspark_cpu_threads(), 1);
  EXPECT_STRNE(flashspark_cpu_target(), "");
  std::vector<std::string> names;
  for (int32_t n = 0; flashspark_implementation_name(n) != nullptr; ++n) {
    names.emplace_back(flashspark_implementation_name(n));
    EXPECT_STRNE(flashspark_implementation_description(n), "");
  }
  EXPECT_EQ(names, (std::vector<std::string>{"cuda", "cpu-engine", "cpu-reference"}));
  for (const int32_t beyond : {-1, static_cast<int32_t>(names.size()), INT32_MAX, INT32_MIN}) {
    EXPECT_EQ(flashspark_implementation_name(beyond), nullptr);
    EXPECT_EQ(flashspark_implementation_description(beyond), nullptr);
  }
  for (const auto &[dtype, name] : {std::pair{FLASHSPARK_FLOAT32, "float32"},
                                    {FLASHSPARK_FLOAT16, "float16"},
                                    {FLASHSPARK_BFLOAT16, "bfloat16"},
                                    {FLASHSPARK_FLOAT8_E4M3, "float8_e4m3"},
                                    {FLASHSPARK_DTYPE_NONE, "none"}})
    EXPECT_STREQ(flashspark_dtype_name(dtype), name);
  EXPECT_STREQ(flashspark_dtype_name(99), "unknown");
  std::vector<std::string> statuses;
  for (int s = FLASHSPARK_OK; s <= FLASHSPARK_INTERNAL; ++s) {
    const std::string name = flashspark_status_name(static_cast<flashspark_status>(s));
    EXPECT_EQ(std::count(statuses.begin(), statuses.end(), name), 0) << name;
    EXPECT_NE(name, "unknown status");
    statuses.push_back(name);
  }
}

TEST(Abi, CpuNeedsNoWorkspace) {
  size_t size = 99;
  flashspark_attention_params p;
  flashspark_attention_params_init(&p);
  p.num_heads_q = p.num_heads_kv = 1;
  p.head_dim = p.head_dim_v = 8;
  p.q.dtype = p.k.dtype = p.v.dtype = p.out.dtype = FLASHSPARK_FLOAT32;
  EXPECT_EQ(flashspark_attention_workspace_size(&p, &size), FLASHSPARK_OK) << flashspark_last_error();
  EXPECT_EQ(size, 0u);
  EXPECT_EQ(flashspark_attention_workspace_size(&p, nullptr), FLASHSPARK_INVALID_ARGUMENT);
  flashspark_attention_backward_params backward;
  flashspark_attention_backward_params_init(&backward);
  backward.forward = p;
  backward.dout.dtype = FLASHSPARK_FLOAT32;
  size = 99;
  EXPECT_EQ(flashspark_attention_backward_workspace_size(&backward, &size), FLASHSPARK_OK) << flashspark_last_error();
  EXPECT_EQ(size, 0u);
  EXPECT_EQ(flashspark_attention_backward_workspace_size(&backward, nullptr), FLASHSPARK_INVALID_ARGUMENT);
}

// The CPU has nothing to schedule, and neither addresses nor strides of tensors are asked for.
TEST(Abi, CpuNeedsNoSchedule) {
  int64_t size = 99;
  flashspark_attention_params p;
  flashspark_attention_params_init(&p);
  p.num_seqs = 3, p.max_seqlen_q = 1, p.max_seqlen_k = 4096;
  p.num_heads_q = p.num_heads_kv = 1;
  p.head_dim = p.head_dim_v = 128;
  p.q.dtype = p.k.dtype = p.v.dtype = p.out.dtype = FLASHSPARK_BFLOAT16;
  EXPECT_EQ(flashspark_attention_schedule_size(&p, &size), FLASHSPARK_OK) << flashspark_last_error();
  EXPECT_EQ(size, 0);
  EXPECT_EQ(flashspark_attention_schedule(&p), FLASHSPARK_OK) << flashspark_last_error();
  EXPECT_EQ(flashspark_attention_schedule_size(&p, nullptr), FLASHSPARK_INVALID_ARGUMENT);
  EXPECT_EQ(flashspark_attention_schedule(nullptr), FLASHSPARK_INVALID_ARGUMENT);
  int32_t two[2];
  p.scheduler_metadata = reinterpret_cast<int32_t *>(reinterpret_cast<char *>(two) + 1);
  EXPECT_EQ(flashspark_attention_schedule(&p), FLASHSPARK_INVALID_ARGUMENT);
  EXPECT_EQ(std::string(flashspark_last_error()).rfind("scheduler_metadata = ", 0), 0u) << flashspark_last_error();
  p.scheduler_metadata = two;
  p.scheduler_metadata_size = -1;
  EXPECT_EQ(flashspark_attention_schedule(&p), FLASHSPARK_INVALID_ARGUMENT);
  EXPECT_EQ(std::string(flashspark_last_error()).rfind("scheduler_metadata_size = -1", 0), 0u);
  p.scheduler_metadata_size = 2;
  p.window_left = -2;
  EXPECT_EQ(flashspark_attention_schedule(&p), FLASHSPARK_INVALID_ARGUMENT);
  p.window_left = -1;
  p.q.dtype = 77;
  EXPECT_EQ(flashspark_attention_schedule(&p), FLASHSPARK_INVALID_TYPE);
}

}  // namespace
}  // namespace flashspark
