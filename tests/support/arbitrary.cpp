#include "support/arbitrary.hpp"

namespace flashspark::test {
namespace {

int64_t upto(int64_t most) {
  return *rc::gen::inRange<int64_t>(0, most + 1);
}
bool flip() {
  return *rc::gen::arbitrary<bool>();
}
bool seldom() {
  return upto(3) == 3;
}

void draw_dtypes(Problem &p) {
  switch (upto(4)) {
    case 1:
      p.q_dtype = p.kv_dtype = FLASHSPARK_BFLOAT16;
      break;
    case 2:
      p.q_dtype = p.kv_dtype = FLASHSPARK_FLOAT16;
      break;
    case 3:
      p.q_dtype = flip() ? FLASHSPARK_BFLOAT16 : FLASHSPARK_FLOAT16;
      p.kv_dtype = FLASHSPARK_FLOAT8_E4M3;
      break;
    case 4:
      p.q_dtype = p.kv_dtype = FLASHSPARK_FLOAT8_E4M3;
      break;
    default:
      break;
  }
}

void draw_mask(Problem &p) {
  const int64_t kind = upto(5);
  for (Sequence &s : p.seqs) s.causal = kind >= 2 || (kind == 1 && flip());
  if (kind == 5) {
    p.rswa_window = static_cast<int32_t>(1 + upto(40));
    for (Sequence &s : p.seqs) s.rswa_prefix = static_cast<int32_t>(upto(s.tk + 5));
    return;
  }
  if (seldom()) p.window_left = upto(60);
  if (seldom()) p.window_right = upto(60);
  if (seldom()) p.attention_chunk = 1 + upto(60);
  if (kind != 4) return;
  p.prefix_mode = FLASHSPARK_PREFIX_PER_SEQ;
  p.prefix_clamp = flip();
  for (Sequence &s : p.seqs) {
    auto start = static_cast<int32_t>(upto(20));
    for (int64_t n = upto(2); n > 0; --n) {  // disjoint
      const auto end = start + static_cast<int32_t>(upto(30));
      s.ranges.push_back({start, end});
      start = end + 1 + static_cast<int32_t>(upto(20));
    }
  }
}

std::vector<float> draw_positive(std::mt19937_64 &rng, int64_t count) {
  std::uniform_real_distribution<float> draw(0.05f, 1.5f);
  std::vector<float> values(count);
  for (float &x : values) x = draw(rng);
  return values;
}

}  // namespace

Problem arbitrary_problem(const Wanted &wanted) {
  Problem p;
  const std::vector<int64_t> widths = {8, 16, 24, 40, 64, 72, 128};
  p.hkv = 1 + upto(2);
  p.hq = p.hkv * (1 + upto(3));
  p.d = widths[upto(6)];
  p.dv = flip() ? p.d : widths[upto(6)];
  p.scale = 0.1f + 0.05f * static_cast<float>(upto(10));
  if (wanted.dtypes) draw_dtypes(p);
  std::mt19937_64 rng(static_cast<uint64_t>(upto(1 << 30)));
  if (wanted.biases) {
    if (seldom()) p.softcap = 0.5f + static_cast<float>(upto(20));
    if (seldom()) p.sinks = normal(rng, p.hq, FLASHSPARK_FLOAT32, 2);
    if (seldom()) p.rel_extent = 1 + upto(50);
  }
  const bool alibi = wanted.biases && seldom();
  const int64_t count = 1 + upto(3);
  for (int64_t b = 0; b < count; ++b) {
    const int64_t tq = flip() ? 1 : upto(20);
    p.seqs.push_back(random_sequence(rng, p, tq, upto(wanted.longest_k)));
    Sequence &s = p.seqs.back();
    if (alibi) s.alibi = draw_positive(rng, p.hq);
    if (wanted.dtypes) {
      s.q_scale = draw_positive(rng, p.hkv);
      s.k_scale = draw_positive(rng, p.hkv);
      s.v_scale = draw_positive(rng, p.hkv);
    }
  }
  if (wanted.masks) draw_mask(p);
  if (wanted.dropout && flip()) {
    p.dropout = *rc::gen::element(0.1f, 0.5f, 0.9f, 1e-5f);
    p.dropout_seed = rng();
    p.dropout_offset = static_cast<uint64_t>(upto(3));
  }
  return p;
}

Layout arbitrary_layout() {
  Layout l;
  l.q = flip() ? Kind::kVarlen : Kind::kDense;
  l.kv = static_cast<Kind>(upto(2));
  l.page_size = flip() ? 16 * (1 + upto(6)) : 1 + upto(100);
  l.head_major = flip();
  l.packed_kv = flip();
  l.backwards = seldom();
  l.row_pad = upto(9);
  l.slack = upto(3);
  l.leftpad = seldom() ? upto(40) : 0;
  l.kv_batch_index = flip();
  l.causal_per_seq = flip();
  l.prefix_per_token = flip();
  l.dropout_state = flip();
  l.seed = static_cast<uint64_t>(upto(1 << 20));
  l.num_threads = static_cast<int32_t>(upto(3));
  l.num_splits = static_cast<int32_t>(upto(5));
  return l;
}

void make_peaked(Problem &p) {
  // The queries of each head share a direction, and a few keys lie far out on it, each farther than the one before.
  for (Sequence &s : p.seqs) {
    for (size_t row = 0; row < s.q.size() / p.d; ++row) s.q[row * p.d] = rounded(4, p.q_dtype);
    float height = 0;
    for (int64_t j = s.tk - 1; j >= 0; --j) {
      if (upto(15) == 0) height += static_cast<float>(upto(30));
      for (int64_t g = 0; g < p.hkv; ++g) {
        float &along = s.k[(j * p.hkv + g) * p.d];
        along = rounded(height > 90 ? 0.0f : height / (4 * p.scale) + along, p.kv_dtype);
      }
    }
  }
}

}  // namespace flashspark::test
