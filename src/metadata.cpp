// Checks the numbers that validated params point to, entry by entry, so that no address leaves its tensor and no result
// is undefined.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "check.hpp"
#include "dtype.hpp"
#include "error.hpp"
#include "validate.hpp"

namespace flashspark {
namespace {

// Offsets must not decrease, and must end within the tensor.
void check_offsets(const char *name, const int32_t *offsets, int64_t num_seqs, int64_t total, int64_t longest) {
  if (offsets == nullptr) return;
  if (offsets[0] < 0) fail(check::at(name, 0), int64_t{offsets[0]}, "must not be negative");
  for (int64_t b = 0; b < num_seqs; ++b) {
    const int64_t length = int64_t{offsets[b + 1]} - offsets[b];
    if (length < 0) fail(check::at(name, b + 1), int64_t{offsets[b + 1]}, "must not be below the entry before it");
    if (longest >= 0 && length > longest) {
      fail(check::at(name, b + 1), int64_t{offsets[b + 1]},
           "makes a sequence longer than the maximum, " + std::to_string(longest));
    }
  }
  if (offsets[num_seqs] > total) {
    fail(check::at(name, num_seqs), int64_t{offsets[num_seqs]},
         "must be at most the tensor's rows, " + std::to_string(total));
  }
}

// `rows`: those that the sequence has.
void check_used_rows(const int32_t *seqused_q, int64_t b, int64_t rows) {
  if (seqused_q == nullptr || (seqused_q[b] >= 0 && seqused_q[b] <= rows)) return;
  fail(check::at("seqused_q", b), int64_t{seqused_q[b]},
       "must be from 0 to the sequence's rows, " + std::to_string(rows));
}

void check_batch_index(const int32_t *index, int64_t b, int64_t rows, bool paged) {
  if (index == nullptr || (index[b] >= 0 && index[b] < rows)) return;
  fail(check::at("kv_batch_index", b), int64_t{index[b]},
       "must name one of the " + std::to_string(rows) + (paged ? " rows of page_table" : " sequences of the cache"));
}

// The pages of rows [first, last) of the sequence in row `row` of the page table.
template <class P>
void check_pages(const P &p, int64_t row, int64_t first, int64_t last) {
  if (p.page_table == nullptr || last <= first) return;
  for (int64_t slot = first / p.page_size; slot <= (last - 1) / p.page_size; ++slot) {
    const int32_t page = p.page_table[row * p.page_table_stride + slot];
    if (page < 0 || page >= p.num_pages) {
      fail("page_table[" + std::to_string(row) + "," + std::to_string(slot) + "]", int64_t{page},
           "must name one of the " + std::to_string(p.num_pages) + " pages of the cache");
    }
  }
}

// `dtype` is the tensor's: factors of other types than e4m3 are not read.
void check_scale(const char *name, const flashspark_scale &s, int32_t dtype, int64_t batch, int64_t heads) {
  if (s.data == nullptr || dtype != FLASHSPARK_FLOAT8_E4M3) return;
  for (int64_t b = 0; b < (s.batch_stride == 0 ? std::min<int64_t>(batch, 1) : batch); ++b) {
    for (int64_t h = 0; h < (s.head_stride == 0 ? 1 : heads); ++h) {
      const float value = s.data[b * s.batch_stride + h * s.head_stride];
      if (value >= 0 && !std::isinf(value)) continue;
      fail(std::string(name) + "[" + std::to_string(b) + "," + std::to_string(h) + "]", double{value},
           "must be finite and >= 0");
    }
  }
}

void check_scores(const Params &p) {
  check_scale("q_descale", p.q_descale, p.q.dtype, p.num_seqs, p.num_heads_kv);
  check_scale("k_descale", p.k_descale, p.k.dtype, p.num_seqs, p.num_heads_kv);
  check_scale("v_descale", p.v_descale, p.v.dtype, p.num_seqs, p.num_heads_kv);
  if (p.output_scale != nullptr && (!(*p.output_scale > 0) || std::isinf(*p.output_scale))) {
    fail("output_scale", double{*p.output_scale}, "must be finite and > 0");
  }
  for (int64_t h = 0; p.sinks != nullptr && h < p.num_heads_q; ++h) {
    const float sink = load_as_float(p.sinks, h, p.sinks_dtype);
    if (std::isnan(sink) || sink == INFINITY) fail(check::at("sinks", h), double{sink}, "must be finite or -inf");
  }
  const int64_t slope_sets = p.alibi_slopes == nullptr ? 0 : p.alibi_batch_stride == 0 ? 1 : p.num_seqs;
  for (int64_t b = 0; b < std::min(slope_sets, p.num_seqs); ++b) {
    for (int64_t h = 0; h < p.num_heads_q; ++h) {
      const float slope = alibi_slope(p, b, h);
      if (!std::isfinite(slope)) fail(check::at("alibi_slopes", h), double{slope}, "must be finite");
    }
  }
}

// Lengths and pages of a sequence whose offsets have been checked.
void check_sequence(const Params &p, int64_t b) {
  check_used_rows(p.seqused_q, b, is_varlen_q(p) ? int64_t{p.cu_seqlens_q[b + 1]} - p.cu_seqlens_q[b] : p.max_seqlen_q);
  if (p.causal_per_seq != nullptr && (p.causal_per_seq[b] < 0 || p.causal_per_seq[b] > 1)) {
    fail(check::at("causal_per_seq", b), int64_t{p.causal_per_seq[b]}, "must be 0 or 1");
  }
  // A sequence without queries reads no key: padded rows of a captured graph carry stale lengths and pages.
  const Sequence s = sequence(p, b);
  if (s.seqlen_q == 0) return;
  if (p.leftpad_k != nullptr && p.leftpad_k[b] < 0) {
    fail(check::at("leftpad_k", b), int64_t{p.leftpad_k[b]}, "must not be negative");
  }
  check_batch_index(p.kv_batch_index, b, num_kv_seqs(p), is_paged(p));
  if (p.seqused_k != nullptr) {
    int64_t capacity = p.max_seqlen_k;
    if (is_varlen_k(p)) capacity = p.total_k - p.cu_seqlens_k[b];
    if (is_paged(p)) capacity = p.num_page_slots * p.page_size;
    if (p.seqused_k[b] < 0 || p.seqused_k[b] > capacity) {
      fail(check::at("seqused_k", b), int64_t{p.seqused_k[b]},
           "must be from 0 to the keys there is room for, " + std::to_string(capacity));
    }
  }
  check_pages(p, s.kv_index, s.k_row, s.k_row + s.seqlen_k);
}

void check_slot_numbers(const AppendParams &p) {
  const int64_t slots = p.num_pages * p.page_size;
  for (int64_t t = 0; t < p.total_new; ++t) {
    if (p.slot_mapping[t] >= slots) {
      fail(check::at("slot_mapping", t), p.slot_mapping[t],
           "must be negative or name one of the " + std::to_string(slots) + " slots of the cache");
    }
    const bool turns = p.rotary_positions != nullptr && (p.slot_mapping[t] >= 0 || p.q.data != nullptr);
    if (turns && (p.rotary_positions[t] < 0 || p.rotary_positions[t] >= p.seqlen_rotary)) {
      fail(check::at("rotary_positions", t), p.rotary_positions[t],
           "must be from 0 to " + std::to_string(p.seqlen_rotary - 1));
    }
  }
}

// The positions of `rows` rows of a sequence must lie within cos and sin.
void check_positions(const AppendParams &p, const AppendSequence &s, int64_t rows) {
  if (rows == 0 || (s.position0 >= 0 && s.position0 + rows <= p.seqlen_rotary)) return;
  if (p.rotary_seqlens != nullptr) {
    fail(check::at("rotary_seqlens", s.b), s.position0,
         "must not be negative, and leave room for " + std::to_string(rows) +
             " positions below seqlen_rotary = " + std::to_string(p.seqlen_rotary));
  }
  if (s.before < 0) fail(check::at("seqlens", s.b), s.before, "must not be negative");
  fail("seqlen_rotary", p.seqlen_rotary, "must cover position " + std::to_string(s.position0 + rows - 1));
}

void check_sequence(const AppendParams &p, int64_t b) {
  if (p.q.data != nullptr) {
    check_used_rows(p.seqused_q, b, p.cu_seqlens_q ? int64_t{p.cu_seqlens_q[b + 1]} - p.cu_seqlens_q[b] : p.seqlen_q);
  }
  const AppendSequence s = append_sequence(p, b);
  if (s.rows > 0) {
    const bool paged = p.page_table != nullptr;
    const int64_t capacity = paged ? p.num_page_slots * p.page_size : p.seqlen_cache;
    if (s.before < 0 || s.before + s.rows > capacity) {
      fail(check::at("seqlens", b), s.before,
           "no room for " + std::to_string(s.rows) + " more rows in a cache of " + std::to_string(capacity));
    }
    check_batch_index(p.kv_batch_index, b, p.num_cache_rows, paged);
    check_pages(p, s.cache_index, s.before, s.before + s.rows);
  }
  if (p.rotary_cos == nullptr) return;
  const int64_t q_positions = p.q_rotary_per_token != 0 ? s.q_rows : std::min<int64_t>(s.q_rows, 1);
  check_positions(p, s, std::max(s.rows, q_positions));
}

// Consecutive rows of the cache that one sequence, or one row of k_new, writes.
struct Target {
  int64_t begin, end;  // counted through all pages or sequences of the cache
  int64_t from;        // sequence, or row of k_new
};

std::vector<Target> targets_of(const AppendParams &p) {
  std::vector<Target> targets;
  for (int64_t t = 0; p.slot_mapping != nullptr && t < p.total_new; ++t) {
    if (p.slot_mapping[t] >= 0) targets.push_back({p.slot_mapping[t], p.slot_mapping[t] + 1, t});
  }
  for (int64_t b = 0; p.slot_mapping == nullptr && b < p.num_seqs; ++b) {
    const AppendSequence s = append_sequence(p, b);
    const int64_t size = p.page_table != nullptr ? p.page_size : p.seqlen_cache;
    for (int64_t row = s.before, end = s.before + s.rows; row < end;) {
      const int64_t home =
          p.page_table != nullptr ? p.page_table[s.cache_index * p.page_table_stride + row / size] : s.cache_index;
      const int64_t stretch = std::min(end - row, size - row % size), begin = home * size + row % size;
      targets.push_back({begin, begin + stretch, b});
      row += stretch;
    }
  }
  return targets;
}

// No two new rows may go to the same row of the cache.
void check_targets(const AppendParams &p) {
  std::vector<Target> targets = targets_of(p);
  const auto before = [](const Target &a, const Target &b) {
    return a.begin != b.begin ? a.begin < b.begin : a.from < b.from;
  };
  if (!std::is_sorted(targets.begin(), targets.end(), before)) std::sort(targets.begin(), targets.end(), before);
  for (size_t n = 1; n < targets.size(); ++n) {
    const Target &first = targets[n - 1], &second = targets[n];
    if (second.begin >= first.end) continue;
    if (p.slot_mapping != nullptr) {
      fail(check::at("slot_mapping", second.from), p.slot_mapping[second.from],
           "is also " + check::at("slot_mapping", first.from) + ": no two rows may go to one slot");
    }
    const char *table = p.page_table != nullptr ? "page_table" : "kv_batch_index";
    fail(table, "sequences " + std::to_string(first.from) + " and " + std::to_string(second.from),
         "both append to row " + std::to_string(second.begin % (p.page_table ? p.page_size : p.seqlen_cache)) +
             (p.page_table ? " of page " : " of cache sequence ") +
             std::to_string(second.begin / (p.page_table ? p.page_size : p.seqlen_cache)));
  }
}

}  // namespace

void check_metadata(const Params &p) {
  check_scores(p);
  check_offsets("cu_seqlens_q", p.cu_seqlens_q, p.num_seqs, p.total_q, p.max_seqlen_q);
  check_offsets("cu_seqlens_k", p.cu_seqlens_k, p.num_seqs, p.total_k, p.seqused_k ? -1 : p.max_seqlen_k);
  for (int64_t b = 0; b < p.num_seqs; ++b) check_sequence(p, b);
}

void check_metadata(const AppendParams &p) {
  check_scale("k_descale", p.k_descale, p.k_cache.dtype, p.num_seqs, p.num_heads_kv);
  check_scale("v_descale", p.v_descale, p.v_cache.dtype, p.num_seqs, p.num_heads_kv);
  if (p.slot_mapping != nullptr) {
    check_slot_numbers(p);
    return check_targets(p);
  }
  check_offsets("cu_seqlens_new", p.cu_seqlens_new, p.num_seqs, p.total_new, p.seqlen_new);
  if (p.q.data != nullptr) check_offsets("cu_seqlens_q", p.cu_seqlens_q, p.num_seqs, p.total_q, p.seqlen_q);
  for (int64_t b = 0; b < p.num_seqs; ++b) check_sequence(p, b);
  check_targets(p);
}

}  // namespace flashspark
