// From global to shared memory: tiles of K and V (contiguous or through a page table), and the queries of a block.
#pragma once

#include <type_traits>

#include "forward/mask.cuh"
#include "forward/traits.cuh"

namespace flashspark {

// Copies tiles of K and V. A whole tile (all its keys are read and all columns exist) takes few instructions beside the
// copies themselves; others take a slow path that looks at every key.
template <class T>
struct TileLoader {
  using ElementKV = typename T::ElementKV;
  static constexpr int32_t kChunkElements = 16 / sizeof(ElementKV);
  // Rows of a tile lie on aligned groups of 16, and a page holds a multiple of 16: a thread's rows of one pass, or of
  // kGroupPasses passes of a warp for itself, share a page with their group.
  static constexpr int32_t kGroupRows = 16;
  static constexpr int32_t kGroupPasses = T::kWarpPrivateKV ? kGroupRows / T::kPassRows : 1;
  static constexpr int32_t kGroups = T::kPasses / kGroupPasses;  // of a thread, in a tile
  static_assert(T::kPassRows * kGroupPasses % kGroupRows == 0 && T::kCopyRows % kGroupRows == 0);

  const ForwardArguments &a;
  const ElementKV *k, *v;  // of this KV head, at this thread's first chunk of its row of tile 0 (or of page row 0)
  const int32_t *pages;    // NULL: contiguous
  Interval visited[2];
  uint32_t smem_offset;  // of this thread in a tile of K
  int32_t group_row;     // of its group of rows in a pass
  // Page numbers of the next whole tile: read one tile ahead, since their latency would else stand before every copy.
  int32_t page[kGroups];

  // This thread's row of the first pass, in the tile, and its first chunk of 16 bytes.
  static FLASHSPARK_DEVICE int32_t row() {
    const uint32_t thread = ptx::thread_index();
    if constexpr (T::kWarpPrivateKV)
      return static_cast<int32_t>(thread / 32 * T::kCopyRows + thread % 32 / T::kRowThreads);
    return static_cast<int32_t>(thread / T::kRowThreads);
  }
  static FLASHSPARK_DEVICE int32_t chunk() { return static_cast<int32_t>(ptx::thread_index() % T::kRowThreads); }
  // Columns of K or V that this block reads.
  template <bool values>
  FLASHSPARK_DEVICE int32_t columns() const {
    return values ? a.head_dim_v - static_cast<int32_t>(ptx::cta_z()) * T::kHeadDimV : a.head_dim;
  }

  // Whether a page holds whole groups of rows. Other pages are for kind with a score modification: every row of a tile
  // looks up its own, which the others' loops have no registers for.
  FLASHSPARK_DEVICE bool whole_pages() const { return !T::kHasScoreMod || a.page_size.value % kGroupRows == 0; }

  FLASHSPARK_DEVICE bool reads(int32_t key) const {
    const bool in_first = key >= visited[0].begin && key < visited[0].end;
    if constexpr (T::kHasScoreMod) return in_first || (key >= visited[1].begin && key < visited[1].end);
    return in_first;
  }
  FLASHSPARK_DEVICE bool reads_all(int32_t tile) const {
    const int32_t begin = tile * T::kKeys, end = begin + T::kKeys;
    bool all = begin >= visited[0].begin && end <= visited[0].end;
    if constexpr (T::kHasScoreMod) all = all || (begin >= visited[1].begin && end <= visited[1].end);
    return all && whole_pages();
  }

  // The same for all lanes: a warp's rows of a pass are at most 16. Said to the compiler, it works addresses out in the
  // uniform units, and a page costs a lane one addition.
  FLASHSPARK_DEVICE int32_t group(int32_t tile, int32_t n) const {
    return tile * T::kKeys + n * kGroupPasses * T::kPassRows + group_row;
  }
  // A page that there is, whatever the table says. Asked where the number is used: where it is read nobody waits for
  // it.
  FLASHSPARK_DEVICE int32_t clamped_page(int32_t number) const {
    return static_cast<int32_t>(min_of(static_cast<uint32_t>(number), static_cast<uint32_t>(a.last_page)));
  }
  FLASHSPARK_DEVICE void look_up(int32_t tile) {
    if (reads_all(tile)) look_up_whole(tile);
  }
  FLASHSPARK_DEVICE void look_up_whole(int32_t tile) {
    if (pages == nullptr) return;
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < kGroups; ++n) page[n] = pages[divide(group(tile, n), a.page_size).quotient];
  }

  // Tiles [begin, end) are whole: all their keys are read and all columns exist.
  FLASHSPARK_DEVICE Interval whole_tiles() const {
    if (columns<false>() < T::kHeadDim || columns<true>() < T::kHeadDimV || !whole_pages()) return {0, 0};
    return {ceil_div(visited[0].begin, T::kKeys), visited[0].end / T::kKeys};
  }

  // Copies a tile; if it is whole, its pages were looked up last.
  template <bool values>
  FLASHSPARK_DEVICE void copy(int32_t tile, ptx::SharedAddress stage) const {
    if (!reads_all(tile) || columns<values>() < (values ? T::kHeadDimV : T::kHeadDim)) {
      copy_checked<values>(tile, target<values>(stage));
    } else {
      copy_whole<values>(tile, from_tile<values>(tile), stage);
    }
  }
  // A whole tile; `from` is from_tile(tile), or k and v after step().
  template <bool values>
  FLASHSPARK_DEVICE void copy_whole(int32_t tile, const ElementKV *from, ptx::SharedAddress stage) const {
    const Strides &strides = values ? a.v_strides : a.k_strides;
    const ptx::SharedAddress to = target<values>(stage);
    if (pages != nullptr) {
      FLASHSPARK_UNROLL
      for (int32_t n = 0; n < kGroups; ++n) {
        const PageSteps &steps = values ? a.v_pages : a.k_pages;
        const int32_t slot = divide(group(tile, n), a.page_size).remainder;
        const int64_t offset =
            static_cast<int64_t>(clamped_page(page[n]) * steps.page + slot * steps.slot) * steps.unit;
        from = reinterpret_cast<const ElementKV *>(reinterpret_cast<const char *>(values ? v : k) + offset);
        FLASHSPARK_UNROLL
        for (int32_t pass = 0; pass < kGroupPasses; ++pass, from += T::kPassRows * strides.token)
          copy_row<values>(to, n * kGroupPasses + pass, from);
      }
    } else {
      FLASHSPARK_UNROLL
      for (int32_t pass = 0; pass < T::kPasses; ++pass, from += T::kPassRows * strides.token)
        copy_row<values>(to, pass, from);
    }
  }
  template <bool values>
  FLASHSPARK_DEVICE const ElementKV *from_tile(int32_t tile) const {
    return (values ? v : k) + tile * (T::kKeys * (values ? a.v_strides.token : a.k_strides.token));
  }

  // Moves k and v on by so many tiles of contiguous keys; pages are counted from where they began. Pointers of their
  // own for the loops over plain tiles would take registers that the inner loop needs (share of the tensor pipe by the
  // model: 71% instead of 83% at D128).
  FLASHSPARK_DEVICE void step(int32_t tiles) {
    if (pages != nullptr) return;
    k += tiles * (T::kKeys * a.k_strides.token);
    v += tiles * (T::kKeys * a.v_strides.token);
  }

 private:
  // Copies of this thread in a row, and whether there is something for the n-th: rows may end with chunks that nobody
  // reads.
  template <bool values>
  using LayoutOf = std::conditional_t<values, typename T::ValueLayout, typename T::KeyLayout>;
  template <bool values>
  static constexpr int32_t kLoads = LayoutOf<values>::kChunks / T::kRowThreads;
  template <bool values>
  static FLASHSPARK_DEVICE bool exists(int32_t n) {
    constexpr int32_t kChunks = (values ? T::kHeadDimV : T::kHeadDim) / kChunkElements;
    return kChunks % T::kRowThreads == 0 || chunk() + n * T::kRowThreads < kChunks;
  }
  // From the place of a pass's first copy in a row to that of the n-th.
  template <bool values>
  static FLASHSPARK_DEVICE ptx::SharedAddress chunk_offset(ptx::SharedAddress to, int32_t n) {
    return LayoutOf<values>::step(to, n * T::kRowThreads);
  }

  // K and V of one width lie alike.
  template <bool values>
  FLASHSPARK_DEVICE ptx::SharedAddress target(ptx::SharedAddress stage) const {
    if constexpr (!values) return stage + smem_offset;
    if constexpr (T::kHeadDim == T::kHeadDimV) return stage + T::kKeyBytes + smem_offset;
    return stage + T::kKeyBytes + T::ValueLayout::offset(row(), chunk());
  }

  template <bool values>
  static FLASHSPARK_DEVICE void copy_row(ptx::SharedAddress to, int32_t pass, const ElementKV *from) {
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < kLoads<values>; ++n) {
      if (exists<values>(n))
        ptx::cp_async_16(LayoutOf<values>::down(chunk_offset<values>(to, n), pass * T::kPassRows),
                         from + n * T::kRowThreads * kChunkElements);
    }
  }

  // Keys outside the hulls, and columns past the head, become 0: a probability of 0 times garbage might be NaN.
  template <bool values>
  FLASHSPARK_DEVICE void copy_checked(int32_t tile, ptx::SharedAddress to) const {
    const Strides &strides = values ? a.v_strides : a.k_strides;
    const ElementKV *base = values ? v : k;
    FLASHSPARK_NO_UNROLL
    for (int32_t pass = 0; pass < T::kPasses; ++pass, to = LayoutOf<values>::down(to, T::kPassRows)) {
      const int32_t first = tile * T::kKeys + pass * T::kPassRows;
      const bool reads_key = reads(first + row());
      const ElementKV *from = base;
      if (reads_key && pages != nullptr) {
        // base is at the row's place in its group
        const Quotient at = divide(whole_pages() ? group(tile, pass / kGroupPasses) : first + row(), a.page_size);
        const int32_t behind = whole_pages() ? pass % kGroupPasses * T::kPassRows : -(row() % kGroupRows);
        from += clamped_page(pages[at.quotient]) * strides.batch + (at.remainder + behind) * strides.token;
      } else if (reads_key) {
        from += first * strides.token;
      }
      FLASHSPARK_UNROLL
      for (int32_t n = 0; n < kLoads<values>; ++n) {
        if (!exists<values>(n)) continue;
        const bool valid = reads_key && (chunk() + n * T::kRowThreads) * kChunkElements < columns<values>();
        ptx::cp_async_16_or_zero(chunk_offset<values>(to, n), valid ? from + n * T::kRowThreads * kChunkElements : base,
                                 valid);
      }
    }
  }
};

template <class T>
FLASHSPARK_DEVICE TileLoader<T> make_loader(const ForwardArguments &a, const RowTile &row_tile, const Keys &keys,
                                            const KeyBounds &bounds) {
  constexpr int32_t kElements = TileLoader<T>::kChunkElements;
  const int32_t row = TileLoader<T>::row(), chunk = TileLoader<T>::chunk();
  const int32_t first_column = static_cast<int32_t>(ptx::cta_z()) * T::kHeadDimV;
  TileLoader<T> loader{
      a,
      static_cast<const typename T::ElementKV *>(a.k) + row_tile.head_kv * a.k_strides.head + chunk * kElements,
      static_cast<const typename T::ElementKV *>(a.v) + row_tile.head_kv * a.v_strides.head + first_column +
          chunk * kElements,
      keys.pages,
      {bounds.visited[0], bounds.visited[1]},
      T::KeyLayout::offset(row, chunk),
      T::kWarpPrivateKV || T::kPassRows > TileLoader<T>::kGroupRows
          ? ptx::uniform(row / TileLoader<T>::kGroupRows * TileLoader<T>::kGroupRows)
          : 0,
      {}};
  if (keys.pages != nullptr) {
    loader.k += row % TileLoader<T>::kGroupRows * a.k_strides.token;
    loader.v += row % TileLoader<T>::kGroupRows * a.v_strides.token;
  } else {
    const int64_t batch = a.cu_seqlens_k != nullptr ? 0 : keys.batch;
    loader.k += batch * a.k_strides.batch + (keys.row + row) * a.k_strides.token;
    loader.v += batch * a.v_strides.batch + (keys.row + row) * a.v_strides.token;
  }
  return loader;
}

// Eight queries' numbers as fp16. What lies beyond fp16's range, as bf16 can, becomes its largest number: the softmax
// of such scores is as sharp either way.
FLASHSPARK_DEVICE ptx::Vector16 load_queries_as_f16(const void *q, int64_t offset, DType dtype) {
  ptx::Vector16 y;
  if (dtype == DType::e4m3) {
    const auto *words = reinterpret_cast<const uint32_t *>(static_cast<const ptx::E4m3 *>(q) + offset);
    FLASHSPARK_UNROLL
    for (int32_t i = 0; i < 2; ++i) ptx::convert_e4m3x4_to_f16x4(y.word[2 * i], y.word[2 * i + 1], words[i]);
    return y;
  }
  y = *reinterpret_cast<const ptx::Vector16 *>(static_cast<const ptx::Float16 *>(q) + offset);
  if (dtype == DType::float16) return y;
  const auto dtype_of = [](uint32_t bits) { return ptx::to_float(ptx::Bfloat16{static_cast<uint16_t>(bits)}); };
  FLASHSPARK_UNROLL
  for (int32_t i = 0; i < 4; ++i) y.word[i] = ptx::pack_finite(dtype_of(y.word[i]), dtype_of(y.word[i] >> 16));
  return y;
}

// Copies the block's queries; rows past the sequence and columns past the head become 0. Kernels that convert read them
// in any type, at once, and move them to where the numbers of K that they meet come to lie (multiply_keys): of 16
// columns those at 4 j and 4 j + 1 are at 2 j and 2 j + 1, those at 4 j + 2 and 4 j + 3 eight further.
template <class T>
FLASHSPARK_DEVICE void copy_queries(const ForwardArguments &a, const RowTile &row_tile, ptx::SharedAddress to) {
  const int32_t thread = static_cast<int32_t>(ptx::thread_index());
  const int32_t row = thread / T::kQueryThreads, chunk = thread % T::kQueryThreads;
  const auto *q_begin = static_cast<const typename T::Element *>(a.q), *q = q_begin;
  if (a.cu_seqlens_q == nullptr) q += row_tile.seq * a.q_strides.batch;
  FLASHSPARK_UNROLL
  for (int32_t pass = 0; pass < T::kMaxRows / T::kQueryPassRows; ++pass) {
    if (T::kRuntimeKeyGroups && pass * T::kQueryPassRows >= rows_of<T>(a)) break;
    const int32_t tile_row = pass * T::kQueryPassRows + row;
    const bool in_use = row_tile.first_row + tile_row < row_tile.end_row;
    const Quotient at = divide(in_use ? row_tile.first_row + tile_row : 0, a.group);
    const int64_t head = row_tile.head_kv * static_cast<int64_t>(a.group.value) + at.remainder;
    const auto *from = q + (row_tile.q_row + at.quotient) * a.q_strides.token + head * a.q_strides.head + chunk * 8;
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < T::QueryLayout::kChunks / T::kQueryThreads; ++n) {
      const bool valid = in_use && (chunk + n * T::kQueryThreads) * 8 < a.head_dim;
      if constexpr (T::kDequantizeKV) {
        ptx::Vector16 octet{};
        if (valid) octet = load_queries_as_f16(a.q, from - q_begin + n * T::kQueryThreads * 8, a.q_dtype);
        const ptx::SharedAddress half = to + n * T::kQueryThreads * 16 + chunk % 2 * 8;
        ptx::store_shared_8(half + T::QueryLayout::offset(tile_row, chunk / 2 * 2), octet.word[0], octet.word[2]);
        ptx::store_shared_8(half + T::QueryLayout::offset(tile_row, chunk / 2 * 2 + 1), octet.word[1], octet.word[3]);
        continue;
      }
      ptx::cp_async_16_or_zero(to + T::QueryLayout::offset(tile_row, chunk) + n * T::kQueryThreads * 16,
                               valid ? from + n * T::kQueryThreads * 8 : static_cast<const typename T::Element *>(a.q),
                               valid);
    }
  }
}

}  // namespace flashspark
