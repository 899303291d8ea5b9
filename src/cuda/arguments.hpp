// A problem as the kernels take it: its fields in their types, and what they cannot take.
#pragma once

#include <cstdint>
#include <string>

#include "forward/arguments.hpp"
#include "forward/config.hpp"
#include "problem.hpp"

namespace flashspark::cuda {

// Rows and keys are counted in 32 bits on the device. Windows that reach further than any sequence are open.
inline constexpr int64_t kMaxTokens = int64_t{1} << 30;

// Neighbouring rows of a tile that look up one page (TileLoader).
inline constexpr int64_t kGroupRows = 16;

// Whether k and v are e4m3, which the kernels turn into fp16.
bool dequantizes_kv(const Params &p);

struct Sizes {
  int64_t group, rows, units, tokens;  // rows: packed rows of the longest sequence; tokens: rows of all sequences
};
Sizes sizes_of(const Params &p);

// Bytes of K and V that `keys` keys of one head are.
int64_t kv_bytes(const Params &p, int64_t keys);

// Rows of k that there are: of all sequences with cu_seqlens_k, else of each.
int64_t key_rows(const Params &p);

// Fields of the interface as the kernels take them.
DType dtype_of(int32_t dtype);
Strides strides_of(const flashspark_tensor &t);
Scale scale_of(const flashspark_scale &s);

// Exact for every n < 2^31; 1 <= d <= 2^30.
Divisor make_divisor(uint32_t d);

// Everything but what a plan decides (tiles, splits, places of partial results).
ForwardArguments arguments_of(const Params &p, const Sizes &sizes, ScoreMod score_mod);

// What the kernels lack for this problem, in words; empty if nothing.
std::string unsupported(const Params &p);

}  // namespace flashspark::cuda
