// Dropout: which probabilities become zero. docs/design/dropout.md defines it; src/dropout.hpp says it in its simplest
// form. A lane draws for sixteen scores of a row that it holds at once, and for nobody else's.
//
// In the first two of Philox's ten rounds the key does not meet the row: what only one of them decides is computed once
// for each row of the tile, and lies in shared memory, or once for each key and is shared by the lane's rows.
#pragma once

#include "attention/dropout.hpp"
#include "common/math.cuh"
#include "ptx/ptx.cuh"

namespace flashspark {

constexpr uint32_t kPhiloxFirst = 0xD2511F53u, kPhiloxSecond = 0xCD9E8D57u;
constexpr uint32_t kPhiloxLowStep = 0x9E3779B9u, kPhiloxHighStep = 0xBB67AE85u;
constexpr int32_t kPhiloxRounds = 10;
constexpr int32_t kDropoutKeys = 64;  // keys of which a lane's sixteen are drawn at once

struct PhiloxKey {
  uint32_t low, high;
};
struct PhiloxWords {
  uint32_t at[4];
};
struct WideProduct {
  uint32_t low, high;
};

FLASHSPARK_DEVICE WideProduct multiply_wide(uint32_t a, uint32_t b) {
  const uint64_t product = static_cast<uint64_t>(a) * b;
  return {static_cast<uint32_t>(product), static_cast<uint32_t>(product >> 32)};
}

FLASHSPARK_DEVICE PhiloxWords philox_round(PhiloxKey key, const PhiloxWords &c, int32_t round) {
  const WideProduct first = multiply_wide(kPhiloxFirst, c.at[0]), second = multiply_wide(kPhiloxSecond, c.at[2]);
  return {second.high ^ c.at[1] ^ (key.low + static_cast<uint32_t>(round) * kPhiloxLowStep), second.low,
          first.high ^ c.at[3] ^ (key.high + static_cast<uint32_t>(round) * kPhiloxHighStep), first.low};
}
// Rounds [first_round, 10) of Philox4x32.
template <int32_t first_round>
FLASHSPARK_DEVICE PhiloxWords philox_rounds(PhiloxKey key, PhiloxWords c) {
  FLASHSPARK_UNROLL
  for (int32_t round = first_round; round < kPhiloxRounds; ++round) c = philox_round(key, c, round);
  return c;
}

// The key of the call's draws, which all threads of a warp compute alike.
FLASHSPARK_DEVICE PhiloxKey dropout_key(const DropoutArguments &a) {
  const uint64_t seed = a.state != nullptr ? a.state[0] : a.seed;
  const uint64_t offset = a.state != nullptr ? a.state[1] : a.offset;
  const PhiloxWords drawn =
      philox_rounds<0>({static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
                       {static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32), 0, 0});
  const auto uniform = [](uint32_t x) { return static_cast<uint32_t>(ptx::uniform(static_cast<int32_t>(x))); };
  return {uniform(drawn.at[0]), uniform(drawn.at[1])};
}

// What the row decides in the first two rounds.
constexpr int32_t kPhiloxRowWords = 3;
FLASHSPARK_DEVICE void dropout_row(PhiloxKey key, int32_t head, int32_t q_idx, uint32_t *words) {
  const WideProduct of_head = multiply_wide(kPhiloxSecond, static_cast<uint32_t>(head));
  const WideProduct of_row = multiply_wide(kPhiloxFirst, of_head.high ^ static_cast<uint32_t>(q_idx) ^ key.low);
  words[0] = of_head.low ^ (key.low + kPhiloxLowStep);
  words[1] = of_row.high ^ (key.high + kPhiloxHighStep);
  words[2] = of_row.low;
}
// The same before the row's product: two words instead of three, which one load brings.
struct DropoutRow {
  uint32_t head, row;
};
FLASHSPARK_DEVICE DropoutRow dropout_row(PhiloxKey key, int32_t head, int32_t q_idx) {
  const WideProduct of_head = multiply_wide(kPhiloxSecond, static_cast<uint32_t>(head));
  return {of_head.low ^ (key.low + kPhiloxLowStep), of_head.high ^ static_cast<uint32_t>(q_idx) ^ key.low};
}

// What the keys and the sequence decide in the first two rounds.
struct DropoutKeys {
  uint32_t high, low, draw;
};
FLASHSPARK_DEVICE DropoutKeys dropout_keys(PhiloxKey key, int32_t seq, int32_t draw) {
  const WideProduct of_draw = multiply_wide(kPhiloxFirst, static_cast<uint32_t>(draw));
  const WideProduct of_keys = multiply_wide(kPhiloxSecond, of_draw.high ^ static_cast<uint32_t>(seq) ^ key.high);
  return {of_keys.high, of_keys.low, of_draw.low};
}

// The draws of one row, as rounds 2 to 9 make them. Word n is for the lane's keys of the n-th group of sixteen.
constexpr int32_t kFirstDropoutRound = 2;
FLASHSPARK_DEVICE PhiloxWords begin_dropout_draws(const DropoutKeys &keys, const uint32_t (&row)[kPhiloxRowWords + 1]) {
  return {keys.high ^ row[0], keys.low, row[1] ^ keys.draw, row[2]};
}
FLASHSPARK_DEVICE PhiloxWords begin_dropout_draws(PhiloxKey key, const DropoutKeys &keys, const DropoutRow &row) {
  const WideProduct of_row = multiply_wide(kPhiloxFirst, row.row);
  return {keys.high ^ row.head, keys.low, of_row.high ^ (key.high + kPhiloxHighStep) ^ keys.draw, of_row.low};
}
FLASHSPARK_DEVICE PhiloxWords dropout_draws(PhiloxKey key, const DropoutKeys &keys,
                                            const uint32_t (&row)[kPhiloxRowWords + 1]) {
  return philox_rounds<kFirstDropoutRound>(key, begin_dropout_draws(keys, row));
}

struct NoDropout {
  FLASHSPARK_DEVICE uint32_t kept(int32_t, int32_t) const { return ~0u; }
};

// The dropping of a lane's probabilities in a subtile of kScoreKeys keys. They are asked for in the order of the keys.
template <class T>
struct Dropout {
  static_assert(T::kScoreKeys <= kDropoutKeys);

  PhiloxKey key;
  int32_t seq;
  uint32_t limit, flip;     // of DropoutArguments
  ptx::SharedAddress rows;  // what is kept of the warp's first row, that of its others behind it
  int32_t first_key;        // a multiple of kScoreKeys
  PhiloxWords draws[T::kLaneRows];

  // Row n of the lane. Of a subtile of fewer than kDropoutKeys keys, its first 16 come to the first word.
  FLASHSPARK_DEVICE void draw(int32_t n) {
    uint32_t row[2];
    ptx::load_shared_8(row, rows + (n / 2 * 16 + n % 2 * 8 + ptx::lane() / 4) * 8);
    const int32_t first_draw = first_key / kDropoutKeys * (kDropoutKeys / 16);
    const DropoutKeys keys = dropout_keys(key, seq, first_draw + ptx::lane() % 4);
    draws[n] = philox_rounds<kFirstDropoutRound>(key, begin_dropout_draws(key, keys, {row[0], row[1]}));
    if constexpr (T::kScoreKeys <= 32) {
      if (first_key % 64 >= 32) draws[n].at[0] = draws[n].at[2], draws[n].at[1] = draws[n].at[3];
    }
    if constexpr (T::kScoreKeys <= 16) {
      if (first_key % 32 >= 16) draws[n].at[0] = draws[n].at[1];
    }
  }

  // Of the lane's two keys in group `octet` of eight, of its row n: all bits of a half of the result are 1 if it is
  // kept. A limit is at most 2^14, and a draw of 15 bits compares with it as a float of 16 bits does, without its sign.
  FLASHSPARK_DEVICE uint32_t kept(int32_t n, int32_t octet) {
    if (octet == 0) draw(n);
    const uint32_t word = draws[n].at[octet / 2];
    return ptx::magnitude_not_less_f16x2(octet % 2 == 0 ? word : ptx::permute_bytes(word, 0x0321), limit) ^ flip;
  }
};

}  // namespace flashspark
