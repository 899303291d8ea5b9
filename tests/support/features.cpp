#include "support/features.hpp"

namespace flashspark::test {
namespace {

using Rng = std::mt19937_64;

void nothing(Problem &, Rng &) {}
void make_causal(Problem &p, Rng &) {
  for (Sequence &s : p.seqs) s.causal = true;
}

template <int32_t Q, int32_t Kv, int32_t Out>
void dtypes(Problem &p, Rng &) {
  p.q_dtype = Q;
  p.kv_dtype = Kv;
  p.out_dtype = Out;
}

template <int64_t Hq, int64_t Hkv, int64_t D, int64_t Dv>
void shape(Problem &p, Rng &) {
  p.hq = Hq;
  p.hkv = Hkv;
  p.d = D;
  p.dv = Dv;
}

template <int64_t Left, int64_t Right>
void window(Problem &p, Rng &) {
  p.window_left = Left;
  p.window_right = Right;
}

std::vector<float> between(Rng &rng, int64_t count, float low, float high) {
  std::uniform_real_distribution<float> draw(low, high);
  std::vector<float> values(count);
  for (float &x : values) x = draw(rng);
  return values;
}

void with_ranges(Problem &p, Rng &rng) {
  make_causal(p, rng);
  p.prefix_mode = FLASHSPARK_PREFIX_PER_SEQ;
  for (Sequence &s : p.seqs) {  // disjoint, one of them at the end of the sequence
    const auto tk = static_cast<int32_t>(s.tk);
    s.ranges = {{1, 3}, {tk / 2, tk / 2 + 4}, {tk - 2, tk + 5}};
    if (tk < 20) s.ranges.resize(1);
  }
}

void with_descales(Problem &p, Rng &rng) {
  for (Sequence &s : p.seqs) {
    s.q_scale = between(rng, p.hkv, 0.5f, 2);
    s.k_scale = between(rng, p.hkv, 0.5f, 2);
    s.v_scale = between(rng, p.hkv, 0.5f, 2);
  }
}

constexpr int32_t kF32 = FLASHSPARK_FLOAT32, kF16 = FLASHSPARK_FLOAT16, kBf16 = FLASHSPARK_BFLOAT16,
                  kFp8 = FLASHSPARK_FLOAT8_E4M3;

}  // namespace

const std::vector<Feature> &features() {
  static const std::vector<Feature> list = {
      {"Plain", nothing, nothing},
      {"Causal", nothing, make_causal},
      {"CausalMixed", nothing,
       [](Problem &p, Rng &) {
         for (size_t b = 0; b < p.seqs.size(); b += 2) p.seqs[b].causal = true;
       }},
      {"WindowLeft", window<7, -1>, nothing},
      {"WindowRight", window<-1, 3>, nothing},
      {"WindowBoth", window<5, 2>, nothing},
      {"WindowDiagonal", window<0, 0>, nothing},
      {"WindowCausal", window<9, -1>, make_causal},
      {"WindowCausalRightOpen", window<9, 4>, make_causal},
      {"Chunk", [](Problem &p, Rng &) { p.attention_chunk = 7; }, nothing},
      {"ChunkCausal", [](Problem &p, Rng &) { p.attention_chunk = 16; }, make_causal},
      {"ChunkWindow",
       [](Problem &p, Rng &rng) {
         window<5, 4>(p, rng);
         p.attention_chunk = 9;
       },
       nothing},
      {"ChunkPrefixRanges", [](Problem &p, Rng &) { p.attention_chunk = 6; }, with_ranges},
      {"ChunkPrefixRangesClamped",
       [](Problem &p, Rng &rng) {
         window<5, -1>(p, rng);
         p.attention_chunk = 4;
         p.prefix_clamp = true;
       },
       with_ranges},
      {"Softcap", [](Problem &p, Rng &) { p.softcap = 1.5f; }, nothing},
      {"ScaleZero", [](Problem &p, Rng &) { p.scale = 0; }, make_causal},
      {"Sinks", [](Problem &p, Rng &rng) { p.sinks = normal(rng, p.hq, kF32, 2); }, nothing},
      {"SinksBf16Causal",
       [](Problem &p, Rng &rng) {
         p.sinks_dtype = kBf16;
         p.sinks = normal(rng, p.hq, kBf16, 2);
       },
       make_causal},
      {"SinksF16",
       [](Problem &p, Rng &rng) {
         p.sinks_dtype = kF16;
         p.sinks = normal(rng, p.hq, kF16, 2);
       },
       nothing},
      {"PrefixRanges", nothing, with_ranges},
      {"PrefixRangesWindow", window<4, -1>, with_ranges},
      {"PrefixRangesClamped",
       [](Problem &p, Rng &rng) {
         window<2, -1>(p, rng);
         p.prefix_clamp = true;
       },
       with_ranges},
      {"Rswa", [](Problem &p, Rng &) { p.rswa_window = 6; },
       [](Problem &p, Rng &rng) {
         make_causal(p, rng);
         for (Sequence &s : p.seqs) s.rswa_prefix = static_cast<int32_t>(s.tk / 4);
       }},
      {"RelBias", [](Problem &p, Rng &) { p.rel_extent = 12; }, make_causal},
      {"RelBiasBf16Bidirectional",
       [](Problem &p, Rng &) {
         p.rel_extent = 40;
         p.rel_dtype = kBf16;
       },
       nothing},
      {"RelBiasSoftcap",
       [](Problem &p, Rng &) {
         p.rel_extent = 5;
         p.rel_dtype = kF16;
         p.softcap = 2;
       },
       make_causal},
      {"Alibi", nothing,
       [](Problem &p, Rng &rng) {
         for (Sequence &s : p.seqs) s.alibi = between(rng, p.hq, 0.05f, 0.8f);
       }},
      {"AlibiCausal", nothing,
       [](Problem &p, Rng &rng) {
         make_causal(p, rng);
         for (Sequence &s : p.seqs) s.alibi = between(rng, p.hq, 0.05f, 0.8f);
       }},
      {"Bf16", dtypes<kBf16, kBf16, kBf16>, make_causal},
      {"Bf16ToF32", dtypes<kBf16, kBf16, kF32>, make_causal},
      {"F16", dtypes<kF16, kF16, kF16>, make_causal},
      {"F16ToF32", dtypes<kF16, kF16, kF32>, nothing},
      {"F32ToBf16", dtypes<kF32, kF32, kBf16>, nothing},
      {"Fp8KvBf16Q", dtypes<kBf16, kFp8, kBf16>, with_descales},
      {"Fp8KvF16Q", dtypes<kF16, kFp8, kF32>, with_descales},
      {"Fp8All", dtypes<kFp8, kFp8, kF32>, with_descales},
      {"Fp8OutScaled",
       [](Problem &p, Rng &rng) {
         dtypes<kFp8, kFp8, kFp8>(p, rng);
         p.output_scale = 0.01f;
       },
       with_descales},
      {"Fp8OutOfBf16",
       [](Problem &p, Rng &rng) {
         dtypes<kBf16, kBf16, kFp8>(p, rng);
         p.output_scale = 0.002f;
       },
       nothing},
      {"DescalesIgnoredFor16Bit", dtypes<kBf16, kBf16, kF32>, with_descales},
      {"Mqa", shape<8, 1, 16, 16>, make_causal},
      {"Mha", shape<3, 3, 16, 16>, make_causal},
      {"OddGroup", shape<6, 2, 40, 40>, make_causal},
      {"Dim8", shape<2, 1, 8, 8>, make_causal},
      {"Dim72Dv128", shape<2, 1, 72, 128>, make_causal},
      {"Dim192Dv128", shape<2, 2, 192, 128>, make_causal},
      {"Dim512", shape<2, 1, 512, 512>, make_causal},
      {"Dim64Dv8Bf16",
       [](Problem &p, Rng &rng) {
         shape<2, 1, 64, 8>(p, rng);
         dtypes<kBf16, kBf16, kF32>(p, rng);
       },
       nothing},
      {"Dropout", [](Problem &p, Rng &) { p.dropout = 0.3f; }, nothing},
      {"DropoutCausalWindowGqa",
       [](Problem &p, Rng &rng) {
         shape<6, 2, 40, 40>(p, rng);
         window<9, 4>(p, rng);
         p.dropout = 0.75f;
       },
       make_causal},
      {"DropoutSinksSoftcap",
       [](Problem &p, Rng &rng) {
         p.dropout = 0.1f;
         p.softcap = 2;
         p.sinks = normal(rng, p.hq, kF32, 2);
       },
       nothing},
      {"DropoutFp8",
       [](Problem &p, Rng &rng) {
         dtypes<kFp8, kFp8, kF32>(p, rng);
         p.dropout = 0.5f;
       },
       with_descales},
      {"Everything",
       [](Problem &p, Rng &rng) {
         dtypes<kBf16, kFp8, kBf16>(p, rng);
         window<30, 8>(p, rng);
         p.softcap = 4;
         p.rel_extent = 9;
         p.sinks = normal(rng, p.hq, kF32);
       },
       [](Problem &p, Rng &rng) {
         with_descales(p, rng);
         for (Sequence &s : p.seqs) s.alibi = between(rng, p.hq, 0.05f, 0.3f);
         for (size_t b = 0; b < p.seqs.size(); b += 2) p.seqs[b].causal = true;
       }},
  };
  return list;
}

const std::vector<std::pair<const char *, Layout>> &layouts() {
  using enum Kind;
  static const std::vector<std::pair<const char *, Layout>> list = {
      {"Varlen", {}},
      {"VarlenSlackStrided", {.head_major = true, .row_pad = 5, .slack = 3}},
      {"Dense", {.q = kDense, .kv = kDense}},
      {"DenseLeftpadBatchIndex", {.q = kDense, .kv = kDense, .head_major = true, .leftpad = 5, .kv_batch_index = true}},
      {"DenseBackwards", {.q = kDense, .kv = kDense, .backwards = true, .row_pad = 8, .prefix_per_token = true}},
      {"Paged16", {.kv = kPaged, .slack = 2}},
      {"Paged48Packed", {.q = kDense, .kv = kPaged, .page_size = 48, .packed_kv = true, .prefix_per_token = true}},
      {"Paged1BatchIndex", {.kv = kPaged, .page_size = 1, .slack = 1, .kv_batch_index = true}},
      {"Paged20Backwards", {.q = kDense, .kv = kPaged, .page_size = 20, .backwards = true, .leftpad = 3}},
      {"Paged32HeadMajorLeftpad", {.kv = kPaged, .page_size = 32, .head_major = true, .leftpad = 17}},
  };
  return list;
}

Problem problem_with(const Feature &feature, uint64_t seed) {
  Rng rng(seed);
  Problem p;
  p.hq = 4;
  p.hkv = 2;
  p.d = 16;
  p.dv = 24;
  p.scale = 0.25f;
  feature.dress(p, rng);
  for (const auto &[tq, tk] : {std::pair<int, int>{1, 37}, {5, 18}, {33, 71}, {0, 9}, {7, 0}, {20, 6}}) {
    p.seqs.push_back(random_sequence(rng, p, tq, tk));
  }
  feature.finish(p, rng);
  return p;
}

}  // namespace flashspark::test
