// Every feature at least once, small enough that the scalar oracle takes seconds.
#include <functional>
#include <utility>

#include "cases/cases.hpp"

namespace flashspark::cases {
namespace {

constexpr int32_t kF32 = FLASHSPARK_FLOAT32, kF16 = FLASHSPARK_FLOAT16, kBf16 = FLASHSPARK_BFLOAT16,
                  kFp8 = FLASHSPARK_FLOAT8_E4M3;

// A prefill, one decode row, a chunk whose keys are longer than its queries, one that ends off every tile size.
const std::vector<SeqLen> kPrefill = {{96, 96}, {1, 333}, {37, 230}, {67, 71}};
const std::vector<SeqLen> kDecode = {{1, 517}, {1, 31}, {1, 1000}};

using Change = std::function<void(Case &)>;

class List {
 public:
  void add(const std::string &group, const std::string &name, std::vector<SeqLen> lens, const Change &change) {
    Case c;
    c.group = group;
    c.name = group + "/" + name;
    c.lens = std::move(lens);
    c.seed = 100 + cases.size();
    change(c);
    cases.push_back(std::move(c));
  }
  std::vector<Case> cases;
};

void set_types(Case &c, int32_t q, int32_t kv, int32_t out) {
  c.q_dtype = q;
  c.kv_dtype = kv;
  c.out_dtype = out;
}

void make_paged(Case &c, int64_t page_size) {
  c.kv_layout = Layout::kPaged;
  c.page_size = page_size;
}

const std::pair<const char *, Change> kMasks[] = {
    {"full", [](Case &) {}},
    {"causal", [](Case &c) { c.causal = true; }},
    {"causal-per-seq", [](Case &c) { c.causal_per_seq = true; }},
    {"window-left-causal", [](Case &c) { c.causal = true, c.window_left = 40; }},
    {"window-both", [](Case &c) { c.window_left = 19, c.window_right = 30; }},
    {"window-right", [](Case &c) { c.window_right = 5; }},
    {"causal-per-seq-window", [](Case &c) { c.causal_per_seq = true, c.window_left = c.window_right = 25; }},
    {"chunk", [](Case &c) { c.attention_chunk = 29; }},
    {"chunk-causal", [](Case &c) { c.causal = true, c.attention_chunk = 48; }},
    {"chunk-window", [](Case &c) { c.causal_per_seq = true, c.attention_chunk = 64, c.window_left = 37; }},
    {"chunk-prefix-token",
     [](Case &c) { c.causal = true, c.attention_chunk = 40, c.prefix_mode = FLASHSPARK_PREFIX_PER_TOKEN; }},
    {"softcap", [](Case &c) { c.causal = true, c.softcap = 2.0f; }},
    {"sinks", [](Case &c) { c.causal = true, c.sinks = true; }},
    {"sinks-bf16-window", [](Case &c) { c.causal = c.sinks = true, c.sinks_dtype = kBf16, c.window_left = 63; }},
    {"prefix-seq", [](Case &c) { c.causal = true, c.prefix_mode = FLASHSPARK_PREFIX_PER_SEQ; }},
    {"prefix-seq-window",
     [](Case &c) { c.causal = true, c.window_left = 15, c.prefix_mode = FLASHSPARK_PREFIX_PER_SEQ; }},
    {"prefix-seq-clamp",
     [](Case &c) { c.causal = c.prefix_clamp = true, c.window_left = 15, c.prefix_mode = FLASHSPARK_PREFIX_PER_SEQ; }},
    {"prefix-token", [](Case &c) { c.causal = true, c.prefix_mode = FLASHSPARK_PREFIX_PER_TOKEN; }},
    {"prefix-token-clamp",
     [](Case &c) {
       c.causal = c.prefix_clamp = true, c.window_left = 15, c.prefix_mode = FLASHSPARK_PREFIX_PER_TOKEN;
     }},
    {"rswa", [](Case &c) { c.causal = true, c.rswa_window = 24; }},
    {"rel-logits", [](Case &c) { c.causal = true, c.rel_extent = 128; }},
    {"rel-logits-f32-window",
     [](Case &c) { c.causal = true, c.window_left = 63, c.rel_extent = 64, c.rel_dtype = kF32; }},
    {"alibi", [](Case &c) { c.causal = c.alibi = true; }},
    {"alibi-per-batch", [](Case &c) { c.alibi = c.alibi_per_batch = true; }},
};

// Each mask alone, with grouped heads, over pages, and split over the keys.
void add_masks(List &list) {
  for (const auto &[name, mask] : kMasks) {
    const Change &change = mask;
    const std::string base = name;
    list.add("mask", base, kPrefill, [&](Case &c) { change(c); });
    list.add("mask", base + "+gqa", kPrefill, [&](Case &c) { change(c), c.heads_q = 6, c.heads_kv = 2; });
    list.add("mask", base + "+paged", kPrefill, [&](Case &c) { change(c), c.heads_kv = 2, make_paged(c, 16); });
    list.add("mask", base + "+split", kDecode, [&](Case &c) { change(c), c.heads_kv = 1, c.num_splits = 3; });
    list.add("mask", base + "+split+paged", {{2, 260}, {1, 700}},
             [&](Case &c) { change(c), c.heads_kv = 2, c.num_splits = 4, make_paged(c, 32); });
  }
  list.add("mask", "everything", kPrefill, [](Case &c) {
    c.causal = c.sinks = c.alibi = true;
    c.softcap = 5, c.window_left = 50, c.rel_extent = 32, c.heads_q = 8, c.heads_kv = 2;
    c.prefix_mode = FLASHSPARK_PREFIX_PER_SEQ;
    make_paged(c, 48);
  });
  list.add("mask", "softcap-large-scale", kPrefill, [](Case &c) { c.softcap = 30, c.softmax_scale = 1; });
}

void add_types(List &list) {
  const struct {
    const char *name;
    int32_t q, kv, out;
  } kTypes[] = {
      {"f32", kF32, kF32, kF32},
      {"f16", kF16, kF16, kF16},
      {"bf16", kBf16, kBf16, kBf16},
      {"f16-out-f32", kF16, kF16, kF32},
      {"bf16-out-f32", kBf16, kBf16, kF32},
      {"bf16-fp8kv", kBf16, kFp8, kBf16},
      {"f16-fp8kv", kF16, kFp8, kF16},
      {"f32-fp8kv", kF32, kFp8, kF32},
      {"fp8-out-bf16", kFp8, kFp8, kBf16},
      {"fp8-out-f16", kFp8, kFp8, kF16},
      {"fp8-out-f32", kFp8, kFp8, kF32},
  };
  for (const auto &type : kTypes) {
    for (const bool paged : {false, true}) {
      list.add("dtype", type.name + std::string(paged ? "+paged" : ""), kPrefill, [&](Case &c) {
        set_types(c, type.q, type.kv, type.out);
        c.causal = true, c.heads_kv = 2;
        if (paged) make_paged(c, 16);
        if (type.kv == kFp8) c.k_descale = c.v_descale = Descale::kFull;
        if (type.q == kFp8) c.q_descale = Descale::kFull;
      });
    }
  }
  list.add("dtype", "bf16-out-fp8", kPrefill,
           [](Case &c) { set_types(c, kBf16, kBf16, kFp8), c.output_scale = 0.01f; });
  list.add("dtype", "fp8-out-fp8+paged", kPrefill, [](Case &c) {
    set_types(c, kFp8, kFp8, kFp8), make_paged(c, 16);
    c.q_descale = c.k_descale = c.v_descale = Descale::kPerTensor;
    c.output_scale = 0.02f;
  });
  // So small a scale that most of out saturates at 448.
  list.add("dtype", "fp8-out-saturated", {{8, 5}},
           [](Case &c) { set_types(c, kBf16, kBf16, kFp8), c.output_scale = 1e-3f; });
  list.add("dtype", "fp8-out-unscaled", kDecode, [](Case &c) { set_types(c, kBf16, kBf16, kFp8); });
  list.add("dtype", "fp8kv-descale-per-head+split", kDecode, [](Case &c) {
    set_types(c, kBf16, kFp8, kBf16), make_paged(c, 16);
    c.heads_q = 8, c.heads_kv = 4, c.num_splits = 2;
    c.k_descale = c.v_descale = Descale::kPerHead;
  });
  list.add("dtype", "bf16-descale-ignored", kPrefill, [](Case &c) {
    make_paged(c, 16);
    c.q_descale = c.k_descale = c.v_descale = Descale::kPerTensor;
  });
}

void add_head_dims(List &list) {
  const std::pair<int64_t, int64_t> kDims[] = {{8, 8},     {16, 16},  {40, 40},   {64, 64},   {72, 72},
                                               {80, 80},   {96, 96},  {128, 128}, {192, 128}, {256, 256},
                                               {512, 512}, {64, 512}, {104, 24}};
  for (const auto &dims : kDims) {
    std::string name = "d";
    name += std::to_string(dims.first);
    if (dims.first != dims.second) name.append("-dv").append(std::to_string(dims.second));
    const auto shape = [&](Case &c) {
      c.head_dim = dims.first, c.head_dim_v = dims.second;
      c.heads_q = 2, c.heads_kv = 1, c.causal = true;
    };
    list.add("head-dim", name, {{50, 77}, {1, 130}}, [&](Case &c) { shape(c); });
    list.add("head-dim", name + "+paged", {{3, 200}, {1, 77}}, [&](Case &c) { shape(c), make_paged(c, 16); });
    list.add("head-dim", name + "-f32", {{33, 70}}, [&](Case &c) { shape(c), set_types(c, kF32, kF32, kF32); });
  }
  list.add("head-dim", "d256-fp8kv", kDecode,
           [](Case &c) { c.head_dim = 256, set_types(c, kBf16, kFp8, kBf16), make_paged(c, 16), c.heads_kv = 1; });
  list.add("head-dim", "d40-fp8", kPrefill, [](Case &c) { c.head_dim = 40, set_types(c, kFp8, kFp8, kBf16); });
}

void add_pages(List &list) {
  for (const int64_t page_size : {16, 32, 48, 64, 256, 784}) {
    for (const auto order : {CacheOrder::kPageTokenHead, CacheOrder::kPageHeadToken}) {
      for (const bool packed : {false, true}) {
        const std::string name = "page" + std::to_string(page_size) +
                                 (order == CacheOrder::kPageHeadToken ? "-head-major" : "") + (packed ? "-packed" : "");
        list.add("page", name, {{20, 150}, {1, 900}, {3, 784}, {0, 40}}, [&](Case &c) {
          make_paged(c, page_size);
          c.cache_order = order, c.packed_kv = packed;
          c.causal = true, c.heads_kv = 2;
        });
      }
    }
  }
  // Pages of any size; what a page holds then begins and ends anywhere in a tile of keys.
  for (const int64_t page_size : {1, 3, 4, 20, 100, 1000}) {
    const std::string name = "any" + std::to_string(page_size);
    list.add("page", name, {{20, 150}, {1, 900}, {3, 784}, {0, 40}},
             [&](Case &c) { make_paged(c, page_size), c.causal = true, c.heads_kv = 2; });
    list.add("page", name + "-head-major-packed-window", {{70, 333}, {1, 41}}, [&](Case &c) {
      make_paged(c, page_size), c.cache_order = CacheOrder::kPageHeadToken, c.packed_kv = true;
      c.causal = true, c.window_left = 50, c.heads_q = 6, c.heads_kv = 2, c.head_dim = 128;
    });
    list.add("page", name + "-fp8kv+split", {{1, 1500}, {2, 77}}, [&](Case &c) {
      make_paged(c, page_size), c.q_layout = Layout::kDense, c.leftpad = 5, c.heads_kv = 1, c.num_splits = 3;
      set_types(c, kBf16, kFp8, kBf16), c.k_descale = c.v_descale = Descale::kFull;
    });
  }
  list.add("page", "whole-table", {{5, 96}, {1, 96}, {30, 96}},
           [](Case &c) { make_paged(c, 16), c.whole_table = c.causal = true, c.heads_kv = 2; });
  list.add("page", "whole-table-dense-q", {{9, 70}, {9, 70}},
           [](Case &c) { make_paged(c, 20), c.whole_table = c.causal = true, c.q_layout = Layout::kDense; });
  list.add("page", "batch-index", kPrefill, [](Case &c) { make_paged(c, 16), c.kv_batch_index = c.causal = true; });
  list.add("page", "batch-index-decode", {{1, 517}, {1, 31}, {1, 1000}},
           [](Case &c) { make_paged(c, 7), c.kv_batch_index = c.causal = true, c.heads_kv = 1; });
  list.add("page", "batch-index-whole-table", {{4, 65}, {4, 65}, {4, 65}},
           [](Case &c) { make_paged(c, 16), c.kv_batch_index = c.whole_table = true; });
  list.add("page", "packed-d-192-128", kPrefill, [](Case &c) {
    make_paged(c, 16), c.packed_kv = true, c.head_dim = 192, c.head_dim_v = 128, c.heads_kv = 1;
  });
  list.add("page", "strided", kPrefill, [](Case &c) { make_paged(c, 48), c.strided = true, c.heads_kv = 2; });
  list.add("page", "dense-q-leftpad", {{9, 120}, {9, 64}, {9, 9}},
           [](Case &c) { make_paged(c, 16), c.q_layout = Layout::kDense, c.leftpad = 7, c.causal = true; });
}

void add_layouts(List &list) {
  const auto dense = [](Case &c) { c.q_layout = c.kv_layout = Layout::kDense, c.causal = true; };
  const std::vector<SeqLen> equal = {{60, 190}, {60, 190}, {60, 190}}, unequal = {{60, 190}, {7, 33}, {23, 120}};
  list.add("layout", "dense", equal, dense);
  list.add("layout", "dense-unequal", unequal, dense);
  list.add("layout", "dense-strided", equal, [&](Case &c) { dense(c), c.strided = true, c.heads_kv = 2; });
  list.add("layout", "dense-head-major", equal, [&](Case &c) { dense(c), c.cache_order = CacheOrder::kPageHeadToken; });
  list.add("layout", "dense-packed", equal, [&](Case &c) { dense(c), c.packed_kv = true; });
  list.add("layout", "dense-seqused", unequal, [&](Case &c) { dense(c), c.seqused_q = c.seqused_k = true; });
  list.add("layout", "dense-batch-index", unequal, [&](Case &c) { dense(c), c.kv_batch_index = true; });
  list.add("layout", "dense-leftpad", unequal, [&](Case &c) { dense(c), c.leftpad = 11; });
  list.add("layout", "dense-leftpad-all", {{4, 6}, {4, 30}}, [&](Case &c) { dense(c), c.leftpad = 6; });
  list.add("layout", "dense-leftpad-window", unequal, [&](Case &c) { dense(c), c.leftpad = 11, c.window_left = 17; });
  list.add("layout", "dense-prefix-token", unequal,
           [&](Case &c) { dense(c), c.prefix_mode = FLASHSPARK_PREFIX_PER_TOKEN, c.seqused_q = true; });
  list.add("layout", "dense-rel-strided", unequal, [&](Case &c) { dense(c), c.rel_extent = 64, c.strided = true; });
  list.add("layout", "dense-q-varlen-kv", {{40, 90}, {40, 41}}, [](Case &c) { c.q_layout = Layout::kDense; });
  list.add("layout", "varlen-q-dense-kv", {{40, 90}, {4, 90}}, [](Case &c) { c.kv_layout = Layout::kDense; });
  list.add("layout", "varlen-strided", kPrefill, [](Case &c) { c.strided = true, c.heads_kv = 2; });
  list.add("layout", "varlen-seqused", kPrefill, [](Case &c) { c.seqused_q = c.seqused_k = c.causal = true; });
  list.add("layout", "varlen-no-lse", kPrefill, [](Case &c) { c.lse = false; });
}

void add_decode(List &list) {
  for (const auto &[heads_q, heads_kv] :
       std::vector<std::pair<int64_t, int64_t>>{{4, 4}, {8, 2}, {16, 1}, {7, 1}, {9, 3}}) {
    const std::string name = std::to_string(heads_q) + "-" + std::to_string(heads_kv);
    list.add("decode", name, kDecode, [&, q = heads_q, kv = heads_kv](Case &c) {
      make_paged(c, 16), c.heads_q = q, c.heads_kv = kv, c.causal = true;
    });
  }
  for (const int32_t splits : {0, 1, 2, 7, 128}) {
    list.add("decode", "long-splits" + std::to_string(splits), {{1, 6000}, {1, 3}}, [&](Case &c) {
      make_paged(c, 16), c.heads_q = 4, c.heads_kv = 1, c.head_dim = 128, c.num_splits = splits;
    });
  }
  list.add("decode", "speculative", {{4, 700}, {4, 4}, {4, 129}},
           [](Case &c) { make_paged(c, 16), c.heads_q = 8, c.heads_kv = 2, c.causal = true; });
  list.add("decode", "speculative-splits", {{4, 2000}, {3, 65}},
           [](Case &c) { make_paged(c, 16), c.heads_q = 8, c.heads_kv = 1, c.causal = true, c.num_splits = 5; });
  // More splits than kept keys: some split has nothing to add.
  list.add("decode", "window-splits", {{1, 3000}, {1, 20}},
           [](Case &c) { c.heads_kv = 1, c.causal = true, c.window_left = 30, c.num_splits = 8; });
  list.add("decode", "many", std::vector<SeqLen>(32, {1, 80}), [](Case &c) { make_paged(c, 16), c.heads_kv = 1; });
}

void add_edges(List &list) {
  const std::vector<SeqLen> holes = {{0, 0}, {5, 0}, {0, 7}, {3, 9}, {0, 0}};
  list.add("edge", "no-sequences", {}, [](Case &c) { c.causal = true; });
  list.add("edge", "no-sequences+paged", {}, [](Case &c) { make_paged(c, 16); });
  list.add("edge", "no-sequences-dense", {}, [](Case &c) { c.q_layout = c.kv_layout = Layout::kDense; });
  list.add("edge", "no-queries", {{0, 30}, {0, 4}}, [](Case &) {});
  list.add("edge", "no-keys", {{4, 0}, {1, 0}}, [](Case &) {});
  list.add("edge", "no-keys-dense", {{4, 0}, {4, 0}}, [](Case &c) { c.q_layout = c.kv_layout = Layout::kDense; });
  list.add("edge", "no-keys-sinks", {{4, 0}}, [](Case &c) { c.sinks = true; });
  list.add("edge", "holes", holes, [](Case &c) { c.causal = true; });
  list.add("edge", "holes+paged+split", holes, [](Case &c) { make_paged(c, 16), c.heads_kv = 1, c.num_splits = 3; });
  list.add("edge", "one-key", {{1, 1}}, [](Case &c) { c.heads_q = c.heads_kv = 1; });
  // More queries than keys: with a causal mask the first rows see nothing.
  const std::vector<SeqLen> masked = {{40, 9}, {130, 70}};
  list.add("edge", "fully-masked", masked, [](Case &c) { c.causal = true; });
  list.add("edge", "fully-masked+paged+split", masked,
           [](Case &c) { c.causal = true, c.heads_kv = 2, c.num_splits = 2, make_paged(c, 16); });
  list.add("edge", "fully-masked-sinks", masked, [](Case &c) { c.causal = c.sinks = true; });
  list.add("edge", "fully-masked-fp8-out", masked,
           [](Case &c) { c.causal = true, c.output_scale = 0.02f, set_types(c, kBf16, kBf16, kFp8); });
  list.add("edge", "fully-masked-window", {{30, 10}}, [](Case &c) { c.window_left = c.window_right = 2; });
  list.add("edge", "window-of-one", kPrefill, [](Case &c) { c.window_left = c.window_right = 0; });
  list.add("edge", "window-beyond-keys", kPrefill, [](Case &c) { c.window_left = c.window_right = 100000; });
  // Chunks of one key, as long as the keys, and longer; rows before the first key are in chunks without keys.
  list.add("edge", "chunk-of-one", kPrefill, [](Case &c) { c.attention_chunk = 1; });
  list.add("edge", "chunk-beyond-keys", kPrefill, [](Case &c) { c.attention_chunk = 100000; });
  list.add("edge", "chunk-before-keys", masked, [](Case &c) { c.attention_chunk = 16; });
  list.add("edge", "chunk-leftpad", {{9, 120}, {9, 64}, {9, 9}}, [](Case &c) {
    make_paged(c, 16), c.q_layout = Layout::kDense, c.leftpad = 7, c.causal = true, c.attention_chunk = 32;
  });
  list.add("edge", "scale-zero", kPrefill, [](Case &c) { c.softmax_scale = 0; });
}

void add_peaked(List &list) {
  const std::vector<SeqLen> lens = {{150, 300}, {1, 700}, {64, 64}};
  const auto peaked = [](Case &c) { c.input = Input::kPeaked, c.causal = true, c.heads_kv = 2; };
  list.add("peaked", "bf16", lens, peaked);
  list.add("peaked", "f32", lens, [&](Case &c) { peaked(c), set_types(c, kF32, kF32, kF32); });
  list.add("peaked", "f16", lens, [&](Case &c) { peaked(c), set_types(c, kF16, kF16, kF16); });
  list.add("peaked", "fp8", lens, [&](Case &c) {
    peaked(c), set_types(c, kFp8, kFp8, kBf16), make_paged(c, 16);
    c.q_descale = c.k_descale = c.v_descale = Descale::kPerTensor;
  });
  list.add("peaked", "full", lens, [&](Case &c) { peaked(c), c.causal = false; });
  list.add("peaked", "window", lens, [&](Case &c) { peaked(c), c.window_left = 50; });
  list.add("peaked", "sinks-softcap", lens, [&](Case &c) { peaked(c), c.sinks = true, c.softcap = 50; });
  list.add("peaked", "f32+split", {{1, 2000}, {2, 300}},
           [&](Case &c) { peaked(c), set_types(c, kF32, kF32, kF32), make_paged(c, 16), c.num_splits = 6; });
}

void add_dropout(List &list) {
  const auto causal = [](Case &c, float p) { c.dropout = p, c.causal = true, c.heads_kv = 2; };
  list.add("dropout", "bf16", kPrefill, [&](Case &c) { causal(c, 0.1f); });
  list.add("dropout", "f32-half", kPrefill, [&](Case &c) { causal(c, 0.5f), set_types(c, kF32, kF32, kF32); });
  list.add("dropout", "f16-window-state", kPrefill, [&](Case &c) {
    causal(c, 0.25f), set_types(c, kF16, kF16, kF16);
    c.window_left = 43, c.head_dim = 128, c.dropout_state = true;
  });
  list.add("dropout", "full-most", {{70, 333}, {1, 41}},
           [](Case &c) { c.dropout = 0.9f, c.heads_q = 6, c.heads_kv = 2; });
  list.add("dropout", "gqa+paged", kPrefill, [&](Case &c) { causal(c, 0.17f), c.heads_q = 6, make_paged(c, 16); });
  list.add("dropout", "page20-leftpad", {{9, 120}, {9, 64}, {9, 9}},
           [&](Case &c) { causal(c, 0.3f), make_paged(c, 20), c.q_layout = Layout::kDense, c.leftpad = 7; });
  list.add("dropout", "dense-leftpad-chunk", {{60, 190}, {7, 33}, {23, 120}}, [&](Case &c) {
    causal(c, 0.3f), c.q_layout = c.kv_layout = Layout::kDense, c.leftpad = 11, c.attention_chunk = 29;
  });
  list.add("dropout", "decode+split", kDecode,
           [](Case &c) { c.dropout = 0.2f, c.heads_kv = 1, c.num_splits = 3, c.dropout_state = true; });
  list.add("dropout", "speculative+paged+split", {{4, 2000}, {3, 65}},
           [&](Case &c) { causal(c, 0.4f), make_paged(c, 16), c.heads_q = 8, c.num_splits = 5; });
  list.add("dropout", "fp8kv", kDecode, [](Case &c) {
    c.dropout = 0.35f, c.heads_kv = 1, make_paged(c, 16);
    set_types(c, kBf16, kFp8, kBf16), c.k_descale = c.v_descale = Descale::kFull;
  });
  list.add("dropout", "fp8-out-f16", kPrefill, [&](Case &c) {
    causal(c, 0.1f), set_types(c, kFp8, kFp8, kF16);
    c.q_descale = c.k_descale = c.v_descale = Descale::kPerHead;
  });
  list.add("dropout", "d256-sinks-prefix", {{50, 130}, {1, 77}}, [&](Case &c) {
    causal(c, 0.6f), c.head_dim = 256, c.sinks = true, c.prefix_mode = FLASHSPARK_PREFIX_PER_SEQ;
  });
  list.add("dropout", "softcap-bias", kPrefill,
           [&](Case &c) { causal(c, 0.1f), c.softcap = 5, c.rel_extent = 32, c.alibi = true; });
  list.add("dropout", "peaked", {{150, 300}, {1, 700}}, [&](Case &c) { causal(c, 0.1f), c.input = Input::kPeaked; });
  // Less than a draw can tell from none: nothing is dropped, all is scaled.
  list.add("dropout", "hardly-any", {{37, 230}}, [&](Case &c) { causal(c, 1e-6f); });
}

}  // namespace

std::vector<Case> feature_matrix() {
  List list;
  add_masks(list);
  add_types(list);
  add_head_dims(list);
  add_pages(list);
  add_layouts(list);
  add_decode(list);
  add_edges(list);
  add_peaked(list);
  add_dropout(list);
  return std::move(list.cases);
}

}  // namespace flashspark::cases
