#include "check.hpp"
#include "error.hpp"
#include "mod.hpp"
#include "validate.hpp"

namespace flashspark {
namespace {

// Sums of a position and a block of a clamped size stay within 32 bits.
constexpr int64_t kMaxPositions = int64_t{1} << 30;

}  // namespace

void validate(const BlockMaskParams &p) {
  check::version(p.struct_size, sizeof p, p.abi_version, "flashspark_block_mask_params");
  check::device(p.device, p.device_index);
  check::present("mask_mod.mod", p.mask_mod.mod, "must be given");
  check_function(p.mask_mod, false);
  check::in_range("num_seqs", p.num_seqs, 1, INT32_MAX);
  check::in_range("num_heads", p.num_heads, 1, INT32_MAX);
  check::in_range("seqlen_q", p.seqlen_q, 1, kMaxPositions);
  check::in_range("seqlen_k", p.seqlen_k, 1, kMaxPositions);
  check::in_range("block_size_q", p.block_size_q, 1, INT32_MAX);
  check::in_range("block_size_k", p.block_size_k, 1, INT32_MAX);
  if (p.num_seqs * p.num_heads > INT32_MAX / query_blocks(p))
    fail("num_seqs", p.num_seqs,
         "must be below 2^31 together with num_heads = " + std::to_string(p.num_heads) + " and the query blocks, " +
             std::to_string(query_blocks(p)));
  check::present("masked_counts", p.masked_counts, "must point to the result");
  check::present("masked_indices", p.masked_indices, "must point to the result");
  if (p.full_counts != nullptr) check::present("full_indices", p.full_indices, "must be given with full_counts");
  if (p.full_counts == nullptr) check::absent("full_indices", p.full_indices, "must be NULL without full_counts");
  check::aligned_arrays({{"masked_counts", p.masked_counts},
                         {"masked_indices", p.masked_indices},
                         {"full_counts", p.full_counts},
                         {"full_indices", p.full_indices}});
}

}  // namespace flashspark
