// The memory of a Case: sizes, strides, lengths, pages, poison.
#include <algorithm>
#include <cstring>
#include <new>
#include <numeric>

#include "cases/cases.hpp"
#include "cases/random.hpp"

namespace flashspark::cases {
namespace {

constexpr int64_t kGap = 16;        // elements between rows of strided tensors
constexpr int64_t kGuard = 64;      // bytes before and after out and lse
constexpr int64_t kSpareRows = 3;   // rows beyond the length where seqused_q or seqused_k is given
constexpr int64_t kSparePages = 3;  // pages that no sequence uses
constexpr std::align_val_t kAlignment{64};
constexpr int kPoison = 0xff;  // NaN in every floating-point type here

int64_t longest(const std::vector<SeqLen> &lens, int64_t SeqLen::*field) {
  int64_t n = 0;
  for (const SeqLen &len : lens) n = std::max(n, len.*field);
  return n;
}

bool unequal(const std::vector<SeqLen> &lens, int64_t SeqLen::*field) {
  return std::any_of(lens.begin(), lens.end(), [&](const SeqLen &len) { return len.*field != lens[0].*field; });
}

// Row offsets of a packed batch whose sequences have `spare` unused rows at their ends.
std::vector<int32_t> offsets(const std::vector<SeqLen> &lens, int64_t SeqLen::*field, int64_t spare) {
  std::vector<int32_t> cu{0};
  for (const SeqLen &len : lens) cu.push_back(static_cast<int32_t>(cu.back() + len.*field + spare));
  return cu;
}

std::vector<int32_t> lengths(const std::vector<SeqLen> &lens, int64_t SeqLen::*field) {
  std::vector<int32_t> used;
  used.reserve(std::max<size_t>(lens.size(), 1));  // data() is never NULL, also without sequences
  for (const SeqLen &len : lens) used.push_back(static_cast<int32_t>(len.*field));
  return used;
}

int64_t pages_of(const SeqLen &len, int64_t page_size) {
  return (len.k + page_size - 1) / page_size;
}

// Elements from the first to one past the last of a tensor of `blocks` x `tokens` x `heads` rows of `width`.
int64_t extent(const flashspark_tensor &t, int64_t blocks, int64_t tokens, int64_t heads, int64_t width) {
  if (blocks == 0 || tokens == 0) return 0;
  return (blocks - 1) * t.batch_stride + (tokens - 1) * t.token_stride + (heads - 1) * t.head_stride + width;
}

std::byte *at(const flashspark_tensor &t, int64_t block, int64_t token, int64_t head) {
  const int64_t index = block * t.batch_stride + token * t.token_stride + head * t.head_stride;
  return static_cast<std::byte *>(t.data) + index * static_cast<int64_t>(flashspark_dtype_size(t.dtype));
}

}  // namespace

Buffer::Buffer(size_t size) : size_(size) {
  void *p = ::operator new(size, kAlignment);
  std::memset(p, kPoison, size);
  data_.reset(static_cast<std::byte *>(p));
}

void Buffer::Free::operator()(std::byte *p) const {
  ::operator delete(p, kAlignment);
}

Problem::Problem(const Case &spec) : spec_(spec) {
  if (spec_.head_dim_v == 0) spec_.head_dim_v = spec_.head_dim;
  rows_before_ = {0};
  for (const SeqLen &len : spec_.lens) rows_before_.push_back(rows_before_.back() + len.q);
  flashspark_attention_params_init(&params);
  params.num_seqs = static_cast<int64_t>(spec_.lens.size());
  params.num_heads_q = spec_.heads_q;
  params.num_heads_kv = spec_.heads_kv;
  params.head_dim = spec_.head_dim;
  params.head_dim_v = spec_.head_dim_v;
  params.num_splits = spec_.num_splits;
  allocate_queries();
  allocate_cache();
  set_scores();
  fill();
  poison();
}

void Problem::allocate_queries() {
  const bool dense = spec_.q_layout == Layout::kDense;
  const int64_t spare = spec_.seqused_q ? kSpareRows : 0;
  params.max_seqlen_q = longest(spec_.lens, &SeqLen::q) + spare;  // of rows that exist, in use or not
  if (!dense) {
    cu_q_ = offsets(spec_.lens, &SeqLen::q, spare);
    params.cu_seqlens_q = cu_q_.data();
    params.total_q = cu_q_.back();
  }
  if (spec_.seqused_q || (dense && unequal(spec_.lens, &SeqLen::q))) {
    seqused_q_ = lengths(spec_.lens, &SeqLen::q);
    params.seqused_q = seqused_q_.data();
  }
  const int64_t blocks = dense ? params.num_seqs : 1;
  const int64_t tokens = dense ? params.max_seqlen_q : params.total_q;
  const int64_t gap = spec_.strided ? kGap : 0;
  const auto shape = [&](flashspark_tensor &t, int32_t dtype, int64_t width) {
    t.dtype = dtype;
    t.head_stride = width + gap;
    t.token_stride = spec_.heads_q * t.head_stride + gap;
    t.batch_stride = dense ? tokens * t.token_stride + gap : 0;
    return extent(t, blocks, tokens, spec_.heads_q, width) * static_cast<int64_t>(flashspark_dtype_size(dtype));
  };
  q_ = Buffer(shape(params.q, spec_.q_dtype, spec_.head_dim));
  params.q.data = q_.data();
  out_ = Buffer(shape(params.out, spec_.out_dtype, spec_.head_dim_v) + 2 * kGuard);
  params.out.data = out_.data() + kGuard;
  if (!spec_.lse) return;
  params.lse_token_stride = spec_.strided ? 2 : 1;
  params.lse_head_stride = tokens * params.lse_token_stride + (spec_.strided ? 5 : 0);
  params.lse_batch_stride = dense ? spec_.heads_q * params.lse_head_stride : 0;
  const int64_t floats = blocks * tokens == 0
                             ? 0
                             : (blocks - 1) * params.lse_batch_stride + (spec_.heads_q - 1) * params.lse_head_stride +
                                   (tokens - 1) * params.lse_token_stride + 1;
  lse_ = Buffer(floats * sizeof(float) + 2 * kGuard);
  params.lse = reinterpret_cast<float *>(lse_.data() + kGuard);
}

// Rows of a dense cache or of page_table, and which of them each sequence has.
int64_t Problem::index_cache_rows(Random &random) {
  const int64_t rows = params.num_seqs + (spec_.kv_batch_index ? 2 : 0);
  batch_index_.resize(rows);
  std::iota(batch_index_.begin(), batch_index_.end(), 0);
  if (spec_.kv_batch_index) {
    random.shuffle(batch_index_);
    batch_index_.resize(params.num_seqs);
    params.kv_batch_index = batch_index_.data();
    params.num_kv_seqs = rows;
  }
  return rows;
}

// Every sequence's pages, in a random order, among garbage.
void Problem::fill_page_table(Random &random, int64_t pages) {
  std::vector<int32_t> order(pages);
  std::iota(order.begin(), order.end(), 0);
  random.shuffle(order);
  page_table_.reserve(1);  // never NULL, also without sequences
  page_table_.resize(index_cache_rows(random) * params.page_table_stride);
  for (int32_t &entry : page_table_) entry = static_cast<int32_t>(random.bits());  // garbage past every end
  auto next = order.begin();
  for (int64_t b = 0; b < params.num_seqs; ++b) {
    const int64_t n = pages_of(spec_.lens[b], spec_.page_size);
    std::copy(next, next + n, page_table_.begin() + batch_index_[b] * params.page_table_stride);
    next += n;
  }
  params.page_table = page_table_.data();
}

// Strides of k or v, whose rows are `width` wide.
int64_t Problem::shape_cache(flashspark_tensor &t, int64_t blocks, int64_t tokens, int64_t width) const {
  const int64_t row = width + (spec_.strided ? kGap : 0);
  const bool head_major = spec_.cache_order == CacheOrder::kPageHeadToken;
  t.dtype = spec_.kv_dtype;
  t.token_stride = head_major ? row : spec_.heads_kv * row;
  t.head_stride = head_major ? tokens * row : row;
  t.batch_stride = spec_.kv_layout != Layout::kVarlen ? spec_.heads_kv * tokens * row : 0;
  return extent(t, blocks, tokens, spec_.heads_kv, width) * static_cast<int64_t>(flashspark_dtype_size(t.dtype));
}

void Problem::allocate_cache() {
  const bool paged = spec_.kv_layout == Layout::kPaged, dense = spec_.kv_layout == Layout::kDense;
  const int64_t spare = spec_.seqused_k && !paged ? kSpareRows : 0;
  Random random(spec_.seed, 'c');
  params.max_seqlen_k = longest(spec_.lens, &SeqLen::k) + (dense ? spare : 0);
  int64_t blocks = 1, tokens = 0;  // a block is a page, a sequence of a dense cache, or all rows of a packed batch
  if (paged) {
    tokens = params.page_size = spec_.page_size;
    int64_t used = 0, most = 0;
    for (const SeqLen &len : spec_.lens) {
      const int64_t pages = pages_of(len, spec_.page_size);
      used += pages, most = std::max(most, pages);
    }
    blocks = params.num_pages = used + kSparePages;
    params.num_page_slots = most + 2;
    params.page_table_stride = params.num_page_slots + 3;
    fill_page_table(random, blocks);
  } else if (dense) {
    tokens = params.max_seqlen_k;
    blocks = index_cache_rows(random);
  } else {
    cu_k_ = offsets(spec_.lens, &SeqLen::k, spare);
    params.cu_seqlens_k = cu_k_.data();
    tokens = params.total_k = cu_k_.back();
  }
  if ((paged && !spec_.whole_table) || spec_.seqused_k || (dense && unequal(spec_.lens, &SeqLen::k))) {
    seqused_k_ = lengths(spec_.lens, &SeqLen::k);
    params.seqused_k = seqused_k_.data();
  }
  if (spec_.leftpad > 0) {
    for (int64_t b = 0; b < params.num_seqs; ++b) leftpad_.push_back(static_cast<int32_t>(leftpad(b)));
    params.leftpad_k = leftpad_.data();
  }
  if (spec_.packed_kv) {
    k_ = Buffer(shape_cache(params.k, blocks, tokens, spec_.head_dim + spec_.head_dim_v));
    params.v = params.k;
    params.v.data = k_.data() + spec_.head_dim * flashspark_dtype_size(spec_.kv_dtype);
  } else {
    k_ = Buffer(shape_cache(params.k, blocks, tokens, spec_.head_dim));
    v_ = Buffer(shape_cache(params.v, blocks, tokens, spec_.head_dim_v));
    params.v.data = v_.data();
  }
  params.k.data = k_.data();
}

void Problem::poison() {
  std::memset(out_.data(), kPoison, out_.size());
  if (lse_.size() > 0) std::memset(lse_.data(), kPoison, lse_.size());
}

int64_t Problem::leftpad(int64_t b) const {
  return spec_.leftpad == 0 ? 0 : std::min(spec_.leftpad + b, spec_.lens[b].k);
}

std::byte *Problem::address(Role role, int64_t b, int64_t i, int64_t h) const {
  if (role == Role::kQ || role == Role::kOut) {
    const flashspark_tensor &t = role == Role::kQ ? params.q : params.out;
    return spec_.q_layout == Layout::kDense ? at(t, b, i, h) : at(t, 0, cu_q_[b] + i, h);
  }
  const flashspark_tensor &t = role == Role::kK ? params.k : params.v;
  i += leftpad(b);
  switch (spec_.kv_layout) {
    case Layout::kDense:
      return at(t, batch_index_[b], i, h);
    case Layout::kVarlen:
      return at(t, 0, cu_k_[b] + i, h);
    case Layout::kPaged:
      return at(t, page_table_[batch_index_[b] * params.page_table_stride + i / spec_.page_size], i % spec_.page_size,
                h);
  }
  return nullptr;
}

int64_t Problem::lse_index(int64_t b, int64_t i, int64_t h) const {
  const bool dense = spec_.q_layout == Layout::kDense;
  return (dense ? b * params.lse_batch_stride : 0) + h * params.lse_head_stride +
         (dense ? i : cu_q_[b] + i) * params.lse_token_stride;
}

int32_t Problem::dtype(Role role) const {
  return role == Role::kQ ? spec_.q_dtype : role == Role::kOut ? spec_.out_dtype : spec_.kv_dtype;
}

float Problem::get(Role role, int64_t b, int64_t i, int64_t h, int64_t d) const {
  return load(dtype(role), address(role, b, i, h), d);
}

void Problem::set(Role role, int64_t b, int64_t i, int64_t h, int64_t d, float value) {
  store(dtype(role), address(role, b, i, h), d, value);
}

flashspark_status Problem::launch(const char *implementation, int num_threads) {
  params.implementation = implementation;
  params.num_threads = num_threads;
  size_t needed = 0;
  if (const auto status = flashspark_attention_workspace_size(&params, &needed)) return status;
  if (needed > workspace_.size()) workspace_ = Buffer(needed);
  params.workspace = needed > 0 ? workspace_.data() : nullptr;
  params.workspace_size = needed;
  return flashspark_attention_forward(&params);
}

Result Problem::run(const char *implementation, int num_threads) {
  poison();
  const flashspark_status status = launch(implementation, num_threads);
  if (status != FLASHSPARK_OK) return {status, flashspark_last_error(), {}, {}};
  return result();
}

Result Problem::result() const {
  Result r;
  r.out.resize(num_rows() * spec_.heads_q * spec_.head_dim_v);
  if (params.lse) r.lse.resize(num_rows() * spec_.heads_q);
  for (int64_t b = 0; b < params.num_seqs; ++b) {
    for (int64_t i = 0; i < seqlen_q(b); ++i) {
      for (int64_t h = 0; h < spec_.heads_q; ++h) {
        const int64_t row = (row_begin(b) + i) * spec_.heads_q + h;
        // `params.out.dtype` and not the Case's: the oracle runs the same problem with float32 out.
        const std::byte *source = address(Role::kOut, b, i, h);
        for (int64_t d = 0; d < spec_.head_dim_v; ++d) {
          r.out[row * spec_.head_dim_v + d] = load(params.out.dtype, source, d);
        }
        if (params.lse) r.lse[row] = params.lse[lse_index(b, i, h)];
      }
    }
  }
  return r;
}

std::vector<std::span<std::byte>> Problem::memory() {
  std::vector<std::span<std::byte>> blocks = written_memory();
  for (const Buffer *buffer : {&q_, &k_, &v_, &sinks_, &rel_}) blocks.emplace_back(buffer->data(), buffer->size());
  for (std::vector<int32_t> *numbers : {&cu_q_, &cu_k_, &seqused_q_, &seqused_k_, &leftpad_, &batch_index_,
                                        &page_table_, &causal_, &prefix_, &rswa_prefix_})
    blocks.push_back(std::as_writable_bytes(std::span(*numbers)));
  for (std::vector<float> *numbers : {&alibi_, &q_descale_, &k_descale_, &v_descale_, &output_scale_})
    blocks.push_back(std::as_writable_bytes(std::span(*numbers)));
  blocks.push_back(std::as_writable_bytes(std::span(dropout_state_)));
  return blocks;
}

std::vector<std::span<std::byte>> Problem::written_memory() {
  return {{out_.data(), out_.size()}, {lse_.data(), lse_.size()}};
}

bool Problem::untouched() const {
  std::vector<unsigned char> out(out_.size()), lse(lse_.size());
  std::memcpy(out.data(), out_.data(), out.size());
  if (!lse.empty()) std::memcpy(lse.data(), lse_.data(), lse.size());
  const size_t row_bytes = spec_.head_dim_v * flashspark_dtype_size(spec_.out_dtype);
  for (int64_t b = 0; b < params.num_seqs; ++b) {
    for (int64_t i = 0; i < seqlen_q(b); ++i) {
      for (int64_t h = 0; h < spec_.heads_q; ++h) {
        std::memset(out.data() + (address(Role::kOut, b, i, h) - out_.data()), kPoison, row_bytes);
        if (!lse.empty()) {
          std::memset(lse.data() + kGuard + lse_index(b, i, h) * sizeof(float), kPoison, sizeof(float));
        }
      }
    }
  }
  const auto poisoned = [](unsigned char byte) { return byte == kPoison; };
  return std::all_of(out.begin(), out.end(), poisoned) && std::all_of(lse.begin(), lse.end(), poisoned);
}

}  // namespace flashspark::cases
