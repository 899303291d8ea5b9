#include <algorithm>
#include <array>
#include <cstdlib>
#include <vector>

#include "check.hpp"
#include "dtype.hpp"
#include "error.hpp"
#include "mod.hpp"
#include "validate.hpp"

namespace flashspark {
namespace {

// What forward attention takes, but has no gradient here.
void check_taken(const Params &p) {
  constexpr const char *kCache = "must be NULL: there are no gradients through a cache";
  check::absent("page_table", p.page_table, kCache);
  check::absent("kv_batch_index", p.kv_batch_index, kCache);
  check::absent("leftpad_k", p.leftpad_k, kCache);
  check::absent("output_scale", p.output_scale, "must be NULL: there are no gradients of scaled results");
  check::dtype("q.dtype", p.q.dtype, false);
  check::dtype("k.dtype", p.k.dtype, false);
  check::same_dtype("out.dtype", p.out.dtype, "q", p.q.dtype);
}

// A tensor of up to eight dimensions as the stretch of elements from its first to its last one.
struct Stretch {
  int64_t first, count;
};
Stretch stretch_of(const flashspark_captured_tensor &shape, const int64_t *strides) {
  Stretch s{0, 1};
  for (int32_t d = 0; d < shape.rank; ++d) {
    if (shape.shape[d] == 1) continue;
    const int64_t reach = strides[d] * (shape.shape[d] - 1);
    if (reach < 0) s.first += reach;
    s.count += std::abs(reach);
  }
  return s;
}

std::string dtensor(int32_t n, const char *field) {
  return check::at("dtensors", n) + field;
}

void check_captured_gradient(const flashspark_captured_tensor &tensor, const flashspark_captured_gradient &gradient,
                             int32_t n) {
  const graph::DataType dtype = captured_type(tensor.dtype);
  if (!graph::is_floating(dtype)) {
    fail(dtensor(n, ".data"), "given",
         std::string("must be NULL: a tensor of ") + graph::name(dtype) + " has no gradient");
  }
  if (reinterpret_cast<uintptr_t>(gradient.data) % sizeof(float) != 0)
    fail(dtensor(n, ".data"), "misaligned", "must be aligned to 4 bytes");
  std::vector<int32_t> order;  // of dimensions, by strides
  for (int32_t d = 0; d < tensor.rank; ++d) {
    if (tensor.shape[d] == 1) continue;               // never multiplied by anything but 0
    constexpr int64_t kMaxOffset = int64_t{1} << 55;  // of one dimension; eight of them are below 2^58
    if (std::abs(std::clamp(gradient.strides[d], -kMaxOffset, kMaxOffset)) > kMaxOffset / (tensor.shape[d] - 1))
      fail(dtensor(n, ".strides") + "[" + std::to_string(d) + "]", gradient.strides[d], "reaches beyond 2^55 elements");
    order.push_back(d);
  }
  const auto step = [&](int32_t d) { return std::abs(gradient.strides[d]); };
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return step(a) < step(b); });
  int64_t inner = 1;  // elements that the dimensions so far span
  for (const int32_t d : order) {
    if (step(d) < inner) {
      fail(dtensor(n, ".strides") + "[" + std::to_string(d) + "]", gradient.strides[d],
           "elements overlap: must be at least " + std::to_string(inner));
    }
    inner += (tensor.shape[d] - 1) * step(d);
  }
}

void check_captured_gradients(const BackwardParams &p) {
  const flashspark_function &function = p.forward.score_mod;
  if (function.mod == nullptr) return check::absent("dtensors", p.dtensors, "must be NULL without score_mod");
  try {
    function.mod->derivative();
  } catch (const Error &error) {
    throw Error(error.status(), std::string("score_mod: ") + error.what());
  }
  for (int32_t n = 0; p.dtensors != nullptr && n < function.num_tensors; ++n) {
    if (p.dtensors[n].data != nullptr) check_captured_gradient(function.tensors[n], p.dtensors[n], n);
  }
}

void check_float_gradient(const char *name, const float *gradient, const char *of, const void *input) {
  if (gradient == nullptr) return;
  if (input == nullptr) fail(name, "given", std::string("must be NULL without ") + of);
  if (reinterpret_cast<uintptr_t>(gradient) % sizeof(float) != 0)
    fail(name, "misaligned", "must be aligned to 4 bytes");
}

// dout, dq, dk, dv, dlse and drel_logits: what has the layout of a tensor of the problem.
void check_tensors(const BackwardParams &p) {
  const Params &f = p.forward;
  const Extents e = extents_of(f);
  if (e.q_batch > 0 && e.q_tokens > 0)
    check::present("lse", f.lse, "must be what the forward call gave: probabilities come from it");
  check::same_dtype("dout.dtype", p.dout.dtype, "q", f.q.dtype);
  check::tensor("dout", p.dout, e.q_batch, e.q_tokens, f.num_heads_q);
  if (p.dlse != nullptr) check::tensor("dlse", as_lse_tensor(f, p.dlse), e.q_batch, e.q_tokens, f.num_heads_q);
  const check::View gradients[] = {{"dq", p.dq, e.q_batch, e.q_tokens, f.num_heads_q, f.head_dim},
                                   {"dk", p.dk, e.kv_batch, e.kv_tokens, f.num_heads_kv, f.head_dim},
                                   {"dv", p.dv, e.kv_batch, e.kv_tokens, f.num_heads_kv, f.head_dim_v}};
  for (const check::View &v : gradients) {
    if (v.tensor.data == nullptr) continue;
    check::same_dtype((std::string(v.name) + ".dtype").c_str(), v.tensor.dtype, "q", f.q.dtype);
    check::tensor(v.name, v.tensor, v.batch, v.tokens, v.heads);
    check::distinct(v.name, v.tensor, v.batch, v.tokens, v.heads, v.width);
  }
  if (p.drel_logits == nullptr) return;
  const flashspark_tensor drel = as_rel_tensor(f, p.drel_logits, FLASHSPARK_FLOAT32);
  check::tensor("drel_logits", drel, 1, rel_tokens(f), f.num_heads_q);
  check::distinct("drel_logits", drel, 1, rel_tokens(f), f.num_heads_q, f.rel_extent);
}

// Everything that is read or written, so that each gradient can be held against all else.
class Memory {
 public:
  explicit Memory(const BackwardParams &p) {
    const Params &f = p.forward;
    const Extents e = extents_of(f);
    const int64_t hq = f.num_heads_q, hkv = f.num_heads_kv;
    // Without slopes their stride may be anything.
    const bool sets = f.alibi_slopes != nullptr && f.alibi_batch_stride != 0;
    const int64_t slopes = sets ? (f.num_seqs - 1) * f.alibi_batch_stride + hq : hq;
    add("dq", p.dq, e.q_batch, e.q_tokens, hq, f.head_dim);
    add("dk", p.dk, e.kv_batch, e.kv_tokens, hkv, f.head_dim);
    add("dv", p.dv, e.kv_batch, e.kv_tokens, hkv, f.head_dim_v);
    add("drel_logits", as_rel_tensor(f, p.drel_logits, FLASHSPARK_FLOAT32), 1, rel_tokens(f), hq, f.rel_extent);
    add_row("dsinks", p.dsinks, FLASHSPARK_FLOAT32, hq);
    add_row("dalibi_slopes", p.dalibi_slopes, FLASHSPARK_FLOAT32, f.alibi_batch_stride == 0 ? hq : f.num_seqs * hq);
    for (int32_t n = 0; p.dtensors != nullptr && n < f.score_mod.num_tensors; ++n)
      add_captured("dtensors", f.score_mod.tensors[n], p.dtensors[n].data, sizeof(float), p.dtensors[n].strides);
    gradients_ = count_;
    add("q", f.q, e.q_batch, e.q_tokens, hq, f.head_dim);
    add("k", f.k, e.kv_batch, e.kv_tokens, hkv, f.head_dim);
    add("v", f.v, e.kv_batch, e.kv_tokens, hkv, f.head_dim_v);
    add("out", f.out, e.q_batch, e.q_tokens, hq, f.head_dim_v);
    add("dout", p.dout, e.q_batch, e.q_tokens, hq, f.head_dim_v);
    add("lse", as_lse_tensor(f, f.lse), e.q_batch, e.q_tokens, hq, 1);
    add("dlse", as_lse_tensor(f, p.dlse), e.q_batch, e.q_tokens, hq, 1);
    add("rel_logits", as_rel_tensor(f, f.rel_logits, f.rel_dtype), 1, rel_tokens(f), hq, f.rel_extent);
    add_row("sinks", f.sinks, f.sinks_dtype, hq);
    add_row("alibi_slopes", f.alibi_slopes, FLASHSPARK_FLOAT32, slopes);
    add_captures("a tensor that score_mod captures", f.score_mod);
    add_captures("a tensor that mask_mod captures", f.mask_mod);
  }

  void check() const {
    for (int32_t n = 0; n < gradients_; ++n) {
      for (int32_t m = n + 1; m < count_; ++m)
        check::apart(view(n), view(m), "gradients must have memory of their own");
    }
  }

 private:
  struct Block {
    const char *name;
    flashspark_tensor tensor;
    int64_t batch, tokens, heads, width;
  };

  check::View view(int32_t n) const {
    const Block &b = blocks_[static_cast<size_t>(n)];
    return {b.name, b.tensor, b.batch, b.tokens, b.heads, b.width};
  }
  void add(const char *name, const flashspark_tensor &t, int64_t batch, int64_t tokens, int64_t heads, int64_t width) {
    if (t.data != nullptr) blocks_[static_cast<size_t>(count_++)] = {name, t, batch, tokens, heads, width};
  }
  void add_row(const char *name, const void *data, int32_t dtype, int64_t width) {
    if (width > 0) add(name, {const_cast<void *>(data), 0, 0, 0, dtype, 0}, 1, 1, 1, width);
  }
  // Its elements, however they lie, as one row of bytes; `size`: of an element.
  void add_captured(const char *name, const flashspark_captured_tensor &shape, const void *data, int64_t size,
                    const int64_t *strides) {
    if (data == nullptr) return;
    const Stretch s = stretch_of(shape, strides);
    add_row(name, static_cast<const char *>(data) + s.first * size, FLASHSPARK_FLOAT8_E4M3, s.count * size);
  }
  void add_captures(const char *name, const flashspark_function &function) {
    for (int32_t n = 0; function.mod != nullptr && n < function.num_tensors; ++n) {
      const flashspark_captured_tensor &t = function.tensors[n];
      add_captured(name, t, t.data, graph::size_of(captured_type(t.dtype)), t.strides);
    }
  }

  std::array<Block, 16 + 3 * FLASHSPARK_MAX_CAPTURED_TENSORS> blocks_;
  int32_t count_ = 0, gradients_ = 0;  // gradients come first
};

}  // namespace

void check_metadata(const BackwardParams &p) {
  const Params &f = p.forward;
  check_metadata(f);
  for (int64_t b = 0; f.cu_seqlens_k != nullptr && f.seqused_k != nullptr && b < f.num_seqs; ++b) {
    const int64_t keys = int64_t{f.cu_seqlens_k[b + 1]} - f.cu_seqlens_k[b];
    if (sequence(f, b).seqlen_q > 0 && f.seqused_k[b] > keys) {
      fail(check::at("seqused_k", b), int64_t{f.seqused_k[b]},
           "must be at most the sequence's keys, " + std::to_string(keys) + ": those behind them are another's");
    }
  }
}

void validate(const BackwardParams &p) {
  check::version(p.struct_size, sizeof(BackwardParams), p.abi_version, "flashspark_attention_backward_params");
  validate(p.forward);
  const Params &f = p.forward;
  check_taken(f);
  const Extents e = extents_of(f);
  if (e.q_batch > 0 && e.q_tokens > 0 && f.out.data == f.q.data)
    fail("out.data", "q.data", "must not be q: its gradient needs q as it was");
  check_float_gradient("dsinks", p.dsinks, "sinks", f.sinks);
  check_float_gradient("drel_logits", p.drel_logits, "rel_logits", f.rel_logits);
  check_float_gradient("dalibi_slopes", p.dalibi_slopes, "alibi_slopes", f.alibi_slopes);
  check_tensors(p);
  check_captured_gradients(p);
  Memory(p).check();
  if (f.device == FLASHSPARK_CPU) check_metadata(p);
}

}  // namespace flashspark
