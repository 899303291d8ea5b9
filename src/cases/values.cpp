// The values of a Case: q, k, v, biases, ranges, factors; and what the mask keeps of them.
#include <algorithm>
#include <cmath>

#include "cases/cases.hpp"
#include "cases/random.hpp"

namespace flashspark::cases {
namespace {

constexpr int64_t kPrefixSlots = 4;  // two in use, two of the kinds that mean "unused"

// Keys that lift the row maximum of Input::kPeaked: they share one direction with every query of the group, and a key's
// level grows along the sequence, so a running maximum jumps by about 30 three times.
constexpr double kJump = 30;
int level(Random &random, int64_t j, int64_t seqlen_k) {
  const int64_t quarter = 4 * j / std::max<int64_t>(seqlen_k, 1);  // 0..3
  return random.uniform() < 0.08 ? static_cast<int>(quarter) : 0;
}

}  // namespace

void Problem::set_scores() {
  const int64_t num_seqs = params.num_seqs;
  Random random(spec_.seed, 's');
  params.softmax_scale = static_cast<float>(
      spec_.softmax_scale >= 0 ? spec_.softmax_scale : 1 / std::sqrt(static_cast<double>(spec_.head_dim)));
  params.softcap = spec_.softcap;
  params.causal = spec_.causal ? 1 : 0;
  if (spec_.causal_per_seq) {
    for (int64_t b = 0; b < num_seqs; ++b) causal_.push_back(b % 2 == 0 ? 1 : 0);
    params.causal_per_seq = causal_.data();
  }
  params.window_left = spec_.window_left;
  params.window_right = spec_.window_right;
  params.attention_chunk = spec_.attention_chunk;
  if (spec_.sinks) set_sinks(random);
  set_prefix_ranges();
  if (spec_.rswa_window > 0) {
    params.rswa_window = spec_.rswa_window;
    for (int64_t b = 0; b < num_seqs; ++b) rswa_prefix_.push_back(static_cast<int32_t>(seqlen_k(b) / 4 + b));
    params.rswa_prefix_lens = rswa_prefix_.data();
  }
  if (spec_.rel_extent > 0) set_rel_logits();
  if (spec_.alibi) set_alibi();
  set_factors(random);
  set_dropout();
}

void Problem::set_dropout() {
  params.dropout_p = spec_.dropout;
  params.dropout_seed = spec_.dropout_seed;
  params.dropout_offset = spec_.dropout_offset;
  if (!spec_.dropout_state) return;
  dropout_state_ = {spec_.dropout_seed, spec_.dropout_offset};
  params.dropout_state = dropout_state_.data();
  params.dropout_seed = ~spec_.dropout_seed;
  params.dropout_offset = ~spec_.dropout_offset;
}

void Problem::set_sinks(Random &random) {
  sinks_ = Buffer(spec_.heads_q * flashspark_dtype_size(spec_.sinks_dtype));
  for (int64_t h = 0; h < spec_.heads_q; ++h) {
    store(spec_.sinks_dtype, sinks_.data(), h, static_cast<float>(2 * random.normal()));
  }
  params.sinks = sinks_.data();
  params.sinks_dtype = spec_.sinks_dtype;
}

void Problem::set_prefix_ranges() {
  const int64_t num_seqs = params.num_seqs;
  params.prefix_mode = spec_.prefix_mode;
  params.prefix_clamp_window = spec_.prefix_clamp ? 1 : 0;
  // Two ranges a sequence, each about a quarter of the keys.
  const auto range = [&](int64_t b, int64_t r) -> std::pair<int32_t, int32_t> {
    const int64_t n = seqlen_k(b), start = r == 0 ? n / 8 : n / 2;
    return {static_cast<int32_t>(start), static_cast<int32_t>(start + n / 4)};
  };
  if (spec_.prefix_mode == FLASHSPARK_PREFIX_PER_SEQ) {
    params.num_prefix_ranges = kPrefixSlots;
    for (int64_t b = 0; b < num_seqs; ++b) {
      for (const auto &[start, end] : {range(b, 0), range(b, 1), {-1, -1}, {7, 3}}) {
        prefix_.insert(prefix_.end(), {start, end});
      }
    }
    params.prefix_ranges = prefix_.data();
  } else if (spec_.prefix_mode == FLASHSPARK_PREFIX_PER_TOKEN) {
    prefix_.assign(2 * num_tokens(), -1);
    for (int64_t b = 0; b < num_seqs; ++b) {
      for (int64_t i = 0; i < seqlen_q(b); ++i) {
        const int64_t pos = i + seqlen_k(b) - seqlen_q(b);
        for (int64_t r = 0; r < 2; ++r) {
          const auto [start, end] = range(b, r);
          if (pos < start || pos > end) continue;
          prefix_[2 * token_row(b, i)] = start;
          prefix_[2 * token_row(b, i) + 1] = end;
        }
      }
    }
    params.prefix_ranges = prefix_.data();
  }
}

void Problem::set_rel_logits() {
  params.rel_dtype = spec_.rel_dtype;
  params.rel_extent = spec_.rel_extent;
  params.rel_head_stride = spec_.rel_extent + (spec_.strided ? 8 : 0);
  params.rel_token_stride = spec_.heads_q * params.rel_head_stride;
  const int64_t tokens = num_tokens();
  const int64_t size = tokens == 0 ? 0
                                   : (tokens - 1) * params.rel_token_stride +
                                         (spec_.heads_q - 1) * params.rel_head_stride + spec_.rel_extent;
  rel_ = Buffer(size * flashspark_dtype_size(spec_.rel_dtype));
  params.rel_logits = rel_.data();
  for (int64_t b = 0; b < params.num_seqs; ++b) {
    for (int64_t i = 0; i < seqlen_q(b); ++i) {
      for (int64_t h = 0; h < spec_.heads_q; ++h) {
        Random row(spec_.seed, 'r', b, i, h);
        const int64_t at = token_row(b, i) * params.rel_token_stride + h * params.rel_head_stride;
        for (int64_t d = 0; d < spec_.rel_extent; ++d) {
          const double value = row.normal();
          store(spec_.rel_dtype, rel_.data(), at + d, static_cast<float>(value));
          largest_rel_ = std::max(largest_rel_, std::fabs(value));
        }
      }
    }
  }
}

void Problem::set_alibi() {
  const int64_t sets = spec_.alibi_per_batch ? params.num_seqs : 1;
  for (int64_t b = 0; b < sets; ++b) {
    for (int64_t h = 0; h < spec_.heads_q; ++h) {
      alibi_.push_back(static_cast<float>(std::exp2(-8.0 * (h + 1) / spec_.heads_q) * (1 + 0.1 * b)));
    }
  }
  params.alibi_slopes = alibi_.data();
  params.alibi_batch_stride = spec_.alibi_per_batch ? spec_.heads_q : 0;
}

void Problem::set_factors(Random &random) {
  const auto descale = [&](Descale kind, int32_t type, std::vector<float> &storage, flashspark_scale &scale) {
    if (kind == Descale::kNone) return;
    scale.batch_stride = kind == Descale::kFull ? spec_.heads_kv : 0;
    scale.head_stride = kind == Descale::kPerTensor ? 0 : 1;
    storage.resize(kind == Descale::kPerTensor ? 1
                   : kind == Descale::kPerHead ? spec_.heads_kv
                                               : spec_.heads_kv * params.num_seqs);
    for (float &factor : storage) {
      factor = type == FLASHSPARK_FLOAT8_E4M3 ? static_cast<float>(0.5 + random.uniform()) : 3.0f;
    }
    scale.data = storage.data();
  };
  descale(spec_.q_descale, spec_.q_dtype, q_descale_, params.q_descale);
  descale(spec_.k_descale, spec_.kv_dtype, k_descale_, params.k_descale);
  descale(spec_.v_descale, spec_.kv_dtype, v_descale_, params.v_descale);
  if (spec_.output_scale > 0) {
    output_scale_ = {spec_.output_scale};
    params.output_scale = output_scale_.data();
  }
}

int64_t Problem::num_tokens() const {
  return spec_.q_layout == Layout::kDense ? params.num_seqs * params.max_seqlen_q : params.total_q;
}

void Problem::fill() {
  const int64_t num_seqs = params.num_seqs, group = spec_.heads_q / spec_.heads_kv;
  const bool peaked = spec_.input == Input::kPeaked;
  const double noise = peaked ? 0.5 : 1.0;
  // A query holds the direction once, a key of level n holds it n * lift times: their score is n * kJump.
  const double lift = kJump / std::max<double>(spec_.head_dim * params.softmax_scale, 1e-3);
  q_norm_.resize(num_rows() * spec_.heads_q);
  k_norm_.resize(num_seqs * spec_.heads_kv);
  value_max_.resize(num_seqs * spec_.heads_kv);
  const auto direction = [&](int64_t h_kv) {
    std::vector<double> signs(spec_.head_dim);
    Random random(spec_.seed, 'd', h_kv);
    for (double &sign : signs) sign = random.bits() & 1 ? 1 : -1;
    return signs;
  };
  // Writes one row, gives the length of what was stored.
  const auto write = [&](Role role, int64_t b, int64_t i, int64_t h, Random &random, const std::vector<double> &along,
                         double amount) {
    std::byte *row = address(role, b, i, h);
    double squares = 0;
    for (int64_t d = 0; d < spec_.head_dim; ++d) {
      store(dtype(role), row, d, static_cast<float>(noise * random.normal() + (amount != 0 ? amount * along[d] : 0)));
      const double stored = load(dtype(role), row, d);
      squares += stored * stored;
    }
    return std::sqrt(squares);
  };
  for (int64_t b = 0; b < num_seqs; ++b) {
    for (int64_t h = 0; h < spec_.heads_q; ++h) {
      const std::vector<double> along = direction(h / group);
      for (int64_t i = 0; i < seqlen_q(b); ++i) {
        Random random(spec_.seed, 'q', b, i, h);
        q_norm_[(row_begin(b) + i) * spec_.heads_q + h] = write(Role::kQ, b, i, h, random, along, peaked ? 1 : 0);
      }
    }
    for (int64_t h = 0; h < spec_.heads_kv; ++h) {
      const std::vector<double> along = direction(h);
      double &longest = k_norm_[b * spec_.heads_kv + h], &largest = value_max_[b * spec_.heads_kv + h];
      for (int64_t j = 0; j < seqlen_k(b); ++j) {
        Random random(spec_.seed, 'k', b, j, h);
        const int n = peaked ? level(random, j, seqlen_k(b)) : 0;
        longest = std::max(longest, write(Role::kK, b, j, h, random, along, n * lift));
        Random values(spec_.seed, 'v', b, j, h);
        std::byte *row = address(Role::kV, b, j, h);
        for (int64_t d = 0; d < spec_.head_dim_v; ++d) {
          store(spec_.kv_dtype, row, d, static_cast<float>(values.normal()));
          largest = std::max<double>(largest, std::fabs(load(spec_.kv_dtype, row, d)));
        }
      }
    }
  }
}

int64_t Problem::token_row(int64_t b, int64_t i) const {
  return (spec_.q_layout == Layout::kDense ? b * params.max_seqlen_q : cu_q_[b]) + i;
}

double Problem::factor(const flashspark_scale &scale, int32_t type, int64_t b, int64_t h_kv) const {
  if (scale.data == nullptr || type != FLASHSPARK_FLOAT8_E4M3) return 1;
  return scale.data[b * scale.batch_stride + h_kv * scale.head_stride];
}

double Problem::value_scale(int64_t b, int64_t h_kv) const {
  const double descale = factor(params.v_descale, spec_.kv_dtype, b, h_kv);
  return value_max_[b * spec_.heads_kv + h_kv] * descale / (spec_.output_scale > 0 ? spec_.output_scale : 1);
}

double Problem::score_scale(int64_t b, int64_t i, int64_t h) const {
  const int64_t h_kv = h / (spec_.heads_q / spec_.heads_kv);
  double scale = q_norm_[(row_begin(b) + i) * spec_.heads_q + h] * k_norm_[b * spec_.heads_kv + h_kv];
  scale *= params.softmax_scale * factor(params.q_descale, spec_.q_dtype, b, h_kv) *
           factor(params.k_descale, spec_.kv_dtype, b, h_kv);
  scale += spec_.softcap + largest_rel_;
  if (spec_.alibi) {
    const float slope = alibi_[(spec_.alibi_per_batch ? b * spec_.heads_q : 0) + h];
    scale += slope * static_cast<double>(std::max(seqlen_k(b), seqlen_q(b)));
  }
  return scale;
}

bool Problem::keeps(int64_t b, int64_t i, int64_t j) const {
  if (j < 0 || j >= seqlen_k(b)) return false;
  const int64_t pos = i + seqlen_k(b) - seqlen_q(b), back = pos - j;
  if (spec_.rswa_window > 0) return back >= 0 && (j < rswa_prefix_[b] || back < spec_.rswa_window);
  const bool is_causal = spec_.causal_per_seq ? causal_[b] != 0 : spec_.causal;
  const bool left = spec_.window_left < 0 || back <= spec_.window_left;
  const bool right = spec_.window_right < 0 || -back <= spec_.window_right;
  bool chunk = true;  // no border of chunks lies between the two: the borders are the multiples of attention_chunk
  if (const int64_t size = spec_.attention_chunk; size > 0) {
    const int64_t low = std::min(pos, j), high = std::max(pos, j);
    const int64_t next_border = low + size - (low % size + size) % size;
    chunk = high < next_border;
  }
  if (left && right && chunk && (back >= 0 || !is_causal)) return true;
  if (spec_.prefix_clamp && !left) return false;
  if (spec_.prefix_mode == FLASHSPARK_PREFIX_PER_TOKEN) {
    const int32_t *range = &prefix_[2 * token_row(b, i)];
    return range[0] <= j && j <= range[1];
  }
  if (spec_.prefix_mode == FLASHSPARK_PREFIX_PER_SEQ) {
    for (int64_t r = 0; r < kPrefixSlots; ++r) {
      const int32_t *range = &prefix_[2 * (b * kPrefixSlots + r)];
      if (range[0] <= std::min(pos, j) && std::max(pos, j) <= range[1]) return true;
    }
  }
  return false;
}

int64_t Problem::num_pairs() const {
  int64_t pairs = 0;
  for (int64_t b = 0; b < params.num_seqs; ++b) {
    for (int64_t i = 0; i < seqlen_q(b); ++i) {
      for (int64_t j = 0; j < seqlen_k(b); ++j) pairs += keeps(b, i, j);
    }
  }
  return pairs;
}

double Problem::flops() const {
  return 2.0 * static_cast<double>(num_pairs() * spec_.heads_q * (spec_.head_dim + spec_.head_dim_v));
}

double Problem::bytes() const {
  double keys = 0;
  for (int64_t b = 0; b < params.num_seqs; ++b) {
    // A key that no row keeps (outside every window) need not be read.
    for (int64_t j = 0; j < seqlen_k(b); ++j) {
      bool used = false;
      for (int64_t i = 0; i < seqlen_q(b) && !used; ++i) used = keeps(b, i, j);
      keys += used;
    }
  }
  const auto size = [](int32_t type) { return static_cast<double>(flashspark_dtype_size(type)); };
  const auto rows = static_cast<double>(num_rows() * spec_.heads_q);
  return keys * spec_.heads_kv * (spec_.head_dim + spec_.head_dim_v) * size(spec_.kv_dtype) +
         rows * (spec_.head_dim * size(spec_.q_dtype) + spec_.head_dim_v * size(spec_.out_dtype));
}

}  // namespace flashspark::cases
