// create_block_mask from Python. The arguments are
//
//   mask_mod                         a handle that mask_mod_create() gave
//   B, H, Q_LEN, KV_LEN              integers
//   block_size_q, block_size_k
//   counts, indices                  contiguous, to be written: of blocks that are seen in part, then of those that are
//                                    seen wholly, which may be None
//   num_tensors, num_scalars         that the function captures
//   for each captured tensor, each captured scalar: as in functions.hpp
#include <algorithm>

#include "exports.hpp"
#include "functions.hpp"
#include "names.hpp"

namespace flashspark::ffi {
namespace {

enum Argument : int32_t {
  kMaskMod,
  kBatch,
  kHeads,
  kQueries,
  kKeys,
  kBlockSizeQ,
  kBlockSizeK,
  kCounts,
  kIndices,
  kFullCounts,
  kFullIndices,
  kTensors,
  kScalars,
  kCaptured
};
constexpr const char *kNames[] = {"mask_mod",
                                  "B",
                                  "H",
                                  "Q_LEN",
                                  "KV_LEN",
                                  "BLOCK_SIZE[0]",
                                  "BLOCK_SIZE[1]",
                                  "kv_num_blocks",
                                  "kv_indices",
                                  "full_kv_num_blocks",
                                  "full_kv_indices",
                                  "num_tensors",
                                  "num_scalars"};

constexpr Name kBlockMaskNames[] = {
    {"num_seqs", {"B"}},
    {"num_heads", {"H"}},
    {"seqlen_q", {"Q_LEN"}},
    {"seqlen_k", {"KV_LEN"}},
    {"block_size_q", {"BLOCK_SIZE[0]"}},
    {"block_size_k", {"BLOCK_SIZE[1]"}},
};

// A list of its blocks' sizes, to be written.
int32_t *written(const Tensor &list, const flashspark_block_mask_params &p, bool indices) {
  if (!list) return nullptr;
  if (indices) {
    list.require_ndim({4}, "(B, H, query blocks, key blocks)");
    list.require_size(3, (p.seqlen_k + p.block_size_k - 1) / p.block_size_k, "the key blocks");
  } else {
    list.require_ndim({3}, "(B, H, query blocks)");
  }
  list.require_size(0, p.num_seqs, "B");
  list.require_size(1, p.num_heads, "H");
  list.require_size(2, (p.seqlen_q + p.block_size_q - 1) / p.block_size_q, "the query blocks");
  list.require_dense();
  return const_cast<int32_t *>(list.int32_data());
}

}  // namespace

void create_block_mask(Reader &args) {
  flashspark_block_mask_params p;
  flashspark_block_mask_params_init(&p);
  args.set_names(kNames, kCaptured, "captured tensor");
  p.mask_mod.mod = mod_of(args.integer(kMaskMod, 0));
  p.num_seqs = args.integer(kBatch, 0);
  p.num_heads = args.integer(kHeads, 0);
  p.seqlen_q = args.integer(kQueries, 0);
  p.seqlen_k = args.integer(kKeys, 0);
  p.block_size_q = args.integer(kBlockSizeQ, 0);
  p.block_size_k = args.integer(kBlockSizeK, 0);
  if (p.block_size_q < 1 || p.block_size_k < 1)
    fail_value("BLOCK_SIZE", std::to_string(std::min(p.block_size_q, p.block_size_k)), "must be at least 1");
  p.masked_counts = written(args.tensor(kCounts), p, false);
  p.masked_indices = written(args.tensor(kIndices), p, true);
  p.full_counts = written(args.optional_tensor(kFullCounts), p, false);
  p.full_indices = written(args.optional_tensor(kFullIndices), p, true);
  p.mask_mod.num_tensors = count_of(args, kTensors, "mask_mod's captured tensors", FLASHSPARK_MAX_CAPTURED_TENSORS);
  p.mask_mod.num_scalars = count_of(args, kScalars, "mask_mod's scalars", FLASHSPARK_MAX_CAPTURED_SCALARS);
  CapturedArguments captured;
  captured.read(args, kCaptured, p.mask_mod.num_tensors, p.mask_mod.num_scalars);
  p.mask_mod.tensors = captured.tensors();
  p.mask_mod.scalars = captured.scalars();
  args.set_device(p);
  const flashspark_status status = flashspark_create_block_mask(&p);
  if (status == FLASHSPARK_OK) return;
  throw CallError{error_kind(status), in_callers_words(flashspark_last_error(), kBlockMaskNames, kFunc)};
}

}  // namespace flashspark::ffi
