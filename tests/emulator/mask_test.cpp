// The mask in both directions, over random sequences and mask parameters: the tokens that tokens_of_keys() names for a
// key tile are compared with what row_mask() says of every token.
#include "attention/mask.cuh"

#include <gtest/gtest.h>

#include <random>
#include <sstream>
#include <string>
#include <vector>

namespace flashspark::emulator {
namespace {

struct Case {
  SequenceArguments a{};
  SequenceMask mask{};
  int32_t tokens = 0;
  std::vector<int32_t> ranges;
  int32_t rswa_prefix = 0;
};

enum Kind { window, chunk, rswa, prefix_per_seq, prefix_per_token, kKinds };

void draw(Case &c, Kind kind, std::mt19937 &random) {
  const auto below = [&random](int32_t n) { return static_cast<int32_t>(random() % static_cast<uint32_t>(n)); };
  const auto bound = [&] { return below(3) == 0 ? 1 << 30 : below(12); };
  c.tokens = 1 + below(20);
  c.mask.begin = below(4);
  c.mask.end = c.mask.begin + below(30);
  c.mask.shift = c.mask.end - c.tokens;
  c.mask.causal = below(2) != 0 || kind == rswa;
  c.a.window_left = bound();
  c.a.window_right = bound();
  if (kind == chunk) c.a.attention_chunk = 1 + below(9);
  if (kind == rswa) {
    c.a.rswa_window = 1 + below(8);
    c.rswa_prefix = below(40) - 5;
    c.a.rswa_prefix_lens = &c.rswa_prefix;
  }
  if (kind == prefix_per_seq || kind == prefix_per_token) {
    c.a.prefix_mode = kind == prefix_per_seq ? PrefixMode::per_seq : PrefixMode::per_token;
    c.a.num_prefix_ranges = kind == prefix_per_seq ? 2 : 1;
    c.ranges.resize(static_cast<size_t>(2 * (kind == prefix_per_seq ? 2 : c.tokens)));
    for (int32_t &n : c.ranges) n = below(30);
    c.a.prefix_ranges = c.ranges.data();
    c.a.prefix_clamp_window = below(2);
  }
}

std::string text(const Case &c, Interval keys, const TokenBounds &found) {
  std::ostringstream out;
  out << c.tokens << " tokens, keys [" << c.mask.begin << ", " << c.mask.end << "), window " << c.a.window_left << ", "
      << c.a.window_right << ", causal " << c.mask.causal << ", chunk " << c.a.attention_chunk << ", rswa "
      << c.a.rswa_window << " prefix " << c.rswa_prefix << ", tile [" << keys.begin << ", " << keys.end
      << "): visited [" << found.visited.begin << ", " << found.visited.end << "), unmasked [" << found.unmasked.begin
      << ", " << found.unmasked.end << ")";
  return out.str();
}

bool holds(Interval x, int32_t n) {
  return n >= x.begin && n < x.end;
}

// What every token keeps of the tile, beside what tokens_of_keys() says.
void compare(const Case &c, Kind kind, Interval keys) {
  const TokenBounds found = kind == window ? tokens_of_keys<false>(c.a, c.mask, keys, c.tokens)
                                           : tokens_of_keys<true>(c.a, c.mask, keys, c.tokens);
  const bool exact = kind != prefix_per_seq && kind != prefix_per_token;
  for (int32_t token = 0; token < c.tokens; ++token) {
    const RowMask row = kind == window ? row_mask<false>(c.a, c.mask, token) : row_mask<true>(c.a, c.mask, token);
    int32_t kept = 0, there = 0;
    for (int32_t key = keys.begin; key < keys.end; ++key) {
      there += key >= c.mask.begin && key < c.mask.end;
      kept += holds(row.first, key) || holds(row.second, key);
    }
    if (kept > 0) ASSERT_TRUE(holds(found.visited, token)) << token << ": " << text(c, keys, found);
    if (there == 0) continue;
    if (exact && holds(found.visited, token)) ASSERT_GT(kept, 0) << token << ": " << text(c, keys, found);
    if (holds(found.unmasked, token)) ASSERT_EQ(kept, there) << token << ": " << text(c, keys, found);
    if (exact && kept == there) ASSERT_TRUE(holds(found.unmasked, token)) << token << ": " << text(c, keys, found);
  }
}

TEST(Mask, TokensOfAKeyTileAreThoseWhoseRowsKeepIt) {
  std::mt19937 random(20261128);
  for (int32_t n = 0; n < 20000 && !testing::Test::HasFatalFailure(); ++n) {
    const auto kind = static_cast<Kind>(n % kKinds);
    Case c;
    draw(c, kind, random);
    const int32_t begin = static_cast<int32_t>(random() % 36);
    compare(c, kind, {begin, begin + 1 + static_cast<int32_t>(random() % 8)});
  }
}

// Windows of 2^30 behind the last of 2^30 keys: sums stay within their type (checked by the sanitizer presets).
TEST(Mask, TokensOfAKeyTileAtTheEndOf32Bits) {
  Case c;
  c.tokens = 1 << 30;
  c.mask = {0, 0, 1 << 30, 0, false, 0};
  c.a.window_left = c.a.window_right = 1 << 30;
  const TokenBounds all = tokens_of_keys<false>(c.a, c.mask, {(1 << 30) - 64, 1 << 30}, c.tokens);
  EXPECT_EQ(all.visited.begin, 0);
  EXPECT_EQ(all.visited.end, 1 << 30);
  EXPECT_EQ(all.unmasked.end, 1 << 30);
  c.mask.causal = true;
  const TokenBounds causal = tokens_of_keys<false>(c.a, c.mask, {(1 << 30) - 64, 1 << 30}, c.tokens);
  EXPECT_EQ(causal.visited.begin, (1 << 30) - 64);
  EXPECT_EQ(causal.unmasked.begin, (1 << 30) - 1);
}

}  // namespace
}  // namespace flashspark::emulator
