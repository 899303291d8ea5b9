#pragma once
#include "problem.hpp"

namespace flashspark::cpu {

// Attention in tiles with an online softmax (Milakov & Gimelshein, 2018; Dao et al., FlashAttention, 2022), in float on
// SIMD, on all cores. The query heads of one KV head are packed into the rows of a tile, so K and V are read once a
// group. Workspace is O(tile) a thread, never O(Tq x Tk).
void engine_forward(const Params &p);

// The SIMD target in use: "AVX2", "NEON", ...
const char *engine_target();

}  // namespace flashspark::cpu
