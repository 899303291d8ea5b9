// Backward problems of a few short sequences, with biases, masks and other modifications.
#pragma once

#include <random>

#include "backward/problem.hpp"

namespace flashspark::emulator {

inline BackwardSpec random_spec(std::mt19937_64 &rng) {
  const auto below = [&rng](int64_t n) { return static_cast<int32_t>(rng() % static_cast<uint64_t>(n)); };
  const auto one_in = [&](int64_t n) { return below(n) == 0; };
  BackwardSpec s;
  const bool same = one_in(2);
  s.tokens.clear(), s.keys.clear();
  for (int32_t n = 1 + below(3); n > 0; --n) {
    s.tokens.push_back(same && !s.tokens.empty() ? s.tokens[0] : 1 + below(140));
    s.keys.push_back(same && !s.keys.empty() ? s.keys[0] : 1 + below(200));
  }
  s.heads_kv = 1 + below(2), s.heads_q = s.heads_kv * (1 + below(3));
  s.varlen_q = one_in(2), s.varlen_k = one_in(2), s.unused_rows = one_in(4), s.heads_first = one_in(4);
  s.causal = one_in(2), s.causal_per_seq = one_in(5);
  if (one_in(3)) s.window_left = below(80);
  if (one_in(4)) s.window_right = below(40);
  if (one_in(3)) s.softcap = 3;
  if (one_in(3)) s.dropout_p = 0.25f;
  s.alibi = one_in(3), s.alibi_per_seq = one_in(2);
  if (one_in(3)) s.rel_extent = 1 + below(150);
  switch (below(5)) {
    case 0:
      s.prefix_mode = one_in(2) ? FLASHSPARK_PREFIX_PER_SEQ : FLASHSPARK_PREFIX_PER_TOKEN;
      s.prefix_clamp_window = one_in(2);
      if (one_in(3)) s.attention_chunk = 1 + below(90);
      break;
    case 1:
      s.rswa_window = 1 + below(60);
      break;
    case 2:
      s.attention_chunk = 1 + below(90);
      break;
    default:
      s.alibi = true;
  }
  s.sinks = one_in(4), s.dlse = one_in(4), s.wanted_biases = !one_in(5);
  return s;
}

}  // namespace flashspark::emulator
