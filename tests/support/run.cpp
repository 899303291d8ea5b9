// Lays a Problem out in memory, calls the library, and reads the rows back. Buffers have exactly the size of the
// layout, so that AddressSanitizer sees any access beyond, and hold NaN or garbage wherever there is no element.
#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>

#include "dtype.hpp"
#include "support/model.hpp"

namespace flashspark::test {
namespace {

constexpr unsigned char kUntouched = 0xa5;  // content of out and lse before the call

// A buffer viewed as [batch][token][head][width], with strides in elements.
struct Grid {
  int64_t origin = 0, batch_stride = 0, token_stride = 0, head_stride = 0, size = 0;

  int64_t at(int64_t b, int64_t t, int64_t h) const {
    return origin + b * batch_stride + t * token_stride + h * head_stride;
  }
};

Grid make_grid(int64_t batches, int64_t tokens, int64_t heads, int64_t width, int64_t pad, bool head_major) {
  Grid g;
  if (head_major) {
    g.token_stride = width + pad;
    g.head_stride = tokens * g.token_stride;
    g.batch_stride = heads * g.head_stride;
  } else {
    g.head_stride = width;
    g.token_stride = heads * width + pad;
    g.batch_stride = tokens * g.token_stride;
  }
  g.size = batches * g.batch_stride;
  return g;
}

void turn_backwards(Grid &g, int64_t tokens) {
  g.origin += std::max<int64_t>(tokens - 1, 0) * g.token_stride;
  g.token_stride = -g.token_stride;
}

struct Buffer {
  int32_t dtype = FLASHSPARK_FLOAT32;
  std::vector<unsigned char> bytes;

  Buffer() = default;
  Buffer(int32_t type, int64_t size, unsigned char fill)
      : dtype(type), bytes(static_cast<size_t>(size) * dtype_size(type), fill) {}

  void put(int64_t at, const float *values, int64_t count) {
    for (int64_t c = 0; c < count; ++c) store_from_float(bytes.data(), at + c, dtype, values[c]);
  }
  flashspark_tensor tensor(const Grid &g) {
    flashspark_tensor t{};
    t.data = bytes.data() + g.origin * static_cast<int64_t>(dtype_size(dtype));
    t.batch_stride = g.batch_stride;
    t.token_stride = g.token_stride;
    t.head_stride = g.head_stride;
    t.dtype = dtype;
    return t;
  }
};

// Reads rows out of a result buffer and marks their elements; all others must be unchanged.
struct Reader {
  const Buffer &buffer;
  std::vector<bool> owned;

  explicit Reader(const Buffer &b) : buffer(b), owned(b.bytes.size() / dtype_size(b.dtype), false) {}
  float take(int64_t at) {
    owned[at] = true;
    return load_as_float(buffer.bytes.data(), at, buffer.dtype);
  }
  bool trespassed(bool nothing_owned) const {
    const size_t width = dtype_size(buffer.dtype);
    for (size_t n = 0; n < buffer.bytes.size(); ++n) {
      if ((nothing_owned || !owned[n / width]) && buffer.bytes[n] != kUntouched) return true;
    }
    return false;
  }
};

std::vector<int32_t> offsets(const std::vector<int64_t> &lengths) {
  std::vector<int32_t> sums{0};
  for (int64_t n : lengths) sums.push_back(sums.back() + static_cast<int32_t>(n));
  return sums;
}

int64_t largest(const std::vector<int64_t> &values) {
  return values.empty() ? 0 : *std::max_element(values.begin(), values.end());
}

// Owns everything the params point to.
struct Call {
  const Problem &problem;
  const Layout &layout;
  std::mt19937_64 rng;
  int64_t batch;
  flashspark_attention_params params;
  Grid q_grid, k_grid, v_grid, out_grid, lse_grid;
  Buffer q, k, v, out, lse, sinks, rel;
  std::vector<int64_t> q_batch, q_token;  // position of row 0 of each sequence
  std::vector<int32_t> cu_q, cu_k, used_q, used_k, leftpad, kv_index, pages, causal, ranges, prefix_lens;
  std::vector<float> alibi, q_scale, k_scale, v_scale;
  std::vector<uint64_t> dropout_state;

  Call(const Problem &p, const Layout &l)
      : problem(p), layout(l), rng(l.seed), batch(static_cast<int64_t>(p.seqs.size())) {
    flashspark_attention_params_init(&params);
    params.implementation = l.implementation;
    params.num_threads = l.num_threads;
    params.num_splits = l.num_splits;
    params.deterministic = l.deterministic;
    params.num_seqs = batch;
    params.num_heads_q = p.hq;
    params.num_heads_kv = p.hkv;
    params.head_dim = p.d;
    params.head_dim_v = p.dv;
    lay_out_queries();
    lay_out_keys();
    set_scores();
    set_mask();
  }

  void lay_out_queries() {
    const Problem &p = problem;
    std::vector<int64_t> lengths, allocated;
    for (const Sequence &s : p.seqs) lengths.push_back(s.tq);
    for (int64_t n : lengths) {
      allocated.push_back(layout.q == Kind::kDense ? largest(lengths) + layout.slack : n + layout.slack);
    }
    const bool partial = lengths != allocated;
    if (partial) used_q.assign(lengths.begin(), lengths.end());
    params.seqused_q = partial ? used_q.data() : nullptr;
    params.max_seqlen_q = largest(allocated);
    int64_t grid_batch = batch, grid_tokens = params.max_seqlen_q;
    if (layout.q == Kind::kVarlen) {
      cu_q = offsets(allocated);
      params.cu_seqlens_q = cu_q.data();
      params.total_q = cu_q.back();
      grid_batch = 1;
      grid_tokens = params.total_q;
    }
    const bool heads_first = layout.head_major;
    q_grid = make_grid(grid_batch, grid_tokens, p.hq, p.d, layout.row_pad, heads_first);
    out_grid = make_grid(grid_batch, grid_tokens, p.hq, p.dv, layout.row_pad, heads_first);
    lse_grid = make_grid(grid_batch, grid_tokens, p.hq, 1, 0, true);
    q = Buffer(p.q_dtype, q_grid.size, layout.poison);
    out = Buffer(p.out_dtype, out_grid.size, kUntouched);
    lse = Buffer(FLASHSPARK_FLOAT32, lse_grid.size, kUntouched);
    for (int64_t b = 0; b < batch; ++b) {
      q_batch.push_back(layout.q == Kind::kVarlen ? 0 : b);
      q_token.push_back(layout.q == Kind::kVarlen ? cu_q[b] : 0);
      const Sequence &s = p.seqs[b];
      for (int64_t i = 0; i < s.tq; ++i) {
        for (int64_t h = 0; h < p.hq; ++h) {
          q.put(q_grid.at(q_batch[b], q_token[b] + i, h), &s.q[(i * p.hq + h) * p.d], p.d);
        }
      }
    }
    params.q = q.tensor(q_grid);
    params.out = out.tensor(out_grid);
    if (layout.want_lse) {
      params.lse = reinterpret_cast<float *>(lse.bytes.data());
      params.lse_batch_stride = lse_grid.batch_stride;
      params.lse_head_stride = lse_grid.head_stride;
      params.lse_token_stride = lse_grid.token_stride;
    }
  }

  void lay_out_keys() {
    const Problem &p = problem;
    const int64_t pad = layout.kv == Kind::kVarlen ? 0 : layout.leftpad;
    std::vector<int64_t> lengths, allocated;
    for (const Sequence &s : p.seqs) lengths.push_back(s.tk + pad);
    for (int64_t n : lengths)
      allocated.push_back(layout.kv == Kind::kVarlen ? n + layout.slack : largest(lengths) + layout.slack);
    used_k.assign(lengths.begin(), lengths.end());
    const bool equal = std::adjacent_find(lengths.begin(), lengths.end(), std::not_equal_to<>()) == lengths.end();
    if (lengths != allocated || (layout.kv == Kind::kPaged && !equal)) params.seqused_k = used_k.data();
    if (pad > 0) leftpad.assign(batch, static_cast<int32_t>(pad));
    params.leftpad_k = pad > 0 ? leftpad.data() : nullptr;
    params.max_seqlen_k = largest(allocated);

    int64_t grid_batch = batch, grid_tokens = params.max_seqlen_k;
    if (layout.kv == Kind::kVarlen) {
      cu_k = offsets(allocated);
      params.cu_seqlens_k = cu_k.data();
      params.total_k = cu_k.back();
      grid_batch = 1;
      grid_tokens = params.total_k;
    } else if (layout.kv == Kind::kPaged) {
      lay_out_pages(lengths);
      grid_batch = params.num_pages;
      grid_tokens = params.page_size;
    } else {
      grid_batch = index_cache_rows();
    }
    if (layout.packed_kv) {
      k_grid = make_grid(grid_batch, grid_tokens, p.hkv, p.d + p.dv, layout.row_pad, layout.head_major);
      v_grid = k_grid;
      v_grid.origin = p.d;
    } else {
      k_grid = make_grid(grid_batch, grid_tokens, p.hkv, p.d, layout.row_pad, layout.head_major);
      v_grid = make_grid(grid_batch, grid_tokens, p.hkv, p.dv, 2 * layout.row_pad, layout.head_major);
    }
    if (layout.backwards) {
      turn_backwards(k_grid, grid_tokens);
      turn_backwards(v_grid, grid_tokens);
    }
    k = Buffer(p.kv_dtype, k_grid.size, layout.poison);
    if (!layout.packed_kv) v = Buffer(p.kv_dtype, v_grid.size, layout.poison);
    Buffer &v_home = layout.packed_kv ? k : v;
    for (int64_t b = 0; b < batch; ++b) {
      const Sequence &s = p.seqs[b];
      for (int64_t j = 0; j < s.tk; ++j) {
        const auto [gb, gt] = key_place(b, j + pad);
        for (int64_t h = 0; h < p.hkv; ++h) {
          k.put(k_grid.at(gb, gt, h), &s.k[(j * p.hkv + h) * p.d], p.d);
          v_home.put(v_grid.at(gb, gt, h), &s.v[(j * p.hkv + h) * p.dv], p.dv);
        }
      }
    }
    params.k = k.tensor(k_grid);
    params.v = v_home.tensor(v_grid);
  }

  // Rows of the dense cache or of the page table; kv_index maps each sequence to its row.
  int64_t index_cache_rows() {
    const int64_t rows = layout.kv_batch_index ? 2 * batch + 1 : batch;
    kv_index.resize(rows);
    std::iota(kv_index.begin(), kv_index.end(), 0);
    if (!layout.kv_batch_index) return rows;
    std::shuffle(kv_index.begin(), kv_index.end(), rng);
    kv_index.resize(batch);
    params.num_kv_seqs = rows;
    params.kv_batch_index = kv_index.data();
    return rows;
  }

  std::array<int64_t, 2> key_place(int64_t b, int64_t row) const {
    switch (layout.kv) {
      case Kind::kVarlen:
        return {0, cu_k[b] + row};
      case Kind::kDense:
        return {kv_index[b], row};
      default:
        return {pages[kv_index[b] * params.page_table_stride + row / params.page_size], row % params.page_size};
    }
  }

  // Pages in random order with unused ones (all NaN) in between; table entries past the end of a sequence are garbage.
  void lay_out_pages(const std::vector<int64_t> &lengths) {
    const int64_t size = layout.page_size;
    int64_t used = 0, widest = 0;
    for (int64_t n : lengths) {
      used += (n + size - 1) / size;
      widest = std::max(widest, (n + size - 1) / size);
    }
    params.page_size = size;
    params.num_pages = used + 2;
    params.num_page_slots = std::max<int64_t>(1, widest + (layout.slack > 0 ? 2 : 0));
    params.page_table_stride = params.num_page_slots + layout.slack;
    if (params.seqused_k != nullptr) params.max_seqlen_k = params.num_page_slots * size;
    std::vector<int32_t> order(params.num_pages);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), rng);
    pages.resize(index_cache_rows() * params.page_table_stride);
    for (int32_t &page : pages) page = static_cast<int32_t>(rng());
    size_t next = 0;
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t count = (lengths[b] + size - 1) / size;
      for (int64_t n = 0; n < count; ++n) pages[kv_index[b] * params.page_table_stride + n] = order[next++];
    }
    params.page_table = pages.data();
  }

  void set_scores() {
    const Problem &p = problem;
    params.softmax_scale = p.scale;
    params.softcap = p.softcap;
    if (!p.sinks.empty()) {
      sinks = Buffer(p.sinks_dtype, p.hq, layout.poison);
      sinks.put(0, p.sinks.data(), p.hq);
      params.sinks = sinks.bytes.data();
      params.sinks_dtype = p.sinks_dtype;
    }
    if (p.output_scale) params.output_scale = &*p.output_scale;
    if (p.rel_extent > 0) {
      const int64_t tokens = layout.q == Kind::kVarlen ? params.total_q : batch * params.max_seqlen_q;
      params.rel_extent = p.rel_extent;
      params.rel_dtype = p.rel_dtype;
      params.rel_head_stride = p.rel_extent;
      params.rel_token_stride = p.hq * p.rel_extent;
      rel = Buffer(p.rel_dtype, tokens * params.rel_token_stride, layout.poison);
      for (int64_t b = 0; b < batch; ++b) {
        const std::vector<float> &values = p.seqs[b].rel;
        rel.put(token(b, 0) * params.rel_token_stride, values.data(), static_cast<int64_t>(values.size()));
      }
      params.rel_logits = rel.bytes.data();
    }
    gather(&Sequence::alibi, alibi);
    if (!alibi.empty()) {
      params.alibi_slopes = alibi.data();
      params.alibi_batch_stride = p.hq;
    }
    set_dropout();
    gather_scale(&Sequence::q_scale, q_scale, params.q_descale);
    gather_scale(&Sequence::k_scale, k_scale, params.k_descale);
    gather_scale(&Sequence::v_scale, v_scale, params.v_descale);
  }

  void set_dropout() {
    const Problem &p = problem;
    params.dropout_p = p.dropout;
    dropout_state = {p.dropout_seed, p.dropout_offset};
    params.dropout_state = layout.dropout_state ? dropout_state.data() : nullptr;
    params.dropout_seed = layout.dropout_state ? rng() : p.dropout_seed;
    params.dropout_offset = layout.dropout_state ? rng() : p.dropout_offset;
  }

  void set_mask() {
    const Problem &p = problem;
    params.window_left = p.window_left;
    params.window_right = p.window_right;
    params.attention_chunk = p.attention_chunk;
    params.rswa_window = p.rswa_window;
    params.prefix_clamp_window = p.prefix_clamp;
    bool mixed = layout.causal_per_seq;
    for (const Sequence &s : p.seqs) mixed |= s.causal != p.seqs[0].causal;
    for (const Sequence &s : p.seqs) {
      causal.push_back(s.causal);
      prefix_lens.push_back(s.rswa_prefix);
    }
    params.causal = batch > 0 && !mixed && p.seqs[0].causal;
    if (mixed) params.causal_per_seq = causal.data();
    if (p.rswa_window > 0) params.rswa_prefix_lens = prefix_lens.data();
    if (p.prefix_mode == FLASHSPARK_PREFIX_NONE) return;

    size_t slots = 1;
    for (const Sequence &s : p.seqs) slots = std::max(slots, s.ranges.size() + 1);
    if (layout.prefix_per_token) {
      params.prefix_mode = FLASHSPARK_PREFIX_PER_TOKEN;
      ranges.assign(2 * (layout.q == Kind::kVarlen ? params.total_q : batch * params.max_seqlen_q), -1);
    } else {
      params.prefix_mode = FLASHSPARK_PREFIX_PER_SEQ;
      params.num_prefix_ranges = static_cast<int64_t>(slots);
      ranges.assign(2 * slots * batch, -1);
    }
    for (int64_t b = 0; b < batch; ++b) {
      const Sequence &s = p.seqs[b];
      for (size_t n = 0; n < s.ranges.size(); ++n) {
        if (!layout.prefix_per_token) std::copy_n(s.ranges[n].begin(), 2, &ranges[2 * (b * slots + n)]);
        for (int64_t i = 0; layout.prefix_per_token && i < s.tq; ++i) {
          const bool holds = s.ranges[n][0] <= s.pos(i) && s.pos(i) <= s.ranges[n][1];
          if (holds) std::copy_n(s.ranges[n].begin(), 2, &ranges[2 * token(b, i)]);
        }
      }
    }
    params.prefix_ranges = ranges.data();
  }

  int64_t token(int64_t b, int64_t i) const {
    return (layout.q == Kind::kVarlen ? cu_q[b] : b * params.max_seqlen_q) + i;
  }

  void gather(std::vector<float> Sequence::*member, std::vector<float> &all) const {
    for (const Sequence &s : problem.seqs) all.insert(all.end(), (s.*member).begin(), (s.*member).end());
  }

  void gather_scale(std::vector<float> Sequence::*member, std::vector<float> &all, flashspark_scale &scale) const {
    gather(member, all);
    if (!all.empty()) scale = {all.data(), problem.hkv, 1};
  }

  Result forward() {
    Result r;
    r.status = flashspark_attention_forward(&params);
    if (params.leftpad_k != nullptr) r.leftpad = layout.leftpad;
    const bool failed = r.status != FLASHSPARK_OK;
    if (failed) r.error = flashspark_last_error();
    Reader out_reader(out), lse_reader(lse);
    for (int64_t b = 0; !failed && b < batch; ++b) {
      Rows rows;
      for (int64_t i = 0; i < problem.seqs[b].tq; ++i) {
        for (int64_t h = 0; h < problem.hq; ++h) {
          const int64_t t = q_token[b] + i;
          for (int64_t c = 0; c < problem.dv; ++c)
            rows.out.push_back(out_reader.take(out_grid.at(q_batch[b], t, h) + c));
          if (layout.want_lse) rows.lse.push_back(lse_reader.take(lse_grid.at(q_batch[b], t, h)));
        }
      }
      r.seqs.push_back(std::move(rows));
    }
    if (out_reader.trespassed(failed)) r.trespass = "out was written outside the rows in use";
    if (lse_reader.trespassed(failed)) r.trespass = "lse was written outside the rows in use";
    return r;
  }
};

}  // namespace

Result run(const Problem &problem, const Layout &layout) {
  return Call(problem, layout).forward();
}

}  // namespace flashspark::test
