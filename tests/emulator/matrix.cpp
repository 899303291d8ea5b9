#include "matrix.hpp"

#include <bit>
#include <cstring>

namespace flashspark::emulator {

namespace {

template <bool bfloat16>
float to_float(uint32_t bits) {
  if constexpr (bfloat16) return std::bit_cast<float>(bits << 16);
  const uint32_t sign = (bits & 0x8000) << 16;
  const uint32_t magnitude = bits & 0x7fff;
  const uint32_t special = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
  const uint32_t number = sign | std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude << 13) * 0x1p112f);
  return std::bit_cast<float>(magnitude >= 0x7c00 ? special : number);
}

template <bool bfloat16>
void multiply_fragments(Registers *const (&lane)[32], const SumOrder &order) {
  float a[16][16];
  float b[16][8];
  float d[16][8];
  for (uint32_t l = 0; l < 32; l++) {
    const uint32_t row = l / 4;
    const uint32_t pair = 2 * (l % 4);
    const uint32_t *in = lane[l]->in;
    for (uint32_t half = 0; half < 2; half++) {
      const uint32_t shift = 16 * half;
      a[row][pair + half] = to_float<bfloat16>(in[0] >> shift & 0xffff);
      a[row + 8][pair + half] = to_float<bfloat16>(in[1] >> shift & 0xffff);
      a[row][pair + 8 + half] = to_float<bfloat16>(in[2] >> shift & 0xffff);
      a[row + 8][pair + 8 + half] = to_float<bfloat16>(in[3] >> shift & 0xffff);
      b[pair + half][row] = to_float<bfloat16>(in[4] >> shift & 0xffff);
      b[pair + 8 + half][row] = to_float<bfloat16>(in[5] >> shift & 0xffff);
      d[row][pair + half] = std::bit_cast<float>(in[6 + half]);
      d[row + 8][pair + half] = std::bit_cast<float>(in[8 + half]);
    }
  }
  for (uint32_t first = 0; first < 16; first += order.chunk) {
    for (uint32_t row = 0; row < 16; row++) {
      float sum[8] = {};
      for (uint32_t i = first; i < first + order.chunk; i++) {
        const uint32_t k = order.column[i];
        // The product of two 16-bit floats is exact in fp32, so fusing it with the addition changes nothing.
        for (uint32_t column = 0; column < 8; column++) sum[column] += a[row][k] * b[k][column];
      }
      for (uint32_t column = 0; column < 8; column++) d[row][column] += sum[column];
    }
  }
  for (uint32_t l = 0; l < 32; l++) {
    const uint32_t row = l / 4;
    const uint32_t pair = 2 * (l % 4);
    std::memcpy(lane[l]->out, &d[row][pair], 8);
    std::memcpy(lane[l]->out + 2, &d[row + 8][pair], 8);
  }
}

}  // namespace

SumOrder::SumOrder(Random &random) {
  for (uint32_t i = 0; i < 16; i++) column[i] = i;
  random.shuffle(column);
  constexpr uint32_t chunks[] = {1, 4, 8, 16};
  chunk = chunks[random.below(4)];
}

void multiply_fragments(Registers *const (&lane)[32], bool bfloat16, const SumOrder &order) {
  if (bfloat16) {
    multiply_fragments<true>(lane, order);
  } else {
    multiply_fragments<false>(lane, order);
  }
}

void load_fragments(Registers *const (&lane)[32], const uint16_t *const (&row)[32], bool transposed) {
  for (uint32_t l = 0; l < 32; l++) {
    for (uint32_t m = 0; m < 4; m++) {
      const uint16_t *const *matrix = row + 8 * m;
      const uint32_t major = l / 4;
      const uint32_t pair = 2 * (l % 4);
      const uint32_t low = transposed ? matrix[pair][major] : matrix[major][pair];
      const uint32_t high = transposed ? matrix[pair + 1][major] : matrix[major][pair + 1];
      lane[l]->out[m] = low | high << 16;
    }
  }
}

}  // namespace flashspark::emulator
