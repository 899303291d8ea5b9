#include "cuda/metadata.hpp"

#include <bit>
#include <memory>
#include <vector>

#include "cuda/device.hpp"
#include "cuda/driver.hpp"
#include "dtype.hpp"
#include "environment.hpp"
#include "error.hpp"
#include "validate.hpp"

namespace flashspark::cuda {
namespace {

// Copies of device memory, which live as long as this.
class HostCopies {
 public:
  HostCopies(int32_t device_index, void *stream) : device_(device_index) {
    const auto s = static_cast<Stream>(stream);
    int status = 0;
    FLASHSPARK_CUDA_CALL(driver(), cuStreamIsCapturing, s, &status);
    if (status != 0) {
      fail("check_device", "1",
           "must be 0 (and FLASHSPARK_CHECK unset) while the stream is captured: the check reads the device");
    }
    FLASHSPARK_CUDA_CALL(driver(), cuStreamSynchronize, s);
  }

  // `count` elements from `pointer` on; NULL stays NULL.
  template <class T>
  void take(const T *&pointer, int64_t count) {
    pointer = static_cast<const T *>(copy(pointer, count * static_cast<int64_t>(sizeof(T))));
  }
  void take_bytes(const void *&pointer, int64_t bytes) { pointer = copy(pointer, bytes); }
  // Rows `stride` elements apart.
  template <class T>
  void take_rows(const T *&pointer, int64_t rows, int64_t columns, int64_t stride) {
    take(pointer, rows == 0 || columns == 0 ? 0 : (rows - 1) * stride + columns);
  }
  void take(flashspark_scale &scale, int64_t batch, int64_t heads) {
    if (scale.data == nullptr || batch == 0) return;
    // Strides may be negative: the copy begins at the lowest address that they reach.
    const int64_t over_batch = (batch - 1) * scale.batch_stride, over_heads = (heads - 1) * scale.head_stride;
    const int64_t below = std::min<int64_t>(over_batch, 0) + std::min<int64_t>(over_heads, 0);
    const int64_t above = std::max<int64_t>(over_batch, 0) + std::max<int64_t>(over_heads, 0);
    const float *lowest = scale.data + below;
    take(lowest, above - below + 1);
    scale.data = lowest - below;
  }

 private:
  const void *copy(const void *from, int64_t bytes) {
    if (from == nullptr) return nullptr;
    // Words, so that every type is aligned; one more, so that an empty array is not NULL.
    auto &memory = copies_.emplace_back(std::make_unique<uint64_t[]>(static_cast<size_t>(bytes) / 8 + 1));
    if (bytes > 0) {
      FLASHSPARK_CUDA_CALL(driver(), cuMemcpyDtoH, memory.get(), std::bit_cast<Address>(from),
                           static_cast<size_t>(bytes));
    }
    return memory.get();
  }

  CurrentDevice device_;
  std::vector<std::unique_ptr<uint64_t[]>> copies_;
};

}  // namespace

void check_if_asked(const Params &p) {
  if (p.check_device == 0 && !environment().check) return;
  HostCopies host(p.device_index, p.stream);
  Params copy = p;
  copy.device = FLASHSPARK_CPU;
  const int64_t batch = p.num_seqs;
  host.take(copy.cu_seqlens_q, batch + 1);
  host.take(copy.cu_seqlens_k, batch + 1);
  for (const int32_t **one_each : {&copy.seqused_q, &copy.seqused_k, &copy.leftpad_k, &copy.kv_batch_index,
                                   &copy.causal_per_seq, &copy.rswa_prefix_lens})
    host.take(*one_each, batch);
  host.take_rows(copy.page_table, num_kv_seqs(p), p.num_page_slots, p.page_table_stride);
  if (p.prefix_mode != FLASHSPARK_PREFIX_NONE) {
    const int64_t tokens = is_varlen_q(p) ? p.total_q : batch * p.max_seqlen_q;
    const bool by_token = p.prefix_mode == FLASHSPARK_PREFIX_PER_TOKEN;
    host.take(copy.prefix_ranges, 2 * (by_token ? tokens : batch * p.num_prefix_ranges));
  }
  host.take_bytes(copy.sinks, p.num_heads_q * static_cast<int64_t>(dtype_size(p.sinks_dtype)));
  host.take_rows(copy.alibi_slopes, p.alibi_batch_stride == 0 ? 1 : batch, p.num_heads_q, p.alibi_batch_stride);
  host.take(copy.output_scale, 1);
  for (flashspark_scale *scale : {&copy.q_descale, &copy.k_descale, &copy.v_descale})
    host.take(*scale, batch, p.num_heads_kv);
  check_metadata(copy);
}

void check_if_asked(const AppendParams &p) {
  if (p.check_device == 0 && !environment().check) return;
  HostCopies host(p.device_index, p.stream);
  AppendParams copy = p;
  copy.device = FLASHSPARK_CPU;
  const int64_t batch = p.num_seqs;
  host.take(copy.cu_seqlens_new, batch + 1);
  host.take(copy.cu_seqlens_q, batch + 1);
  for (const int32_t **one_each : {&copy.seqlens, &copy.seqused_q, &copy.kv_batch_index, &copy.rotary_seqlens})
    host.take(*one_each, batch);
  host.take_rows(copy.page_table, p.kv_batch_index != nullptr ? p.num_cache_rows : batch, p.num_page_slots,
                 p.page_table_stride);
  host.take(copy.slot_mapping, p.total_new);
  host.take(copy.rotary_positions, p.total_new);
  for (flashspark_scale *scale : {&copy.k_descale, &copy.v_descale}) host.take(*scale, batch, p.num_heads_kv);
  check_metadata(copy);
}

}  // namespace flashspark::cuda
