#include "graph/vector_tile.hpp"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

#include "dtype.hpp"

namespace flashspark::graph {
namespace {

using Space = Program::Space;
using Instruction = Program::Instruction;
using Register = Program::Register;

// So many elements of a block that several registers of them stay in the L1 cache.
constexpr int64_t kBlockElements = 1024;

struct alignas(64) Line {
  char bytes[64];
};

// This thread's memory for temporaries, of at least so many bytes.
char *scratch(int64_t bytes) {
  thread_local std::vector<Line> memory;
  const size_t lines = static_cast<size_t>(bytes) / sizeof(Line);
  if (memory.size() < lines) memory.resize(lines);
  return memory.front().bytes;
}

int64_t padded(int64_t count) {
  return (count + kLanes - 1) / kLanes * kLanes;
}

template <class T>
T saturated(double x) {
  if (!(x == x)) return 0;
  if (x >= -static_cast<double>(std::numeric_limits<T>::min())) return std::numeric_limits<T>::max();
  return x < static_cast<double>(std::numeric_limits<T>::min()) ? std::numeric_limits<T>::min() : static_cast<T>(x);
}

int32_t row_input(Op op, const Row &row) {
  switch (op) {
    case Op::B:
      return row.b;
    case Op::H:
      return row.h;
    case Op::QIdx:
      return row.q_idx;
    case Op::SeqlenQ:
      return row.seqlen_q;
    case Op::SeqlenK:
      return row.seqlen_k;
    case Op::OffsetQ:
      return row.offset_q;
    default:
      return row.offset_k;
  }
}

// Whether 32 bits hold every size, stride and offset of the tensor.
bool is_small(const AuxTensor &tensor) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  int64_t extent = 0;
  for (int32_t n = 0; n < tensor.rank; ++n) {
    const int64_t size = tensor.shape[n], stride = std::abs(tensor.strides[n]);
    if (size > kLimit || stride > kLimit) return false;
    extent += (size - 1) * stride;
    if (extent > kLimit) return false;
  }
  return true;
}

// One dimension's part of the offsets, as VectorKernels::locate() but for any tensor and index type.
template <class Index>
bool locate_any(const Locate &l, int64_t *offsets) {
  bool wrong = false;
  for (int64_t r = 0; r < l.rows; ++r) {
    const Index *index = l.index.row<Index>(r);
    int64_t *to = offsets + r * l.count;
    for (int64_t i = 0; i < l.count; ++i) {
      const int64_t given = index[i & l.index.mask];
      const int64_t from_start = given < 0 ? given + l.size : given;
      const int64_t nearest = from_start < 0 ? 0 : from_start < l.size ? from_start : l.size - 1;
      wrong |= nearest != from_start;
      to[i] = (l.is_first ? 0 : to[i]) + nearest * l.stride;
    }
  }
  return wrong;
}

}  // namespace

Tile::Tile(const Program &program, const Bindings &bindings, const Stretch &stretch, OutOfRange *oor)
    : program_(program), bindings_(bindings), stretch_(stretch), oor_(oor), vectors_(vector_kernels()) {
  const int64_t keys = padded(stretch.num_keys);
  block_rows_ = static_cast<int32_t>(std::clamp<int64_t>(kBlockElements / keys, 1, stretch.num_rows));
  const int64_t elements[] = {kLanes, padded(stretch.num_rows), keys, kLanes, keys};
  const int64_t rows[] = {1, 1, 1, block_rows_, block_rows_};
  int64_t bytes = 0, at[Program::kNumSpaces][2], longest = 0;
  for (int s = 0; s < Program::kNumSpaces; ++s) {
    elements_[s] = elements[s];
    longest = std::max(longest, elements[s] * rows[s]);
    for (const int wide : {0, 1}) {
      at[s][wide] = bytes;
      bytes += program.num_registers_[s][wide] * elements[s] * rows[s] * (wide ? 8 : 4);
    }
  }
  char *memory = scratch(bytes + longest * static_cast<int64_t>(sizeof(int64_t)));
  for (int s = 0; s < Program::kNumSpaces; ++s) {
    for (const int wide : {0, 1}) base_[s][wide] = memory + at[s][wide];
  }
  offsets_ = reinterpret_cast<int64_t *>(memory + bytes);
}

char *Tile::data(const Register &r) const {
  const int s = static_cast<int>(r.space);
  const int64_t rows = r.space == Space::splats || r.space == Space::block ? block_rows_ : 1;
  return base_[s][r.wide] + r.index * elements_[s] * rows * (r.wide ? 8 : 4);
}

Operand Tile::operand(const Register &r) const {
  const bool of_block = r.space == Space::splats || r.space == Space::block;
  const bool one_value = r.space == Space::splats || r.space == Space::uniform;
  const int64_t row_bytes = elements_[static_cast<int>(r.space)] * (r.wide ? 8 : 4);
  return {data(r), of_block ? row_bytes : 0, one_value ? 0 : -1};
}

void Tile::execute(const Instruction &i) {
  if (i.is_splat) return splat(i);
  switch (i.node.op) {
    case Op::Score:
      return load_score(i);
    case Op::KvIdx: {
      int32_t *to = reinterpret_cast<int32_t *>(data(i.out));
      for (int32_t k = 0; k < elements_[static_cast<int>(Space::keys)]; ++k)
        to[k] = stretch_.kv_begin + std::min(k, stretch_.num_keys - 1);
      return;
    }
    case Op::Const:
    case Op::Scalar:
      return fill(i);
    case Op::Load:
      return load(i);
    default:
      break;
  }
  if (i.node.num_operands == 0) return load_rows(i);
  Call call{};
  for (int32_t k = 0; k < i.node.num_operands; ++k) {
    call.in[k] = operand(i.in[k]);
    // Lane by lane, since the result may take an operand's register.
    if (i.out.space == Space::uniform) call.in[k].mask = -1;
  }
  call.out = data(i.out);
  call.out_row_stride = operand(i.out).row_stride;
  call.rows = in_block_ ? count_ : 1;
  call.count = elements_[static_cast<int>(i.out.space)];
  const Kernel vectors = vectors_.kernels[static_cast<int>(i.node.op)][static_cast<int>(i.operand_type)];
  (vectors != nullptr ? vectors : scalar_kernel(i.node.op, i.operand_type))(call);
}

void Tile::splat(const Instruction &i) {
  const auto copy = [&]<size_t kSize>(std::integral_constant<size_t, kSize>) {
    const char *from = data(i.in[0]) + first_ * static_cast<int64_t>(kSize);
    char *to = data(i.out);
    for (int64_t r = 0; r < count_; ++r, from += kSize) {
      for (int64_t lane = 0; lane < kLanes; ++lane, to += kSize) std::memcpy(to, from, kSize);
    }
  };
  if (i.out.wide) return copy(std::integral_constant<size_t, 8>());
  copy(std::integral_constant<size_t, 4>());
}

void Tile::load_score(const Instruction &i) {
  const int64_t width = elements_[static_cast<int>(Space::block)], keys = stretch_.num_keys;
  for (int64_t r = 0; r < count_; ++r) {
    const float *from = scores + (first_ + r) * row_stride;
    float *to = reinterpret_cast<float *>(data(i.out)) + r * width;
    if (key_stride == 1) {
      std::copy_n(from, keys, to);
    } else {
      for (int64_t k = 0; k < keys; ++k) to[k] = from[k * key_stride];
    }
    std::fill(to + keys, to + width, 0.0f);
  }
}

// Elements behind the last row repeat it, so that they have harmless values.
void Tile::load_rows(const Instruction &i) {
  int32_t *to = reinterpret_cast<int32_t *>(data(i.out));
  for (int32_t r = 0; r < elements_[static_cast<int>(Space::rows)]; ++r)
    to[r] = row_input(i.node.op, stretch_.rows[std::min(r, stretch_.num_rows - 1)]);
}

void Tile::fill(const Instruction &i) {
  const Node &node = i.node;
  const bool given = node.op == Op::Scalar;
  const double scalar = given ? bindings_.scalars[node.number] : 0;
  const auto set = [&]<class T>(T value) { std::fill_n(reinterpret_cast<T *>(data(i.out)), kLanes, value); };
  switch (node.type) {
    case Type::boolean:
      return set(static_cast<int32_t>(-node.value));
    case Type::i32:
      return set(given ? saturated<int32_t>(scalar) : static_cast<int32_t>(node.value));
    case Type::i64:
      return set(given ? saturated<int64_t>(scalar) : node.value);
    default:
      return set(given ? static_cast<float>(scalar) : node.real());
  }
}

void Tile::load(const Instruction &i) {
  const AuxTensor &tensor = bindings_.tensors[i.node.number];
  const int64_t rows = in_block_ ? count_ : 1, width = elements_[static_cast<int>(i.out.space)], count = rows * width;
  bool small = is_small(tensor);
  for (int32_t n = 0; n < tensor.rank; ++n) small = small && !i.in[n].wide;
  int32_t *offsets32 = reinterpret_cast<int32_t *>(offsets_);
  if (tensor.rank == 0) std::fill_n(offsets_, count, 0);
  for (int32_t n = 0; n < tensor.rank; ++n) {
    const Locate part{.index = operand(i.in[n]),
                      .rows = rows,
                      .count = width,
                      .size = tensor.shape[n],
                      .stride = tensor.strides[n],
                      .is_first = n == 0};
    const bool wrong = small          ? vectors_.locate(part, offsets32)
                       : i.in[n].wide ? locate_any<int64_t>(part, offsets_)
                                      : locate_any<int32_t>(part, offsets_);
    if (wrong && oor_ != nullptr) report(i, tensor, n);
  }
  if (small) {
    gather(tensor, offsets32, count, data(i.out));
  } else {
    gather(tensor, offsets_, count, data(i.out));
  }
}

template <class Offset>
void Tile::gather(const AuxTensor &tensor, const Offset *offsets, int64_t count, char *to) const {
  const auto copy = [&]<class Element, class Out>(Element, Out, auto convert) {
    const Element *from = static_cast<const Element *>(tensor.data);
    Out *out = reinterpret_cast<Out *>(to);
    // NOLINTNEXTLINE(bugprone-signed-char-misuse): i8 is a number
    for (int64_t n = 0; n < count; ++n) out[n] = convert(from[offsets[n]]);
  };
  const auto same = [](auto x) { return x; };
  switch (static_cast<DataType>(tensor.dtype)) {
    case DataType::boolean:
      return copy(uint8_t{}, int32_t{}, [](uint8_t x) { return x != 0 ? -1 : 0; });
    case DataType::u8:
      return copy(uint8_t{}, int32_t{}, same);
    case DataType::i8:
      return copy(int8_t{}, int32_t{}, same);
    case DataType::i16:
      return copy(int16_t{}, int32_t{}, same);
    case DataType::i32:
      return copy(int32_t{}, int32_t{}, same);
    case DataType::i64:
      return copy(int64_t{}, int64_t{}, same);
    case DataType::f16:
      return copy(uint16_t{}, float{}, f16_to_float);
    case DataType::bf16:
      return copy(uint16_t{}, float{}, bf16_to_float);
    case DataType::f32:
      if constexpr (sizeof(Offset) == sizeof(int32_t)) {
        return vectors_.gather_f32(static_cast<const float *>(tensor.data), offsets, count,
                                   reinterpret_cast<float *>(to));
      }
      return copy(float{}, float{}, same);
    default:
      return copy(double{}, float{}, [](double x) { return static_cast<float>(x); });
  }
}

// Finds the wrong indices again, of real rows and keys only, and flags the places whose values come of them.
void Tile::report(const Instruction &i, const AuxTensor &tensor, int32_t dimension) {
  const Register &from = i.in[dimension];
  const Operand indices = operand(from);
  const int64_t size = tensor.shape[dimension], num_keys = stretch_.num_keys;
  const Space space = i.out.space;
  const bool for_all_rows = space == Space::uniform || space == Space::keys;
  const bool for_all_keys = space == Space::uniform || space == Space::rows;
  // Rows stand side by side in a register of that space.
  const int64_t height = in_block_ ? count_ : 1;
  const int64_t width = space == Space::uniform ? 1 : space == Space::rows ? stretch_.num_rows : num_keys;
  for (int64_t r = 0; r < height; ++r) {
    for (int64_t n = 0; n < width; ++n) {
      const int64_t at = n & indices.mask;
      const int64_t index = from.wide ? indices.row<int64_t>(r)[at] : indices.row<int32_t>(r)[at];
      if (index >= -size && index < size) continue;
      if (!oor_->found) {
        oor_->tensor = i.node.number;
        oor_->dimension = dimension;
        oor_->index = index;
        oor_->size = size;
      }
      oor_->found = true;
      if (oor_->flags == nullptr) return;
      const int64_t row = space == Space::rows ? n : first_ + r, key = space == Space::rows ? 0 : n;
      for (int64_t y = for_all_rows ? 0 : row; y < (for_all_rows ? stretch_.num_rows : row + 1); ++y) {
        for (int64_t x = for_all_keys ? 0 : key; x < (for_all_keys ? num_keys : key + 1); ++x)
          oor_->flags[y * num_keys + x] = 1;
      }
    }
  }
}

}  // namespace flashspark::graph
