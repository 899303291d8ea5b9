// Products of bfloat16 on CPUs that multiply them in pairs (AVX512_BF16): words of two elements, a sum of two products
// in each lane. Twice the multiplications of packed-inl.hpp's loop for the same instructions.
#if defined(FLASHSPARK_CPU_PAIRS_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASHSPARK_CPU_PAIRS_INL_HPP_
#undef FLASHSPARK_CPU_PAIRS_INL_HPP_
#else
#define FLASHSPARK_CPU_PAIRS_INL_HPP_
#endif

#include "cpu/packed-inl.hpp"

// Highway has a target for these CPUs from 1.0.4 on; the functions here are AVX-512's with one more feature, and none
// of them runs before cpu::features() says that it is there.
#if HWY_TARGET == HWY_AVX3
HWY_PUSH_ATTRIBUTES(HWY_TARGET_STR ",avx512bf16")
namespace flashspark::cpu::HWY_NAMESPACE {

// Two elements of a column or a row, the first one in the lower half.
using Word = uint32_t;

// c[6][kPanel] (+)= factor * a[6][depth] b[depth][kPanel], with words for elements: 2 * depth elements are summed.
// kTransposed: a is [depth][6], as in multiply_strided(). Only without kAccumulate there is a factor.
template <bool kAccumulate, bool kTransposed>
HWY_NOINLINE void multiply_pairs(const Word *HWY_RESTRICT a, int64_t a_stride, const Word *HWY_RESTRICT b,
                                 int64_t b_stride, int64_t depth, float factor, float *HWY_RESTRICT c,
                                 int64_t c_stride) {
  __m512 acc[kRowGroup][kPanelVecs];
  HWY_UNROLL(kRowGroup)
  for (int r = 0; r < kRowGroup; ++r) {
    for (int v = 0; v < kPanelVecs; ++v)
      acc[r][v] = kAccumulate ? _mm512_loadu_ps(c + r * c_stride + v * kLanes) : _mm512_setzero_ps();
  }
  for (int64_t n = 0; n < depth; ++n, b += b_stride, a += kTransposed ? a_stride : 1) {
    __m512i row[kPanelVecs];
    for (int v = 0; v < kPanelVecs; ++v) row[v] = _mm512_load_si512(b + v * kLanes);
    HWY_UNROLL(kRowGroup)
    for (int r = 0; r < kRowGroup; ++r) {
      const __m512i x = _mm512_set1_epi32(static_cast<int>(kTransposed ? a[r] : a[r * a_stride]));
      for (int v = 0; v < kPanelVecs; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], (__m512bh)x, (__m512bh)row[v]);
    }
  }
  const __m512 vfactor = _mm512_set1_ps(factor);
  HWY_UNROLL(kRowGroup)
  for (int r = 0; r < kRowGroup; ++r) {
    for (int v = 0; v < kPanelVecs; ++v) {
      const __m512 sum = kAccumulate ? acc[r][v] : _mm512_mul_ps(acc[r][v], vfactor);
      _mm512_storeu_ps(c + r * c_stride + v * kLanes, sum);
    }
  }
}

// Dot products of kRowGroup pairs of rows of `words`, each summed in the order of multiply_pairs().
HWY_NOINLINE inline void dot_pairs(const void *const *a, const void *const *b, int64_t words, float *dots) {
  __m128 sums[kRowGroup];
  HWY_UNROLL(kRowGroup)
  for (int r = 0; r < kRowGroup; ++r) sums[r] = _mm_setzero_ps();
  for (int64_t n = 0; n < words; ++n) {
    HWY_UNROLL(kRowGroup)
    for (int r = 0; r < kRowGroup; ++r) {
      const __m128i x = _mm_loadu_si32(static_cast<const char *>(a[r]) + n * static_cast<int64_t>(sizeof(Word)));
      const __m128i y = _mm_loadu_si32(static_cast<const char *>(b[r]) + n * static_cast<int64_t>(sizeof(Word)));
      sums[r] = _mm_dpbf16_ps(sums[r], (__m128bh)x, (__m128bh)y);
    }
  }
  for (int r = 0; r < kRowGroup; ++r) dots[r] = _mm_cvtss_f32(sums[r]);
}

// Two rows of `count` floats, whole vectors, become bfloat16: `across` has words of both, and may be the first row's
// memory; `along` NULL, or one row after the other.
HWY_NOINLINE inline void narrow_two_rows(const float *first, const float *second, int64_t count, Word *across,
                                         Word *along, int64_t along_pitch) {
  for (int64_t n = 0; n < count; n += kLanes) {
    const __m512 x = _mm512_loadu_ps(first + n), y = _mm512_loadu_ps(second + n);
    const __m256i low = (__m256i)_mm512_cvtneps_pbh(x), high = (__m256i)_mm512_cvtneps_pbh(y);
    _mm512_storeu_si512(
        across + n, _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16)));
    if (along == nullptr) continue;
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(along + n / 2), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(along + along_pitch + n / 2), high);
  }
}

}  // namespace flashspark::cpu::HWY_NAMESPACE
HWY_POP_ATTRIBUTES
#endif  // HWY_TARGET == HWY_AVX3
#endif
