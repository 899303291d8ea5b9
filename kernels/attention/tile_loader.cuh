// Key tiles of K or V, contiguous or through a page table, from global to shared memory.
//
// A full tile (all its keys are visited and all columns exist) takes few instructions beside the copies themselves;
// other tiles take a slow path that looks at every key.
#pragma once

#include <type_traits>

#include "attention/mask.cuh"
#include "attention/tile_layout.cuh"

namespace flashspark {

// How the threads of a CTA share the copy of a key tile, and the pages of the next one: the same for K and V.
template <class T>
struct KeyTileCopy {
  // Rows of a tile lie on aligned groups of 16, and a page holds a multiple of 16: a thread's rows of one pass, or of
  // kGroupPasses passes of a warp for itself, share a page with their group.
  static constexpr int32_t kGroupRows = 16;
  static constexpr int32_t kGroupPasses = T::kWarpPrivateKV ? kGroupRows / T::kPassRows : 1;
  static constexpr int32_t kGroups = T::kPasses / kGroupPasses;  // of a thread, in a tile
  static_assert(T::kPassRows * kGroupPasses % kGroupRows == 0 && T::kCopyRows % kGroupRows == 0);

  const typename T::Arguments &a;
  const int32_t *pages;  // NULL: contiguous
  Interval visited[2];
  uint32_t smem_offset;  // of this thread in a tile of K
  int32_t group_row;     // of its group of rows in a pass
  // Page numbers of the next full tile: read one tile ahead, since otherwise every copy would wait for them.
  int32_t page[kGroups];

  // This thread's row of the first pass, in the tile, and its first chunk of 16 bytes.
  static FLASHSPARK_DEVICE int32_t row() {
    const uint32_t thread = ptx::thread_index();
    if constexpr (T::kWarpPrivateKV)
      return static_cast<int32_t>(thread / 32 * T::kCopyRows + thread % 32 / T::kRowThreads);
    return static_cast<int32_t>(thread / T::kRowThreads);
  }
  static FLASHSPARK_DEVICE int32_t chunk() { return static_cast<int32_t>(ptx::thread_index() % T::kRowThreads); }

  // Whether a page holds whole groups of rows. Only kernels with a score modification take other pages, for which every
  // row of a tile looks up its own: the loops of the others have no registers for that.
  FLASHSPARK_DEVICE bool whole_pages() const { return !T::ScoreMod::kNative || a.page_size.value % kGroupRows == 0; }

  FLASHSPARK_DEVICE bool visits(int32_t key) const {
    const bool in_first = key >= visited[0].begin && key < visited[0].end;
    if constexpr (T::ScoreMod::kNative) return in_first || (key >= visited[1].begin && key < visited[1].end);
    return in_first;
  }
  FLASHSPARK_DEVICE bool visits_all(int32_t tile) const {
    const int32_t begin = tile * T::kKeys, end = begin + T::kKeys;
    bool all = begin >= visited[0].begin && end <= visited[0].end;
    if constexpr (T::ScoreMod::kNative) all = all || (begin >= visited[1].begin && end <= visited[1].end);
    return all && whole_pages();
  }

  // The first row of the thread's group n in a tile. Uniform in the warp, since a warp's rows of a pass are at most 16,
  // and marked so in group_row: ptxas then computes addresses in uniform registers.
  FLASHSPARK_DEVICE int32_t group(int32_t tile, int32_t n) const {
    return tile * T::kKeys + n * kGroupPasses * T::kPassRows + group_row;
  }
  // A page that exists, whatever the table says. Clamped where the number is used, not where it is read: nothing waits
  // for it there.
  FLASHSPARK_DEVICE int32_t clamped_page(int32_t number) const {
    return static_cast<int32_t>(min_of(static_cast<uint32_t>(number), static_cast<uint32_t>(a.last_page)));
  }
  FLASHSPARK_DEVICE void look_up(int32_t tile) {
    if (visits_all(tile)) look_up_full(tile);
  }
  FLASHSPARK_DEVICE void look_up_full(int32_t tile) {
    if (pages == nullptr) return;
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < kGroups; ++n) page[n] = pages[divide(group(tile, n), a.page_size).quotient];
  }
};

template <class T>
FLASHSPARK_DEVICE KeyTileCopy<T> make_tile_copy(const typename T::Arguments &a, const Keys &keys,
                                                const KeyBounds &bounds) {
  using Copy = KeyTileCopy<T>;
  return {a,
          T::ScoreMod::kContiguous ? nullptr : keys.pages,
          {bounds.visited[0], bounds.visited[1]},
          T::KeyLayout::offset(Copy::row(), Copy::chunk()),
          T::kWarpPrivateKV || T::kPassRows > Copy::kGroupRows
              ? ptx::uniform(Copy::row() / Copy::kGroupRows * Copy::kGroupRows)
              : 0,
          {}};
}

enum class KVOperand { key, value };

// One tensor, K or V, of a KV head.
template <class T, KVOperand operand>
struct TileLoader {
  static constexpr bool kValue = operand == KVOperand::value;
  using ElementKV = typename T::ElementKV;
  using Layout = std::conditional_t<kValue, typename T::ValueLayout, typename T::KeyLayout>;
  using Copy = KeyTileCopy<T>;
  static constexpr int32_t kWidth = kValue ? T::kHeadDimV : T::kHeadDim;
  static constexpr int32_t kChunkElements = 16 / sizeof(ElementKV);
  // Copies of a thread in a row.
  static constexpr int32_t kLoads = Layout::kChunks / T::kRowThreads;

  const typename T::Arguments &a;
  const ElementKV *data;  // at this thread's first chunk of its row of tile 0, or of page row 0

  FLASHSPARK_DEVICE const Strides &strides() const { return kValue ? a.v_strides : a.k_strides; }
  FLASHSPARK_DEVICE const PageSteps &steps() const { return kValue ? a.v_pages : a.k_pages; }
  // Columns that this CTA reads.
  FLASHSPARK_DEVICE int32_t columns() const {
    return kValue ? a.head_dim_v - static_cast<int32_t>(ptx::cta_z()) * T::kHeadDimV : a.head_dim;
  }

  // Copies a tile to `to`; if it is full, its pages were looked up last.
  FLASHSPARK_DEVICE void copy(const Copy &rows, int32_t tile, ptx::SharedAddress to) const {
    if (!rows.visits_all(tile) || columns() < kWidth) {
      copy_checked(rows, tile, target(rows, to));
    } else {
      copy_full(rows, tile, data + tile * (T::kKeys * strides().token), to);
    }
  }
  // A full tile; `from` is where it begins in contiguous memory.
  FLASHSPARK_DEVICE void copy_full(const Copy &rows, int32_t tile, const ElementKV *from, ptx::SharedAddress to) const {
    to = target(rows, to);
    if (rows.pages != nullptr) {
      FLASHSPARK_UNROLL
      for (int32_t n = 0; n < Copy::kGroups; ++n) {
        const int32_t slot = divide(rows.group(tile, n), a.page_size).remainder;
        const int64_t offset =
            static_cast<int64_t>(rows.clamped_page(rows.page[n]) * steps().page + slot * steps().slot) * steps().unit;
        from = reinterpret_cast<const ElementKV *>(reinterpret_cast<const char *>(data) + offset);
        FLASHSPARK_UNROLL
        for (int32_t pass = 0; pass < Copy::kGroupPasses; ++pass, from += T::kPassRows * strides().token)
          copy_row(to, n * Copy::kGroupPasses + pass, from);
      }
    } else {
      FLASHSPARK_UNROLL
      for (int32_t pass = 0; pass < T::kPasses; ++pass, from += T::kPassRows * strides().token)
        copy_row(to, pass, from);
    }
  }

 private:
  // Whether there is something for the thread's n-th copy of a row: rows may end with chunks that nobody reads.
  static FLASHSPARK_DEVICE bool exists(int32_t n) {
    constexpr int32_t kChunks = kWidth / kChunkElements;
    return kChunks % T::kRowThreads == 0 || Copy::chunk() + n * T::kRowThreads < kChunks;
  }
  // From the offset of a pass's first copy in a row to that of the n-th.
  static FLASHSPARK_DEVICE ptx::SharedAddress chunk_offset(ptx::SharedAddress to, int32_t n) {
    return Layout::step(to, n * T::kRowThreads);
  }
  // This thread's first chunk of the tile. K and V of one width lie alike.
  static FLASHSPARK_DEVICE ptx::SharedAddress target(const Copy &rows, ptx::SharedAddress tile) {
    if constexpr (!kValue || T::kHeadDim == T::kHeadDimV) return tile + rows.smem_offset;
    return tile + Layout::offset(Copy::row(), Copy::chunk());
  }

  static FLASHSPARK_DEVICE void copy_row(ptx::SharedAddress to, int32_t pass, const ElementKV *from) {
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < kLoads; ++n) {
      if (exists(n))
        ptx::cp_async_16(Layout::down(chunk_offset(to, n), pass * T::kPassRows),
                         from + n * T::kRowThreads * kChunkElements);
    }
  }

  // Keys outside the visited ranges and columns past the head become 0: a probability of 0 times garbage might be NaN.
  FLASHSPARK_DEVICE void copy_checked(const Copy &rows, int32_t tile, ptx::SharedAddress to) const {
    FLASHSPARK_NO_UNROLL
    for (int32_t pass = 0; pass < T::kPasses; ++pass, to = Layout::down(to, T::kPassRows)) {
      const int32_t first = tile * T::kKeys + pass * T::kPassRows;
      const bool visited = rows.visits(first + Copy::row());
      const ElementKV *from = data;
      if (visited && rows.pages != nullptr) {
        // data is at the row's position in its group.
        const bool whole = rows.whole_pages();
        const Quotient at =
            divide(whole ? rows.group(tile, pass / Copy::kGroupPasses) : first + Copy::row(), a.page_size);
        const int32_t behind = whole ? pass % Copy::kGroupPasses * T::kPassRows : -(Copy::row() % Copy::kGroupRows);
        from +=
            rows.clamped_page(rows.pages[at.quotient]) * strides().batch + (at.remainder + behind) * strides().token;
      } else if (visited) {
        from += first * strides().token;
      }
      FLASHSPARK_UNROLL
      for (int32_t n = 0; n < kLoads; ++n) {
        if (!exists(n)) continue;
        const bool valid = visited && (Copy::chunk() + n * T::kRowThreads) * kChunkElements < columns();
        ptx::cp_async_16_or_zero(chunk_offset(to, n), valid ? from + n * T::kRowThreads * kChunkElements : data, valid);
      }
    }
  }
};

template <class T, KVOperand operand>
FLASHSPARK_DEVICE TileLoader<T, operand> make_tile_loader(const typename T::Arguments &a, const RowTile &row_tile,
                                                          const Keys &keys) {
  using Loader = TileLoader<T, operand>;
  using Copy = KeyTileCopy<T>;
  Loader loader{a, static_cast<const typename T::ElementKV *>(Loader::kValue ? a.v : a.k)};
  const int32_t first_column = Loader::kValue ? static_cast<int32_t>(ptx::cta_z()) * T::kHeadDimV : 0;
  const Strides &strides = loader.strides();
  loader.data += row_tile.head_kv * strides.head + first_column + Copy::chunk() * Loader::kChunkElements;
  if (keys.pages != nullptr) {  // not by kContiguous: ptxas then takes the sum apart in the loop, and spills
    loader.data += Copy::row() % Copy::kGroupRows * strides.token;
  } else {
    const int64_t batch = a.cu_seqlens_k != nullptr ? 0 : keys.batch;
    loader.data += batch * strides.batch + (keys.row + Copy::row()) * strides.token;
  }
  return loader;
}

// Key tiles [begin, end) are full: all their keys are visited and all columns exist.
template <class T>
FLASHSPARK_DEVICE Interval full_tiles(const KeyTileCopy<T> &rows, const TileLoader<T, KVOperand::key> &k,
                                      const TileLoader<T, KVOperand::value> &v) {
  if (k.columns() < T::kHeadDim || v.columns() < T::kHeadDimV || !rows.whole_pages()) return {0, 0};
  return {ceil_div(rows.visited[0].begin, T::kKeys), rows.visited[0].end / T::kKeys};
}

}  // namespace flashspark
