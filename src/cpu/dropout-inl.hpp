// Dropout: sets weights to zero after the softmax has added them to the rows' sums. Which ones, docs/design/dropout.md
// defines; one vector of Philox counters gives the draws of sixteen weights a lane.
#if defined(FLASHSPARK_CPU_DROPOUT_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASHSPARK_CPU_DROPOUT_INL_HPP_
#undef FLASHSPARK_CPU_DROPOUT_INL_HPP_
#else
#define FLASHSPARK_CPU_DROPOUT_INL_HPP_
#endif

#include "cpu/simd-inl.hpp"
#include "cpu/tile.hpp"

HWY_BEFORE_NAMESPACE();
namespace flashspark::cpu::HWY_NAMESPACE {

using DrawTag = hn::ScalableTag<uint32_t>;
using DrawVec = hn::Vec<DrawTag>;
constexpr int kDraws = HWY_MAX_BYTES / sizeof(uint32_t);  // counters in a vector

// Four counters give the draws of so many keys, which begin at a multiple of their number.
constexpr int64_t kKeyBlock = 64;
constexpr uint32_t kOneDraw = (1u << kDropoutBits) - 1, kTwoDraws = kOneDraw << 16 | kOneDraw;

HWY_INLINE DrawVec upper_halves(DrawVec x) {
  const hn::Repartition<uint64_t, DrawTag> d64;
  return hn::BitCast(DrawTag(), hn::ShiftRight<32>(hn::BitCast(d64, x)));
}

// One round of Philox. Even lanes count; what the odd ones hold never reaches them: MulEven() does not look at it.
HWY_INLINE void philox_round(DrawVec (&c)[4], DrawVec key_low, DrawVec key_high) {
  const DrawTag d;
  const auto first = hn::BitCast(d, hn::MulEven(c[0], hn::Set(d, 0xD2511F53u)));
  const auto second = hn::BitCast(d, hn::MulEven(c[2], hn::Set(d, 0xCD9E8D57u)));
  c[0] = hn::Xor3(upper_halves(second), c[1], key_low);
  c[2] = hn::Xor3(upper_halves(first), c[3], key_high);
  c[1] = second;
  c[3] = first;
}

// philox() of src/dropout.hpp for a vector of counters (c0, c1, c2, c3). Stores word n of all of them at words[n]. A
// product is twice as wide as its factors, so even and odd lanes go separate ways until the end.
HWY_INLINE void draw(PhiloxKey key, DrawVec c0, DrawVec c1, DrawVec c2, DrawVec c3, uint32_t (*words)[kDraws]) {
  const DrawTag d;
  const hn::Repartition<uint64_t, DrawTag> d64;
  DrawVec even[4] = {c0, c1, c2, c3};
  DrawVec odd[4] = {upper_halves(c0), upper_halves(c1), upper_halves(c2), upper_halves(c3)};
  HWY_UNROLL(10)
  for (int round = 0; round < 10; ++round) {
    const auto low = hn::Set(d, key.low), high = hn::Set(d, key.high);
    philox_round(even, low, high);
    philox_round(odd, low, high);
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
  HWY_UNROLL(4)
  for (int n = 0; n < 4; ++n) {
    const auto moved = hn::BitCast(d, hn::ShiftLeft<32>(hn::BitCast(d64, odd[n])));
    hn::Store(hn::OddEven(moved, even[n]), d, words[n]);
  }
}

// The draws of row r's keys first, first + 1, .. as whole vectors of counters, up to `end`. Lanes are counters: 128
// bits of a word are then those of eight keys, in order, and turned by 8, those of the next eight.
HWY_INLINE void draw_row(const Tile &t, int64_t r, int64_t first, int64_t end, uint16_t *draws) {
  const DrawTag d;
  const hn::FixedTag<uint32_t, 4> d4;
  const hn::FixedTag<uint16_t, 8> d8;
  HWY_ALIGN uint32_t words[4][kDraws];
  const auto i = hn::Set(d, static_cast<uint32_t>(t.token(r))), h = hn::Set(d, static_cast<uint32_t>(t.head(r))),
             b = hn::Set(d, static_cast<uint32_t>(t.s.index));
  const auto fifteen = hn::Set(d4, kTwoDraws);
  for (int64_t j = first; j < end; j += 16 * kDraws, draws += 16 * kDraws) {
    draw(t.dropout.key, hn::Iota(d, static_cast<uint32_t>(j / 16)), i, h, b, words);
    for (int64_t m = 0; m < kDraws / 4; ++m) {
      for (int64_t n = 0; n < 4; ++n) {
        const auto word = hn::Load(d4, words[n] + 4 * m);
        uint16_t *to = draws + m * kKeyBlock + 16 * n;
        hn::Store(hn::BitCast(d8, hn::And(word, fifteen)), d8, to);
        hn::Store(hn::BitCast(d8, hn::And(hn::RotateRight<8>(word), fifteen)), d8, to + 8);
      }
    }
  }
}

// Which of as many draws drop.
template <class DI, class VI = hn::Vec<DI>>
HWY_INLINE hn::Mask<DI> dropped_by(DI d, DropoutLimit limit, VI draws) {
  const auto below = hn::Lt(draws, hn::Set(d, static_cast<int32_t>(limit.limit)));
  return limit.keeps ? hn::Not(below) : below;
}

// The weights of a row group, whose first row is `row`, for keys [key, key + count), which are whole vectors. Row after
// row lies kPitch, the largest count, further on. All rows are drawn first: a load of what was just stored in other
// pieces waits.
template <int64_t kPitch>
HWY_NOINLINE HWY_ATTR void drop_row_group(const Tile &t, int64_t row, int64_t key, int64_t count, float *weights) {
  // The first key is less than kKeyBlock behind the first draw, and the last one in a whole vector of counters.
  constexpr int64_t kMost = kPitch + kKeyBlock + 16 * kDraws;
  HWY_ALIGN uint16_t draws[kRowGroup][kMost];
  const int64_t rows = t.rows - row < kRowGroup ? t.rows - row : kRowGroup;
  const int64_t from = t.leftpad + key, first = from / kKeyBlock * kKeyBlock;
  for (int64_t r = 0; r < rows; ++r) draw_row(t, row + r, first, from + count, draws[r]);
  const hn::ScalableTag<float> df;
  const hn::ScalableTag<int32_t> di;
  const hn::Rebind<uint16_t, decltype(di)> d16;
  for (int64_t r = 0; r < rows; ++r, weights += kPitch) {
    for (int64_t n = 0; n < count; n += kDraws) {
      const auto dropped =
          dropped_by(di, t.dropout.limit, hn::PromoteTo(di, hn::LoadU(d16, draws[r] + (from - first) + n)));
      hn::StoreU(hn::IfThenZeroElse(hn::RebindMask(df, dropped), hn::LoadU(df, weights + n)), df, weights + n);
    }
  }
}

// Weights (keys, 4) of rows first .. first + 3 for keys [key, key + count); those past count, up to a whole vector, are
// never used. Lanes are rows, four of each counter: a draw of a word is then that of four rows for one key.
inline HWY_NOINLINE HWY_ATTR void drop_four_rows(const Tile &t, int64_t first_row, int64_t key, int64_t count,
                                                 float *weights) {
  const DrawTag d;
  const hn::FixedTag<uint32_t, 4> d4;
  constexpr int64_t kCountersAtOnce = kDraws / 4;  // of each row
  HWY_ALIGN uint32_t words[4][kDraws], token[4], head[4];
  HWY_ALIGN uint32_t draws[(kBlockKeys + 2 * kKeyBlock) * 4];  // (keys, 4): whole blocks of keys, and a part of two
  for (int64_t n = 0; n < 4; ++n) {
    const int64_t r = first_row + n < t.rows ? first_row + n : t.rows - 1;
    token[n] = static_cast<uint32_t>(t.token(r));
    head[n] = static_cast<uint32_t>(t.head(r));
  }
  const int64_t from = t.leftpad + key, first = from / kKeyBlock * kKeyBlock;
  const int64_t padded = (4 * count + kDraws - 1) / kDraws * kDraws;
  const auto i = hn::LoadDup128(d, token), h = hn::LoadDup128(d, head),
             b = hn::Set(d, static_cast<uint32_t>(t.s.index));
  const auto one = hn::Set(d4, kOneDraw);
  for (int64_t j = first; j < from + padded / 4; j += kKeyBlock) {
    for (int64_t c = 0; c < 4; c += kCountersAtOnce) {
      const auto counters = hn::Add(hn::ShiftRight<2>(hn::Iota(d, 0)), hn::Set(d, static_cast<uint32_t>(j / 16 + c)));
      draw(t.dropout.key, counters, i, h, b, words);
      for (int64_t m = 0; m < kCountersAtOnce; ++m) {
        for (int64_t n = 0; n < 4; ++n) {
          uint32_t *to = draws + ((j - first) + 16 * n + 2 * (c + m)) * 4;
          const auto word = hn::Load(d4, words[n] + 4 * m);
          hn::Store(hn::And(word, one), d4, to);
          hn::Store(hn::And(hn::RotateRight<16>(word), one), d4, to + 4);
          hn::Store(hn::And(hn::RotateRight<8>(word), one), d4, to + 32);
          hn::Store(hn::And(hn::RotateRight<24>(word), one), d4, to + 36);
        }
      }
    }
  }
  const hn::ScalableTag<float> df;
  const hn::ScalableTag<int32_t> di;
  for (int64_t n = 0; n < padded; n += kDraws) {
    const auto drawn = hn::BitCast(di, hn::LoadU(d, draws + (from - first) * 4 + n));
    const auto dropped = dropped_by(di, t.dropout.limit, drawn);
    hn::StoreU(hn::IfThenZeroElse(hn::RebindMask(df, dropped), hn::LoadU(df, weights + n)), df, weights + n);
  }
}

}  // namespace flashspark::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
