#include "functions.hpp"

#include "exports.hpp"
#include "names.hpp"

namespace flashspark::ffi {
namespace {

enum Extra : int32_t {
  kScoreMod = attention::kCount,
  kMaskMod,
  kScoreTensors,
  kScoreScalars,
  kMaskTensors,
  kMaskScalars,
  kBlockSizeQ,
  kBlockSizeK,
  kMaskedCounts,
  kMaskedIndices,
  kFullCounts,
  kFullIndices,
  kCaptured
};

void read_list(Reader &args, int32_t at, flashspark_attention_params &p, flashspark_block_list &list) {
  const char *const *names = kListNames + (at - kMaskedCounts), *indices_name = names[1];
  const Tensor counts = args.optional_tensor(at, 0, names[0]), indices = args.optional_tensor(at + 1, 0, indices_name);
  if (!counts) return;
  if (!indices) fail_type(indices_name, "None", std::string("must be given with ") + counts.name());
  counts.require_ndim({3}, "(batch or 1, heads or 1, query blocks)");
  indices.require_ndim({4}, "(batch or 1, heads or 1, query blocks, key blocks)");
  for (int32_t i = 0; i < 3; ++i) indices.require_size(i, counts.size(i), "the counts'");
  const auto same = [&](const char *what, int64_t &known, int64_t size) {
    if (known == 0) known = size;
    if (known != size)
      fail_value(std::string(counts.name()) + "." + what, std::to_string(size), "must be as in the other list");
  };
  same("shape[0]", p.block_batch, counts.size(0));
  same("shape[1]", p.block_heads, counts.size(1));
  same("shape[2]", p.num_blocks_q, counts.size(2));
  list.counts = counts.int32_data();
  list.width = indices.size(3);
  list.indices = list.width > 0 ? indices.int32_data() : nullptr;
  if (list.width > 1) indices.require_unit_stride();
  list.count_batch_stride = counts.stride(0);
  list.count_head_stride = counts.stride(1);
  list.count_block_stride = counts.stride(2);
  list.index_batch_stride = indices.stride(0);
  list.index_head_stride = indices.stride(1);
  list.index_block_stride = indices.stride(2);
}

}  // namespace

flashspark_mod *mod_of(int64_t handle) {
  return reinterpret_cast<flashspark_mod *>(static_cast<intptr_t>(handle));
}

int32_t count_of(const Reader &args, int32_t index, const char *what, int32_t most) {
  const int64_t count = args.integer(index, 0);
  if (count < 0 || count > most) fail_value(what, std::to_string(count), "must be from 0 to " + std::to_string(most));
  return static_cast<int32_t>(count);
}

void CapturedArguments::read(Reader &args, int32_t at, int32_t tensors, int32_t scalars) {
  for (int32_t n = 0; n < tensors; ++n, at += 2)
    tensors_.push_back(args.tensor(at + 1).captured(static_cast<int32_t>(args.integer(at, 0))));
  for (int32_t n = 0; n < scalars; ++n) scalars_.push_back(args.real(at++, 0));
}

void FunctionArguments::read(Reader &args, flashspark_attention_params &p) {
  if (!args.has(kScoreMod)) return;
  p.score_mod.mod = mod_of(args.integer(kScoreMod, 0));
  p.mask_mod.mod = mod_of(args.integer(kMaskMod, 0));
  p.score_mod.num_tensors =
      count_of(args, kScoreTensors, "score_mod's captured tensors", FLASHSPARK_MAX_CAPTURED_TENSORS);
  p.score_mod.num_scalars = count_of(args, kScoreScalars, "score_mod's scalars", FLASHSPARK_MAX_CAPTURED_SCALARS);
  p.mask_mod.num_tensors = count_of(args, kMaskTensors, "mask_mod's captured tensors", FLASHSPARK_MAX_CAPTURED_TENSORS);
  p.mask_mod.num_scalars = count_of(args, kMaskScalars, "mask_mod's scalars", FLASHSPARK_MAX_CAPTURED_SCALARS);
  p.block_size_q = args.integer(kBlockSizeQ, 0);
  p.block_size_k = args.integer(kBlockSizeK, 0);
  read_list(args, kMaskedCounts, p, p.masked_blocks);
  read_list(args, kFullCounts, p, p.full_blocks);
  const int32_t tensors = p.score_mod.num_tensors + p.mask_mod.num_tensors;
  const int32_t scalars = p.score_mod.num_scalars + p.mask_mod.num_scalars;
  captured_.read(args, kCaptured, tensors, scalars);
  end_ = kCaptured + 2 * tensors + scalars;
  p.score_mod.tensors = captured_.tensors();
  p.mask_mod.tensors = captured_.tensors() + p.score_mod.num_tensors;
  p.score_mod.scalars = captured_.scalars();
  p.mask_mod.scalars = captured_.scalars() + p.score_mod.num_scalars;
}

int64_t create_mod(const std::string &graph, bool is_score) {
  flashspark_mod *mod = nullptr;
  const flashspark_status status =
      is_score ? flashspark_score_mod_create(graph.c_str(), &mod) : flashspark_mask_mod_create(graph.c_str(), &mod);
  if (status != FLASHSPARK_OK) throw CallError{error_kind(status), flashspark_last_error()};
  return static_cast<int64_t>(reinterpret_cast<intptr_t>(mod));
}

void release_mod(int64_t handle) {
  flashspark_mod_release(mod_of(handle));
}

}  // namespace flashspark::ffi
