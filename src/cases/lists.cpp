// The guide checks, the benchmark, and the names of what a Case uses.
#include <functional>
#include <iterator>

#include "cases/cases.hpp"

namespace flashspark::cases {
namespace {

const std::vector<SeqLen> kMixed = {{1, 1328}, {5, 18}, {129, 463}};

// The axes of decode_cases().
struct Heads {
  int64_t q, kv, dim;
  bool main;  // one of those that every grid has
};
constexpr Heads kHeads[] = {{64, 8, 128, true},  {16, 2, 128, true}, {32, 2, 256, true}, {32, 8, 128, false},
                            {16, 1, 256, false}, {16, 8, 64, false}, {8, 1, 512, false}};
constexpr int64_t kBatches[] = {1, 2, 4, 8, 16, 32, 64, 128}, kKeys[] = {512, 2048, 8192, 32768, 131072};
constexpr int64_t kRows[] = {1, 2, 4, 8, 16}, kPages[] = {16, 64}, kShort = 512;
constexpr bool kChoices[] = {false, true};

// `changes`: how many of rows, page size, lengths and type of the cache are not the usual ones.
bool is_in(DecodeGrid grid, const Heads &heads, int64_t batch, int64_t keys, bool skewed, int changes) {
  if (grid == DecodeGrid::kFull) return true;
  const bool cpu = grid == DecodeGrid::kCpu;
  if (changes > 1 || (!heads.main && (cpu || changes == 1))) return false;
  if (cpu) return keys <= 2048 && (batch == 4 || batch == 1) && (changes == 0 || batch * keys == 4 * 2048);
  if (changes == 0) return batch * keys <= 64 * 32768 && (batch == 1 || batch == 4 || batch == 16 || batch == 64);
  return skewed ? keys == 32768 && (batch == 16 || batch == 64) : keys == 8192 && (batch == 1 || batch == 16);
}

}  // namespace

std::vector<Case> three_guide_checks() {
  Case dense;
  dense.name = "guide/dense-causal";
  dense.group = "guide";
  dense.lens = {{1024, 1024}};
  dense.heads_q = dense.heads_kv = 16;
  dense.head_dim = 128;
  dense.q_layout = dense.kv_layout = Layout::kDense;
  dense.causal = true;

  Case varlen = dense;
  varlen.name = "guide/varlen-gqa";
  varlen.lens = kMixed;
  varlen.heads_kv = 8;
  varlen.q_layout = varlen.kv_layout = Layout::kVarlen;

  Case paged = varlen;
  paged.name = "guide/paged-16-shuffled";
  paged.kv_layout = Layout::kPaged;
  paged.page_size = 16;
  return {dense, varlen, paged};
}

std::vector<Case> bench_cases() {
  std::vector<Case> cases;
  Case base;
  base.group = "bench";
  base.heads_q = 16;
  base.heads_kv = 8;
  base.head_dim = 128;
  base.causal = true;
  base.lse = false;
  const auto add = [&](const std::string &name, const Case &c) {
    cases.push_back(c);
    cases.back().name = name;
  };
  const auto typed = [](Case c, int32_t q, int32_t kv) {
    c.q_dtype = c.out_dtype = q;
    c.kv_dtype = kv;
    return c;
  };

  Case prefill = base;
  prefill.q_layout = prefill.kv_layout = Layout::kDense;
  for (const int64_t length : {128, 1024, 4096}) {
    prefill.lens = {{length, length}};
    const std::string name = "prefill/S" + std::to_string(length);
    add(name + "-bf16", prefill);
    add(name + "-f32", typed(prefill, FLASHSPARK_FLOAT32, FLASHSPARK_FLOAT32));
  }
  Case wide = prefill;
  wide.lens = {{1024, 1024}};
  wide.head_dim = 256;
  add("prefill/S1024-d256-bf16", wide);
  Case window = prefill;
  window.window_left = 511;
  add("prefill/S4096-window512-bf16", window);
  Case mixed = base;
  mixed.lens = kMixed;
  mixed.kv_layout = Layout::kPaged;
  add("mixed/paged16-bf16", mixed);

  Case decode = base;
  decode.heads_kv = 2;
  decode.lens.assign(8, {1, 4096});
  decode.q_layout = decode.kv_layout = Layout::kDense;
  add("decode/B8-kv4096-bf16", decode);
  add("decode/B8-kv4096-f32", typed(decode, FLASHSPARK_FLOAT32, FLASHSPARK_FLOAT32));
  decode.q_layout = Layout::kVarlen;
  decode.kv_layout = Layout::kPaged;
  add("decode/B8-kv4096-paged16-bf16", decode);
  Case fp8 = typed(decode, FLASHSPARK_BFLOAT16, FLASHSPARK_FLOAT8_E4M3);
  fp8.k_descale = fp8.v_descale = Descale::kPerTensor;
  add("decode/B8-kv4096-paged16-fp8kv", fp8);
  decode.lens = {{1, 16384}};
  add("decode/B1-kv16384-paged16-bf16", decode);
  return cases;
}

std::vector<Case> decode_cases(DecodeGrid grid) {
  std::vector<Case> cases;
  for (size_t n = 0;; ++n) {
    size_t rest = n;
    const auto next = [&](const auto &axis) {
      const auto value = axis[rest % std::size(axis)];
      rest /= std::size(axis);
      return value;
    };
    const int64_t keys = next(kKeys), batch = next(kBatches);
    const Heads heads = next(kHeads);
    const int64_t rows = next(kRows), page = next(kPages);
    const bool skewed = next(kChoices), fp8 = next(kChoices);
    if (rest > 0) return cases;
    if (skewed && (batch == 1 || keys == kShort)) continue;  // not so
    if (!is_in(grid, heads, batch, keys, skewed, (rows != 1) + (page != 16) + skewed + fp8)) continue;
    Case c;
    c.group = "decode";
    c.lens.assign(batch, {rows, skewed ? kShort : keys});
    c.lens[0].k = keys;
    c.heads_q = heads.q, c.heads_kv = heads.kv, c.head_dim = heads.dim;
    c.kv_layout = Layout::kPaged;
    c.page_size = page;
    c.causal = true;
    c.lse = false;
    if (fp8) c.kv_dtype = FLASHSPARK_FLOAT8_E4M3, c.k_descale = c.v_descale = Descale::kPerTensor;
    const auto text = [](int64_t number) { return std::to_string(number); };
    c.name = text(heads.q) + "/" + text(heads.kv) + "-D" + text(heads.dim) + "/B" + text(batch) + "-kv" + text(keys) +
             (skewed ? "+" + text(kShort) : "") + "-q" + text(rows) + "-page" + text(page) + (fp8 ? "-fp8kv" : "-bf16");
    cases.push_back(std::move(c));
  }
}

namespace {

using When = const std::function<void(bool used, const char *name)> &;

void type_features(const Case &c, When when) {
  const auto typed = [&](int32_t q, int32_t kv, int32_t out) {
    return c.q_dtype == q && c.kv_dtype == kv && c.out_dtype == out;
  };
  constexpr int32_t f32 = FLASHSPARK_FLOAT32, f16 = FLASHSPARK_FLOAT16, bf16 = FLASHSPARK_BFLOAT16,
                    fp8 = FLASHSPARK_FLOAT8_E4M3;
  when(typed(f32, f32, f32), "f32");
  when(typed(f16, f16, f16), "f16");
  when(typed(bf16, bf16, bf16), "bf16");
  when(c.kv_dtype == fp8 && c.q_dtype != fp8, "fp8 kv");
  when(c.kv_dtype == fp8 && c.q_dtype == fp8, "fp8 q and kv");
  when(c.out_dtype == fp8, "fp8 out");
  when(c.out_dtype == f32 && c.q_dtype != f32, "f32 out");
}

void layout_features(const Case &c, When when) {
  when(c.q_layout == Layout::kDense, "dense q");
  when(c.q_layout == Layout::kVarlen, "varlen q");
  when(c.kv_layout == Layout::kDense, "dense kv");
  when(c.kv_layout == Layout::kVarlen, "varlen kv");
  when(c.kv_layout == Layout::kPaged, "paged kv");
  when(c.kv_layout == Layout::kPaged && c.page_size != 16, "page size other than 16");
  when(c.kv_layout != Layout::kVarlen && c.cache_order == CacheOrder::kPageHeadToken, "head-major cache");
  when(c.packed_kv, "packed k and v");
  when(c.strided, "strided");
  when(c.seqused_q, "seqused_q");
  when(c.seqused_k, "seqused_k");
  when(c.seqused_k && c.kv_layout == Layout::kVarlen, "cu_seqlens_k with seqused_k");
  when(c.kv_layout == Layout::kPaged && c.page_size % 16 != 0, "page size of any number");
  when(c.whole_table, "page_table without seqused_k");
  when(c.kv_batch_index && c.kv_layout == Layout::kDense, "kv_batch_index");
  when(c.kv_batch_index && c.kv_layout == Layout::kPaged, "kv_batch_index with page_table");
  when(c.leftpad > 0, "leftpad_k");
  when(c.heads_q != c.heads_kv, "gqa");
  when(c.heads_q != c.heads_kv && c.heads_kv == 1, "mqa");
  when(c.head_dim > 256, "head_dim > 256");
  when(c.head_dim % 16 != 0, "head_dim % 16 = 8");
  when(c.head_dim_v != 0 && c.head_dim_v != c.head_dim, "head_dim_v other than head_dim");
}

void score_features(const Case &c, When when) {
  constexpr int32_t fp8 = FLASHSPARK_FLOAT8_E4M3;
  when(c.causal && !c.causal_per_seq, "causal");
  when(c.causal_per_seq, "causal_per_seq");
  when(c.window_left >= 0, "window_left");
  when(c.window_right >= 0, "window_right");
  when(c.attention_chunk > 0, "attention_chunk");
  when(c.softcap > 0, "softcap");
  when(c.sinks, "sinks");
  when(c.prefix_mode == FLASHSPARK_PREFIX_PER_SEQ, "prefix ranges per sequence");
  when(c.prefix_mode == FLASHSPARK_PREFIX_PER_TOKEN, "prefix ranges per token");
  when(c.prefix_clamp, "prefix_clamp_window");
  when(c.rswa_window > 0, "rswa");
  when(c.rel_extent > 0, "rel_logits");
  when(c.alibi, "alibi");
  when(c.alibi_per_batch, "alibi per sequence");
  const auto any = [&](Descale kind) { return c.q_descale == kind || c.k_descale == kind || c.v_descale == kind; };
  when(c.kv_dtype == fp8 && any(Descale::kPerTensor), "descale per tensor");
  when(c.kv_dtype == fp8 && any(Descale::kPerHead), "descale per head");
  when(c.kv_dtype == fp8 && any(Descale::kFull), "descale per sequence and head");
  when(c.kv_dtype != fp8 && any(Descale::kPerTensor), "descale ignored without fp8");
}

void length_features(const Case &c, When when) {
  bool empty = c.lens.empty(), decode = !c.lens.empty(), masked = false;
  for (const SeqLen &len : c.lens) {
    empty |= len.q == 0 || len.k == 0;
    decode &= len.q == 1;
    masked |= len.q > len.k && c.causal;
  }
  when(empty, "empty sequences");
  when(masked, "fully masked rows");
  when(decode, "decode");
}

}  // namespace

std::vector<std::string> features(const Case &c) {
  std::vector<std::string> names;
  const auto when = [&](bool used, const char *name) {
    if (used) names.push_back(name);
  };
  type_features(c, when);
  layout_features(c, when);
  score_features(c, when);
  when(c.output_scale > 0, "output_scale");
  when(c.dropout > 0, "dropout");
  when(c.dropout > 0 && c.dropout_state, "dropout_state");
  when(c.num_splits > 1, "num_splits");
  when(c.lse, "lse");
  when(c.input == Input::kPeaked, "peaked scores");
  length_features(c, when);
  for (std::string &name : names) {
    if (c.backward) name.insert(0, "backward, ");
  }
  return names;
}

}  // namespace flashspark::cases
