// Each field broken in turn: one error that names the argument, and nothing written.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "flashspark/flashspark.h"

namespace flashspark {
namespace {

constexpr int64_t kBig = std::numeric_limits<int64_t>::max();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

// A legal problem with its memory. B = 2, 4 query heads on 2 KV heads, D = 16, Dv = 8, Tq = 3, Tk <= 20.
struct World {
  flashspark_attention_params p;
  std::vector<float> q = std::vector<float>(2 * 3 * 4 * 16, 0.5f), k = std::vector<float>(6 * 16 * 2 * 16, 0.25f),
                     v = std::vector<float>(6 * 16 * 2 * 8, 1.0f), rel = std::vector<float>(6 * 4 * 5, 0.1f);
  std::vector<float> out = std::vector<float>(2 * 3 * 4 * 8, kNan), lse = std::vector<float>(2 * 3 * 4, kNan);
  std::vector<float> sinks = {0, 1, 2, 3}, alibi = {1, 2, 3, 4, 5, 6, 7, 8}, scale = {1, 2, 3, 4};
  std::vector<int32_t> cu_q = {0, 3, 6}, cu_k = {0, 20, 33}, used_q = {3, 2}, used_k = {20, 13}, leftpad = {2, 0},
                       kv_index = {3, 0}, pages = {4, 0, 77, -5, 2, -9, 1 << 30, -1}, per_seq = {1, 0},
                       ranges = {0, 1, -1, -1, 2, 4, 5, 3}, prefix = {2, 0};
  float output_scale = 0.5f;

  World() {
    flashspark_attention_params_init(&p);
    p.num_seqs = 2;
    p.num_heads_q = 4;
    p.num_heads_kv = 2;
    p.head_dim = 16;
    p.head_dim_v = 8;
    p.max_seqlen_q = 3;
    p.max_seqlen_k = 20;
    p.softmax_scale = 0.25f;
    p.q = {q.data(), 3 * 64, 64, 16, FLASHSPARK_FLOAT32, 0};
    p.k = {k.data(), 20 * 32, 32, 16, FLASHSPARK_FLOAT32, 0};
    p.v = {v.data(), 20 * 16, 16, 8, FLASHSPARK_FLOAT32, 0};
    p.out = {out.data(), 3 * 32, 32, 8, FLASHSPARK_FLOAT32, 0};
    p.lse = lse.data();
    p.lse_batch_stride = 12;
    p.lse_head_stride = 3;
    p.lse_token_stride = 1;
  }
  void varlen() {
    p.cu_seqlens_q = cu_q.data();
    p.cu_seqlens_k = cu_k.data();
    p.total_q = 6;
    p.total_k = 33;
    p.lse_head_stride = 6;
  }
  void paged() {
    p.page_table = pages.data();
    p.page_table_stride = 4;
    p.num_page_slots = 2;
    p.num_pages = 6;
    p.page_size = 16;
    p.k.batch_stride = 16 * 32;
    p.v.batch_stride = 16 * 16;
    p.seqused_k = used_k.data();
    pages[5] = -9;  // sequence 1 has 13 keys: its second slot is never read
  }
  void index_pages() {  // sequence 0 has row 0 of three, sequence 1 row 2
    pages = {4, 0, 77, -5, -1, -1, -1, -1, 2, -9, 1 << 30, -1};
    kv_index = {0, 2};
    p.kv_batch_index = kv_index.data();
    p.num_kv_seqs = 3;
    p.page_table = pages.data();
  }
  void dense_cache() {
    p.kv_batch_index = kv_index.data();
    p.num_kv_seqs = 4;
    p.seqused_k = used_k.data();
    p.leftpad_k = leftpad.data();
  }
  void fp8() {  // the same bytes read as e4m3: strides stay legal
    p.k.dtype = p.v.dtype = p.q.dtype = FLASHSPARK_FLOAT8_E4M3;
    p.q_descale = p.k_descale = p.v_descale = {scale.data(), 2, 1};
  }
  bool untouched() const {
    for (float x : out)
      if (!std::isnan(x)) return false;
    for (float x : lse)
      if (!std::isnan(x)) return false;
    return true;
  }
};

struct Fault {
  const char *name;
  std::function<void(World &)> plant;
  const char *argument;  // what the message must begin with
  flashspark_status status = FLASHSPARK_INVALID_ARGUMENT;
};

void PrintTo(const Fault &fault, std::ostream *os) {
  *os << fault.name;
}

#define SET(field, value) [](World &w) { w.p.field = value; }
#define AFTER(setup, field, value) \
  [](World &w) {                   \
    w.setup();                     \
    w.p.field = value;             \
  }
#define POKE(setup, array, at, value) \
  [](World &w) {                      \
    w.setup();                        \
    w.array[at] = value;              \
  }

void after_rswa(World &w) {
  w.p.rswa_window = 4;
  w.p.rswa_prefix_lens = w.prefix.data();
}
void after_prefix(World &w) {
  w.p.prefix_mode = FLASHSPARK_PREFIX_PER_SEQ;
  w.p.num_prefix_ranges = 2;
  w.p.prefix_ranges = w.ranges.data();
}
void after_rel(World &w) {
  w.p.rel_logits = w.rel.data();
  w.p.rel_dtype = FLASHSPARK_FLOAT32;
  w.p.rel_extent = 5;
  w.p.rel_head_stride = 5;
  w.p.rel_token_stride = 20;
}
void after_sinks(World &w) {
  w.p.sinks = w.sinks.data();
  w.p.sinks_dtype = FLASHSPARK_FLOAT32;
}
void after_alibi(World &w) {
  w.p.alibi_slopes = w.alibi.data();
  w.p.alibi_batch_stride = 4;
}
template <class T>
T *misaligned(const T *p) {
  return reinterpret_cast<T *>(reinterpret_cast<uintptr_t>(p) + 1);
}

constexpr auto kType = FLASHSPARK_INVALID_TYPE;

const std::vector<Fault> kFaults = {
    {"StructSizeZero", SET(struct_size, 0), "flashspark_attention_params", FLASHSPARK_VERSION_MISMATCH},
    {"StructSizeLarger", SET(struct_size, sizeof(w.p) + 8), "flashspark_attention_params", FLASHSPARK_VERSION_MISMATCH},
    {"AbiVersion", SET(abi_version, 2), "flashspark_attention_params", FLASHSPARK_VERSION_MISMATCH},
    {"Device", SET(device, 7), "device = 7"},
    {"DeviceIndexNegative", SET(device_index, -1), "device_index = -1"},
    {"DeviceIndexOnCpu", SET(device_index, 1), "device_index = 1"},
    {"Implementation", SET(implementation, "cpu-magic"), "implementation = cpu-magic"},
    {"NumThreads", SET(num_threads, -1), "num_threads = -1"},
    {"NumSplits", SET(num_splits, -3), "num_splits = -3"},
    {"CheckDevice", SET(check_device, 2), "check_device = 2"},
    {"Deterministic", SET(deterministic, 2), "deterministic = 2"},
    {"NumSeqsNegative", SET(num_seqs, -1), "num_seqs = -1"},
    {"NumSeqsHuge", SET(num_seqs, kBig), "num_seqs = "},
    {"HeadsZero", SET(num_heads_q, 0), "num_heads_q = 0"},
    {"HeadsNegative", SET(num_heads_q, -4), "num_heads_q = -4"},
    {"HeadsNotDividing", SET(num_heads_q, 5), "num_heads_q = 5"},
    {"HeadsKvZero", SET(num_heads_kv, 0), "num_heads_kv = 0"},
    {"HeadsKvMore", SET(num_heads_kv, 8), "num_heads_q = 4"},
    {"HeadsHuge", SET(num_heads_q, kBig), "num_heads_q = "},
    {"HeadDimZero", SET(head_dim, 0), "head_dim = 0"},
    {"HeadDimOdd", SET(head_dim, 12), "head_dim = 12"},
    {"HeadDimWide", SET(head_dim, 520), "head_dim = 520"},
    {"HeadDimNegative", SET(head_dim, -8), "head_dim = -8"},
    {"HeadDimVOdd", SET(head_dim_v, 9), "head_dim_v = 9"},
    {"HeadDimVWide", SET(head_dim_v, 1024), "head_dim_v = 1024"},
    {"MaxSeqlenQNegative", SET(max_seqlen_q, -1), "max_seqlen_q = -1"},
    {"MaxSeqlenQHuge", SET(max_seqlen_q, int64_t{1} << 31), "max_seqlen_q = 2147483648"},
    {"QueryRowsOverflow", SET(max_seqlen_q, INT32_MAX), "max_seqlen_q = 2147483647"},
    {"MaxSeqlenKNegative", SET(max_seqlen_k, -2), "max_seqlen_k = -2"},
    {"MaxSeqlenKHuge", SET(max_seqlen_k, kBig), "max_seqlen_k = "},
    {"TotalQNegative", AFTER(varlen, total_q, -1), "total_q = -1"},
    {"TotalKNegative", AFTER(varlen, total_k, -1), "total_k = -1"},
    {"NumKvSeqsNegative", AFTER(dense_cache, num_kv_seqs, -1), "num_kv_seqs = -1"},
    // Pages.
    {"PageSizeZero", AFTER(paged, page_size, 0), "page_size = 0"},
    {"PageSizeWide", AFTER(paged, page_size, (1 << 20) + 1), "page_size = 1048577"},
    {"PageSizeNegative", AFTER(paged, page_size, -16), "page_size = -16"},
    {"PageSizeWithoutTable", SET(page_size, 16), "page_size = 16"},
    {"NumPagesNegative", AFTER(paged, num_pages, -1), "num_pages = -1"},
    {"NumPageSlotsNegative", AFTER(paged, num_page_slots, -1), "num_page_slots = -1"},
    {"PageTableStrideShort", AFTER(paged, page_table_stride, 1), "page_table_stride = 1"},
    {"PageTableStrideHuge", AFTER(paged, page_table_stride, kBig), "page_table_stride = "},
    {"PagedBeyondTable", [](World &w) { w.paged(); w.p.seqused_k = nullptr; w.p.max_seqlen_k = 33; }, "max_seqlen_k = 33"},
    {"PagedWithoutLengths", [](World &w) { w.paged(); w.p.seqused_k = nullptr; w.pages[5] = 6; }, "page_table[1,1] = 6"},
    {"PagedAndVarlen", AFTER(paged, cu_seqlens_k, w.cu_k.data()), "cu_seqlens_k = given"},
    {"PagedBatchIndexBeyond", [](World &w) { w.paged(); w.index_pages(); w.kv_index[1] = 3; }, "kv_batch_index[1] = 3"},
    {"PagedBatchIndexNegative", [](World &w) { w.paged(); w.index_pages(); w.kv_index[0] = -1; }, "kv_batch_index[0] = -1"},
    {"PagedBatchIndexPage", [](World &w) { w.paged(); w.index_pages(); w.pages[1] = 6; }, "page_table[0,1] = 6"},
    {"PageNegative", POKE(paged, pages, 1, -1), "page_table[0,1] = -1"},
    {"PageBeyondCache", POKE(paged, pages, 4, 6), "page_table[1,0] = 6"},
    {"PagedTooManyKeys", POKE(paged, used_k, 1, 33), "seqused_k[1] = 33"},
    // Lengths.
    {"VarlenAndBatchIndex", AFTER(varlen, kv_batch_index, w.kv_index.data()), "kv_batch_index = given"},
    {"VarlenAndLeftpad", AFTER(varlen, leftpad_k, w.leftpad.data()), "leftpad_k = given"},
    {"CuSeqlensQNegative", POKE(varlen, cu_q, 0, -1), "cu_seqlens_q[0] = -1"},
    {"CuSeqlensQFalling", POKE(varlen, cu_q, 1, 7), "cu_seqlens_q"},
    {"CuSeqlensQBeyond", POKE(varlen, cu_q, 2, 7), "cu_seqlens_q[2] = 7"},
    {"CuSeqlensQTooLong", AFTER(varlen, max_seqlen_q, 2), "cu_seqlens_q[1] = 3"},
    {"CuSeqlensKNegative", POKE(varlen, cu_k, 0, -1), "cu_seqlens_k[0] = -1"},
    {"CuSeqlensKFalling", POKE(varlen, cu_k, 2, 19), "cu_seqlens_k[2] = 19"},
    {"CuSeqlensKBeyond", POKE(varlen, cu_k, 2, 34), "cu_seqlens_k[2] = 34"},
    {"CuSeqlensKTooLong", AFTER(varlen, max_seqlen_k, 19), "cu_seqlens_k[1] = 20"},
    {"SequsedQNegative", [](World &w) { w.p.seqused_q = w.used_q.data(); w.used_q[1] = -1; }, "seqused_q[1] = -1"},
    {"SequsedQTooMany", [](World &w) { w.p.seqused_q = w.used_q.data(); w.used_q[0] = 4; }, "seqused_q[0] = 4"},
    {"SequsedKNegative", POKE(dense_cache, used_k, 0, -1), "seqused_k[0] = -1"},
    {"SequsedKTooMany", POKE(dense_cache, used_k, 1, 21), "seqused_k[1] = 21"},
    {"LeftpadNegative", POKE(dense_cache, leftpad, 1, -1), "leftpad_k[1] = -1"},
    {"BatchIndexNegative", POKE(dense_cache, kv_index, 0, -1), "kv_batch_index[0] = -1"},
    {"BatchIndexBeyond", POKE(dense_cache, kv_index, 1, 4), "kv_batch_index[1] = 4"},
    {"CausalPerSeq", [](World &w) { w.p.causal_per_seq = w.per_seq.data(); w.per_seq[1] = 2; }, "causal_per_seq[1] = 2"},
    {"Misaligned int32", [](World &w) { w.varlen(); w.p.cu_seqlens_q = misaligned(w.cu_q.data()); }, "cu_seqlens_q"},
    // Tensors.
    {"QTypeNone", SET(q.dtype, 0), "q.dtype = 0", kType},
    {"QTypeUnknown", SET(q.dtype, 99), "q.dtype = 99", kType},
    {"KTypeOther", [](World &w) { w.p.k.dtype = w.p.v.dtype = FLASHSPARK_BFLOAT16; }, "k.dtype = bfloat16", kType},
    {"Fp8QueryAlone", SET(q.dtype, FLASHSPARK_FLOAT8_E4M3), "k.dtype = float32", kType},
    {"VTypeOther", SET(v.dtype, FLASHSPARK_FLOAT16), "v.dtype = float16", kType},
    {"OutType", SET(out.dtype, -1), "out.dtype = -1", kType},
    {"QNull", SET(q.data, nullptr), "q.data = NULL"},
    {"KNull", SET(k.data, nullptr), "k.data = NULL"},
    {"VNull", SET(v.data, nullptr), "v.data = NULL"},
    {"OutNull", SET(out.data, nullptr), "out.data = NULL"},
    {"QMisaligned", SET(q.data, misaligned(w.q.data())), "q.data = "},
    {"OutMisaligned", SET(out.data, misaligned(w.out.data())), "out.data = "},
    {"LseMisaligned", SET(lse, misaligned(w.lse.data())), "lse.data = "},
    {"QStrideOverflow", SET(q.token_stride, kBig), "q.token_stride = "},
    {"KStrideOverflow", SET(k.batch_stride, -kBig), "k.batch_stride = "},
    {"VStrideOverflow", SET(v.head_stride, kBig / 2), "v.head_stride = "},
    {"StrideMinimum", SET(k.head_stride, std::numeric_limits<int64_t>::min()), "k.head_stride = "},
    {"OutRowsOverlap", SET(out.token_stride, 16), "out.token_stride = 16"},
    {"OutHeadsOverlap", SET(out.head_stride, 0), "out.head_stride = 0"},
    {"LseOverlap", SET(lse_token_stride, 0), "lse.token_stride = 0"},
    // Scores.
    {"ScaleNegative", SET(softmax_scale, -0.5f), "softmax_scale = -0.5"},
    {"ScaleNan", SET(softmax_scale, kNan), "softmax_scale = nan"},
    {"ScaleInfinite", SET(softmax_scale, kInf), "softmax_scale = inf"},
    {"SoftcapNegative", SET(softcap, -1), "softcap = -1"},
    {"SoftcapNan", SET(softcap, kNan), "softcap = nan"},
    {"SoftcapInfinite", SET(softcap, kInf), "softcap = inf"},
    {"QDescaleNan", POKE(fp8, scale, 1, kNan), "q_descale[0,1] = nan"},
    {"DescaleNegative", POKE(fp8, scale, 2, -1), "q_descale[1,0] = -1"},
    {"KDescaleMisaligned", AFTER(fp8, k_descale.data, misaligned(w.scale.data())), "k_descale.data"},
    {"VDescaleStride", AFTER(fp8, v_descale.batch_stride, kBig), "v_descale.batch_stride"},
    {"OutputScaleWithoutFp8", SET(output_scale, &w.output_scale), "output_scale = given"},
    {"OutputScaleZero", [](World &w) { w.p.out.dtype = FLASHSPARK_FLOAT8_E4M3; w.output_scale = 0; w.p.output_scale = &w.output_scale; }, "output_scale = 0"},
    {"OutputScaleNan", [](World &w) { w.p.out.dtype = FLASHSPARK_FLOAT8_E4M3; w.output_scale = kNan; w.p.output_scale = &w.output_scale; }, "output_scale = nan"},
    {"SinkType", [](World &w) { after_sinks(w); w.p.sinks_dtype = FLASHSPARK_FLOAT8_E4M3; }, "sinks_dtype", kType},
    {"SinkNan", [](World &w) { after_sinks(w); w.sinks[2] = kNan; }, "sinks[2] = nan"},
    {"SinkInfinite", [](World &w) { after_sinks(w); w.sinks[3] = kInf; }, "sinks[3] = inf"},
    {"SinksMisaligned", [](World &w) { after_sinks(w); w.p.sinks = misaligned(w.sinks.data()); }, "sinks = "},
    {"RelType", [](World &w) { after_rel(w); w.p.rel_dtype = 0; }, "rel_dtype", kType},
    {"RelExtentZero", [](World &w) { after_rel(w); w.p.rel_extent = 0; }, "rel_extent = 0"},
    {"RelExtentNegative", [](World &w) { after_rel(w); w.p.rel_extent = -5; }, "rel_extent = -5"},
    {"RelStride", [](World &w) { after_rel(w); w.p.rel_token_stride = kBig; }, "rel_logits.token_stride"},
    {"AlibiNan", [](World &w) { after_alibi(w); w.alibi[6] = kNan; }, "alibi_slopes"},
    {"AlibiStride", [](World &w) { after_alibi(w); w.p.alibi_batch_stride = -4; }, "alibi_batch_stride = -4"},
    {"DropoutNegative", SET(dropout_p, -0.1f), "dropout_p = -0.1"},
    {"DropoutOne", SET(dropout_p, 1), "dropout_p = 1"},
    {"DropoutNan", SET(dropout_p, kNan), "dropout_p = nan"},
    {"DropoutReserved", SET(reserved_dropout, 1), "reserved_dropout = 1"},
    {"DropoutState", [](World &w) { w.p.dropout_p = 0.5f; w.p.dropout_state = misaligned(reinterpret_cast<const uint64_t *>(w.q.data())); }, "dropout_state = "},
    // Mask.
    {"Causal", SET(causal, 2), "causal = 2"},
    {"WindowLeft", SET(window_left, -2), "window_left = -2"},
    {"WindowRight", SET(window_right, -7), "window_right = -7"},
    {"WindowHuge", SET(window_left, kBig), "window_left = "},
    {"Chunk", SET(attention_chunk, -1), "attention_chunk = -1"},
    {"ChunkHuge", SET(attention_chunk, kBig), "attention_chunk = "},
    {"RswaAndChunk", [](World &w) { after_rswa(w); w.p.attention_chunk = 8; }, "attention_chunk = 8"},
    {"PrefixMode", SET(prefix_mode, 3), "prefix_mode = 3"},
    {"PrefixRangesNull", [](World &w) { after_prefix(w); w.p.prefix_ranges = nullptr; }, "prefix_ranges = NULL"},
    {"PrefixCountNegative", [](World &w) { after_prefix(w); w.p.num_prefix_ranges = -1; }, "num_prefix_ranges = -1"},
    {"PrefixClamp", [](World &w) { after_prefix(w); w.p.prefix_clamp_window = 2; }, "prefix_clamp_window = 2"},
    {"RswaNegative", SET(rswa_window, -1), "rswa_window = -1"},
    {"RswaWithoutLens", [](World &w) { after_rswa(w); w.p.rswa_prefix_lens = nullptr; }, "rswa_prefix_lens = NULL"},
    {"RswaAndWindow", [](World &w) { after_rswa(w); w.p.window_left = 3; }, "window_left = 3"},
    {"RswaAndPrefix", [](World &w) { after_rswa(w); after_prefix(w); }, "rswa_window = 4"},
};

class Validator : public testing::TestWithParam<Fault> {};

TEST_P(Validator, NamesTheArgumentAndWritesNothing) {
  const Fault &fault = GetParam();
  World w;
  fault.plant(w);
  const auto check = [&](flashspark_status status, const char *entry) {
    EXPECT_EQ(status, fault.status) << entry << ": " << flashspark_last_error();
    const std::string text = flashspark_last_error();
    EXPECT_EQ(text.rfind(fault.argument, 0), 0u)
        << entry << " says: " << text << "\nexpected it to begin: " << fault.argument;
    EXPECT_TRUE(w.untouched()) << entry << " wrote to out or lse";
  };
  size_t size = 123;
  char text[64] = "x";
  check(flashspark_attention_forward(&w.p), "forward");
  check(flashspark_attention_explain(&w.p, text, sizeof text), "explain");
  check(flashspark_attention_workspace_size(&w.p, &size), "workspace_size");
  if (w.p.implementation == nullptr) check(flashspark_attention_validate(&w.p), "validate");
}

INSTANTIATE_TEST_SUITE_P(Faults, Validator, testing::ValuesIn(kFaults), [](const auto &info) {
  std::string name = info.param.name;
  std::erase(name, ' ');
  return name;
});

// The worlds that the faults are planted in are legal themselves, or the table would prove nothing.
TEST(Validator, AcceptsEveryUnbrokenProblem) {
  const std::vector<std::function<void(World &)>> worlds = {[](World &) {},
                                                            &World::varlen,
                                                            &World::paged,
                                                            &World::dense_cache,
                                                            &World::fp8,
                                                            [](World &w) {
                                                              w.paged();
                                                              w.index_pages();
                                                            },
                                                            [](World &w) {
                                                              w.paged();
                                                              w.p.seqused_k = nullptr;
                                                              w.pages[5] = 1;
                                                            },
                                                            [](World &w) { w.p.attention_chunk = 6; },
                                                            [](World &w) { w.p.check_device = 1; },
                                                            after_rswa,
                                                            after_prefix,
                                                            after_rel,
                                                            after_sinks,
                                                            after_alibi,
                                                            [](World &w) {
                                                              w.varlen();
                                                              after_rel(w);
                                                            },
                                                            [](World &w) {
                                                              w.paged();
                                                              after_prefix(w);
                                                            },
                                                            [](World &w) { w.p.seqused_q = w.used_q.data(); },
                                                            [](World &w) { w.p.causal_per_seq = w.per_seq.data(); }};
  for (size_t n = 0; n < worlds.size(); ++n) {
    World w;
    worlds[n](w);
    EXPECT_EQ(flashspark_attention_validate(&w.p), FLASHSPARK_OK) << n << ": " << flashspark_last_error();
    EXPECT_TRUE(w.untouched());
    EXPECT_EQ(flashspark_attention_forward(&w.p), FLASHSPARK_OK) << n << ": " << flashspark_last_error();
    EXPECT_FALSE(w.untouched());
  }
}

TEST(Validator, EmptyProblemsAreLegal) {
  const std::vector<std::function<void(World &)>> empties = {[](World &w) { w.p.num_seqs = 0; },
                                                             [](World &w) {
                                                               w.p.num_seqs = 0;
                                                               w.p.q.data = w.p.k.data = w.p.v.data = w.p.out.data =
                                                                   nullptr;
                                                               w.p.lse = nullptr;
                                                             },
                                                             [](World &w) {
                                                               w.p.max_seqlen_q = 0;
                                                               w.p.q.data = w.p.out.data = nullptr;
                                                             },
                                                             [](World &w) {
                                                               w.varlen();
                                                               w.cu_q = {0, 0, 0};
                                                               w.p.total_q = 0;
                                                               w.p.q.data = w.p.out.data = nullptr;
                                                             }};
  for (size_t n = 0; n < empties.size(); ++n) {
    World w;
    empties[n](w);
    EXPECT_EQ(flashspark_attention_forward(&w.p), FLASHSPARK_OK) << n << ": " << flashspark_last_error();
    EXPECT_TRUE(w.untouched());
  }
}

// Padded rows of a captured graph: no query, stale length, stale pages.
TEST(Validator, RowsWithoutQueriesMayHoldStaleLengthsAndPages) {
  World w;
  w.varlen();
  w.p.cu_seqlens_k = nullptr;
  w.p.total_k = 0;
  w.paged();
  w.cu_q = {0, 3, 3};
  w.used_k[1] = 1 << 20;
  w.pages[4] = -9;
  EXPECT_EQ(flashspark_attention_forward(&w.p), FLASHSPARK_OK) << flashspark_last_error();
}

}  // namespace
}  // namespace flashspark
