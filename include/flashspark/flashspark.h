/* flashspark: FlashAttention for NVIDIA SM12x GPUs and for any CPU. The C interface.
 *
 * One problem description (flashspark_attention_params) serves every implementation: the scalar oracle, the CPU engine
 * and the GPU kernels. Nothing here throws, allocates for the caller, or keeps a pointer after the call returns.
 *
 * Symbols used below:
 *   B   num_seqs      sequences in the batch          Hq  num_heads_q     query heads
 *   Tq  seqlen_q      query tokens of one sequence    Hkv num_heads_kv    key/value heads, Hq % Hkv == 0
 *   Tk  seqlen_k      keys of one sequence            D   head_dim        width of q and k
 *   P   page_size     tokens in one page              Dv  head_dim_v      width of v and out
 *
 * For query row i of a sequence and key j the position of the query on the key axis is  pos = i + Tk - Tq
 * (bottom-right alignment), and
 *
 *   s[i,j]   = softmax_scale * q_descale * k_descale * dot(q[i], k[j])
 *   s[i,j]   = softcap * tanh(s / softcap)                     if softcap > 0
 *   s[i,j]  += rel_logits[i, h, pos - j]                       if 0 <= pos - j < rel_extent
 *   s[i,j]  -= alibi_slope[h] * |pos - j|                      if alibi_slopes
 *   s[i,j]   = score_mod(s[i,j], b, h, i, j)                   if score_mod
 *   p[i,:]   = softmax over the keys kept by the mask, and the sink logit of head h in the denominator
 *   p[i,j]   = dropped(i, j) ? 0 : p[i,j] / (1 - dropout_p)    if dropout_p > 0
 *   out[i]   = v_descale * sum_j p[i,j] v[j] / output_scale
 *   lse[i]   = log(sum_j exp(s[i,j]) [+ exp(sink)])            natural logarithm
 *
 * A row whose keys are all masked gives out = 0 and lse = -inf (lse = sink if there are sinks).
 *
 * NaN and infinity. In q, and in k, v and biases of a key that the row keeps, they go through the formula. A key that
 * the row's mask drops has
 *   k      that never reaches the row, on any implementation;
 *   v      that never reaches it in cpu-reference. cpu-engine and cuda multiply v by p = 0: where v is not finite, the
 *          row's column may become NaN, if some row of the sequence keeps this key or keys on both sides of it. lse and
 *          the other columns stay right.
 * Keys before the first and behind the last that the rows of a sequence keep (outside every window, unused rows, tail
 * of the last page, unused pages) are not read and may hold anything.
 *
 * Memory. out and lse share no element with q, k, v, rel_logits or each other. The one exception is out that is q: the
 * same data, strides, dtype and width (head_dim_v == head_dim; on CUDA at most 256), on every implementation.
 * Interleaved views are allowed if they stay apart within a stride that both have in common, as slices of one
 * projection do. Tensors that are only read may overlap in any way.
 *
 * The environment. FLASHSPARK_FORCE_IMPLEMENTATION (a name that flashspark_implementation_name() gives, for attention
 * whose params name none), FLASHSPARK_CPU_TARGET (a SIMD target that this CPU runs), FLASHSPARK_NUM_THREADS (0, all, to
 * 1024) and FLASHSPARK_CHECK (0 or 1) are read once a process, at the first call. So are those of run-time compilation
 * (flashspark_mod): FLASHSPARK_NVRTC (the path of libnvrtc; else it is searched for), FLASHSPARK_CACHE (0: keep no
 * compiled kernels on disk), FLASHSPARK_CACHE_DIR (a path; else $XDG_CACHE_HOME/flashspark/kernels or
 * ~/.cache/flashspark/kernels; Windows: %LOCALAPPDATA%\flashspark\kernels) and FLASHSPARK_CACHE_MAX_MB (1 to 1048576;
 * 256). Empty is as if not set; with any other value every call that takes params fails with
 * FLASHSPARK_INVALID_ARGUMENT. To compare implementations within one process, name them in params->implementation.
 */
#ifndef FLASHSPARK_FLASHSPARK_H_
#define FLASHSPARK_FLASHSPARK_H_

#include <stddef.h>
#include <stdint.h>

/* On Windows, programs that link the static library define FLASHSPARK_STATIC. */
#if defined(_WIN32) && defined(FLASHSPARK_STATIC)
#define FLASHSPARK_API
#elif defined(_WIN32) && defined(FLASHSPARK_BUILDING)
#define FLASHSPARK_API __declspec(dllexport)
#elif defined(_WIN32)
#define FLASHSPARK_API __declspec(dllimport)
#elif defined(__GNUC__)
#define FLASHSPARK_API __attribute__((visibility("default")))
#else
#define FLASHSPARK_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Version of the structs below; a library refuses a struct of another version (FLASHSPARK_VERSION_MISMATCH). */
#define FLASHSPARK_ABI_VERSION 1u

typedef enum flashspark_status {
  FLASHSPARK_OK = 0,
  FLASHSPARK_INVALID_ARGUMENT = 1, /* a field breaks its rule; nothing was computed or written */
  FLASHSPARK_INVALID_TYPE = 2,     /* a dtype breaks its rule; nothing was computed or written */
  FLASHSPARK_UNSUPPORTED = 3, /* legal, but no implementation here offers it; the error lists what each one lacks */
  FLASHSPARK_VERSION_MISMATCH = 4, /* struct_size or abi_version is not this library's */
  FLASHSPARK_OUT_OF_MEMORY = 5,
  FLASHSPARK_DEVICE_ERROR = 6, /* the device or its driver reported an error */
  FLASHSPARK_INTERNAL = 7
} flashspark_status;

typedef enum flashspark_dtype {
  FLASHSPARK_DTYPE_NONE = 0,
  FLASHSPARK_FLOAT32 = 1,
  FLASHSPARK_FLOAT16 = 2,
  FLASHSPARK_BFLOAT16 = 3,
  FLASHSPARK_FLOAT8_E4M3 = 4, /* OCP e4m3fn: no infinity, 0x7f and 0xff are NaN, largest finite value 448 */
  /* Only of captured tensors (flashspark_captured_tensor): */
  FLASHSPARK_FLOAT64 = 5,
  FLASHSPARK_BOOL = 6, /* one byte; anything but 0 is true */
  FLASHSPARK_UINT8 = 7,
  FLASHSPARK_INT8 = 8,
  FLASHSPARK_INT16 = 9,
  FLASHSPARK_INT32 = 10,
  FLASHSPARK_INT64 = 11
} flashspark_dtype;

typedef enum flashspark_device { FLASHSPARK_CPU = 0, FLASHSPARK_CUDA = 1 } flashspark_device;

/* How prefix_ranges is laid out (PrefixLM: tokens of one image see each other in both directions). */
typedef enum flashspark_prefix_mode {
  FLASHSPARK_PREFIX_NONE = 0,
  FLASHSPARK_PREFIX_PER_SEQ = 1,  /* (B, num_prefix_ranges, 2) int32; an unused slot is (-1, -1) or start > end */
  FLASHSPARK_PREFIX_PER_TOKEN = 2 /* (total_q, 2) int32: the range that holds this query token, or (-1, -1) */
} flashspark_prefix_mode;

/* One tensor. Strides count elements; the last dimension (D or Dv) is contiguous. A stride may be any value, 0 and
 * negative included, as long as every address that is used lies in the caller's memory. */
typedef struct flashspark_tensor {
  void *data;
  int64_t batch_stride; /* dense: from sequence to sequence; paged k, v: from page to page; varlen: unused */
  int64_t token_stride;
  int64_t head_stride;
  int32_t dtype; /* flashspark_dtype */
  int32_t reserved;
} flashspark_tensor;

/* Factors of an fp8 tensor: float32, one per (sequence, KV head), 0 strides allowed. data == NULL means 1. */
typedef struct flashspark_scale {
  const float *data;
  int64_t batch_stride;
  int64_t head_stride;
} flashspark_scale;

/* A function of scores or of positions:
 *
 *   score_mod(score, b, h, q_idx, kv_idx)   the new score; the result has type f32
 *   mask_mod(b, h, q_idx, kv_idx)           whether the row keeps the key; the result has type bool
 *
 * Immutable and reference counted; any thread may use and release it. A call holds no reference once it has returned.
 * On a GPU the first call with a function, a head_dim and a dtype compiles a kernel by NVRTC, which takes about a
 * second, and keeps it in memory and on disk (FLASHSPARK_CACHE_DIR). */
typedef struct flashspark_mod flashspark_mod;

/* A tensor that a function reads at any index. Its contents, sizes and strides may change from call to call. An index
 * in [-size, -1] counts from the end. One that is out of range reads the nearest element; on the CPU the call then
 * fails with FLASHSPARK_INVALID_ARGUMENT, once everything is computed, if the row keeps the key for which it was read.
 */
#define FLASHSPARK_MAX_CAPTURED_RANK 8
#define FLASHSPARK_MAX_CAPTURED_TENSORS 16 /* of a function */
#define FLASHSPARK_MAX_CAPTURED_SCALARS 16
typedef struct flashspark_captured_tensor {
  const void *data; /* aligned to its elements */
  int32_t dtype;    /* flashspark_dtype, but for e4m3 */
  int32_t rank;
  int64_t shape[FLASHSPARK_MAX_CAPTURED_RANK];   /* each in 1 .. 2^31 - 1 */
  int64_t strides[FLASHSPARK_MAX_CAPTURED_RANK]; /* elements */
} flashspark_captured_tensor;

/* A function with what its graph's `load N` and `scalar N` read. mod == NULL: no function. */
typedef struct flashspark_function {
  const flashspark_mod *mod;
  const flashspark_captured_tensor *tensors; /* (num_tensors) in host memory; their data is on the device */
  const double *scalars;                     /* (num_scalars) in host memory */
  int32_t num_tensors, num_scalars;
} flashspark_function;

/* For each block of query tokens a list of key blocks: torch's BlockMask (kv_num_blocks, kv_indices), FA4's
 * block_sparse_tensors. int32 on the device. counts == NULL: no list. */
typedef struct flashspark_block_list {
  const int32_t *counts;  /* (B or 1, Hq or 1, query blocks) */
  const int32_t *indices; /* (B or 1, Hq or 1, query blocks, width): the first counts[..] of a row are used */
  int64_t count_batch_stride, count_head_stride, count_block_stride; /* elements; 0 where there is one for all */
  int64_t index_batch_stride, index_head_stride, index_block_stride;
  int64_t width;
} flashspark_block_list;

/* Forward attention. Set every byte to zero, then fill in what is needed: flashspark_attention_params_init() does the
 * first step and sets the defaults that are not zero. */
typedef struct flashspark_attention_params {
  uint32_t struct_size; /* sizeof(flashspark_attention_params) */
  uint32_t abi_version; /* FLASHSPARK_ABI_VERSION */

  /* Where and how. */
  int32_t device;             /* flashspark_device: where every pointer below lives */
  int32_t device_index;       /* CUDA device ordinal; 0 for the CPU */
  void *stream;               /* CUstream; NULL is the default stream; unused on the CPU */
  const char *implementation; /* NULL: the best that fits. Else a name that flashspark_implementation_name() gives */
  int32_t num_threads;        /* CPU threads; 0: all */
  int32_t num_splits;         /* KV splits: 0 chooses, 1 forbids splitting, n asks for n (within 1 GiB of scratch) */
  int32_t deterministic;      /* 1: a sequence's results are the same to the last bit on every run, whatever its
                               * neighbours and the number of threads. On CUDA a row's bits depend on its own query
                               * and keys alone, so that a prompt may also be cut into chunks; on the CPU chunks may
                               * differ in the last bits of float32, since other tiles add in another order */
  int32_t check_device;       /* 1: on CUDA, read the metadata back and check it with the rules and errors of the CPU.
                               * Waits for the stream, and fails while that is being captured. FLASHSPARK_CHECK=1
                               * does so for every call */

  /* Sizes. */
  int64_t num_seqs;       /* B >= 0 */
  int64_t num_heads_q;    /* Hq > 0 */
  int64_t num_heads_kv;   /* Hkv > 0, divides Hq */
  int64_t head_dim;       /* D: multiple of 8, 8..512 */
  int64_t head_dim_v;     /* Dv: multiple of 8, 8..512 */
  int64_t max_seqlen_q;   /* upper bound of Tq; exact for dense q */
  int64_t max_seqlen_k;   /* upper bound of Tk; exact for dense and paged k without seqused_k, and then at most
                           * num_page_slots * page_size */
  int64_t total_q;        /* varlen: rows of q and out; dense: 0 */
  int64_t total_k;        /* varlen k, v: rows; dense and paged: 0 */
  int64_t num_kv_seqs;    /* rows of k, v (dense) or of page_table that kv_batch_index may name; 0: num_seqs */
  int64_t num_pages;      /* paged: pages in the cache; else 0 */
  int64_t page_size;      /* paged: tokens in a page, 1 to 2^20, fast on a GPU in multiples of 16; else 0 */
  int64_t num_page_slots; /* paged: entries in one row of page_table */

  /* Tensors. */
  flashspark_tensor q;   /* dense (B, Tq, Hq, D), varlen (total_q, Hq, D): f32, f16, bf16, e4m3 */
  flashspark_tensor k;   /* dense (B, Tk, Hkv, D), varlen (total_k, Hkv, D), paged (num_pages, P, Hkv, D) */
  flashspark_tensor v;   /* the same with Dv; may lie inside k's rows (packed caches); dtype of k */
  flashspark_tensor out; /* dense (B, Tq, Hq, Dv) or varlen (total_q, Hq, Dv) */

  /* Lengths and pages: contiguous int32 on the device. NULL where absent.
   *
   * The CPU checks every entry and refuses what is out of range. A GPU call does not look at them on the host: whatever
   * they hold, its kernels read and write nothing outside the tensors. They clamp offsets to [0, total_q] and [0,
   * total_k], lengths to what the offsets, the tensor or the page table have room for, leftpad_k to the sequence's
   * length, and page numbers and batch indices to those that exist. The results are then undefined. check_device finds
   * such entries. */
  const int32_t *cu_seqlens_q; /* (B + 1) row offsets into q and out; NULL: q is dense */
  const int32_t *cu_seqlens_k; /* (B + 1) row offsets into k and v; not with page_table */
  const int32_t *seqused_q;    /* (B) query rows in use; the rest of the sequence's rows are left untouched */
  const int32_t *seqused_k;    /* (B) keys in use */
  const int32_t *leftpad_k;    /* (B) keys to skip at the start of a dense or paged sequence; they count in its length.
                                * With as many as the length or more the sequence has no keys */
  const int32_t *kv_batch_index; /* (B) the batch row of dense k, v, or the row of page_table, of this sequence */
  const int32_t *page_table;     /* (B, num_page_slots), or with kv_batch_index (num_kv_seqs, num_page_slots): page
                                  * numbers; entries past a sequence's end are never read */
  int64_t page_table_stride;     /* elements from row to row, >= num_page_slots */

  /* Scores. */
  float softmax_scale;                              /* finite, >= 0 */
  float softcap;                                    /* 0: off */
  flashspark_scale q_descale, k_descale, v_descale; /* (B, Hkv); only read for e4m3 tensors */
  const float *output_scale;                        /* 1 element; only for e4m3 out: out is divided by it. NULL: 1 */
  const void *sinks;                                /* (Hq) logits that only enter the denominator. NULL: none */
  int32_t sinks_dtype;                              /* f32, f16, bf16 */
  int32_t rel_dtype;                                /* dtype of rel_logits: f32, f16, bf16 */
  const void *rel_logits;   /* relative-position bias (total_q or B * max_seqlen_q, Hq, rel_extent). NULL: none */
  int64_t rel_extent;       /* distances 0 .. rel_extent - 1 have a bias */
  int64_t rel_token_stride; /* elements */
  int64_t rel_head_stride;
  const float *alibi_slopes;  /* (Hq), or (B, Hq) with alibi_batch_stride. NULL: none */
  int64_t alibi_batch_stride; /* elements; 0: one set of slopes for all sequences */

  /* Mask. keep(i, j) = [j <= pos if causal] and [pos - j <= window_left] and [j - pos <= window_right]; widened by
   * prefix ranges and R-SWA as their fields say. pos = i + Tk - Tq; i, j and pos count from the sequence's first row
   * (behind the left padding). */
  int32_t causal;                /* 0 or 1 */
  int32_t prefix_mode;           /* flashspark_prefix_mode */
  const int32_t *causal_per_seq; /* (B), 1: causal; replaces `causal` when given */
  int64_t window_left;           /* inclusive, counted from pos; -1: open */
  int64_t window_right;          /* inclusive; -1: open */
  int64_t attention_chunk;       /* > 0: and [floor(j / attention_chunk) == floor(pos / attention_chunk)]; 0: off. Not
                                  * with rswa_window */
  const int32_t
      *prefix_ranges;          /* inclusive [start, end] on the key axis: keep also every j in a range that holds pos */
  int64_t num_prefix_ranges;   /* slots a sequence (FLASHSPARK_PREFIX_PER_SEQ) */
  int32_t prefix_clamp_window; /* 1: a range keeps only keys with pos - j <= window_left */
  int32_t rswa_window;         /* > 0: keep j when j <= pos and (j < rswa_prefix_lens[b] or pos - j < rswa_window) */
  const int32_t *rswa_prefix_lens; /* (B) */

  /* The user's functions. score_mod changes scores behind all of the above; mask_mod keeps fewer keys. q_idx counts the
   * sequence's query tokens, kv_idx its keys, both from 0 (behind the left padding). */
  flashspark_function score_mod, mask_mod;

  /* Block sparsity: only keys of listed blocks are kept. A block of `masked_blocks` asks mask_mod, if there is one, a
   * block of `full_blocks` does not; the other masks hold in both. The lists say what is computed, whatever mask_mod
   * says elsewhere. A block must not be listed twice. On the CPU counts and indices are checked; a GPU clamps counts to
   * [0, width] and indices to blocks that exist. */
  flashspark_block_list masked_blocks, full_blocks;
  int64_t block_size_q, block_size_k; /* tokens, keys: multiples of 16. 0 without lists */
  int64_t num_blocks_q;               /* query blocks of a list: at least max_seqlen_q / block_size_q */
  int64_t block_batch, block_heads;   /* 1 or B, 1 or Hq: of the lists */

  /* Dropout (docs/design/dropout.md): each p[i,j] becomes 0 with probability dropout_p, a multiple of 2^-15, and is
   * otherwise divided by 1 - dropout_p; lse is that of all of them. Which ones are dropped depends on seed, offset,
   * sequence, query head, query token and key alone: the same on every implementation, device, tile and split. */
  float dropout_p;               /* 0 <= dropout_p < 1; 0: none */
  uint32_t reserved_dropout;     /* 0 */
  uint64_t dropout_seed;         /* of the Philox generator */
  uint64_t dropout_offset;       /* another number for each call under one seed */
  const uint64_t *dropout_state; /* (2) on the device: seed and offset, instead of the two above. NULL: none. A CUDA
                                  * graph that was captured with it drops anew what its contents then say */

  /* Results beside out. */
  float *lse; /* natural log. dense (B, Hq, Tq), varlen (Hq, total_q). NULL: not wanted */
  int64_t lse_batch_stride;
  int64_t lse_head_stride;
  int64_t lse_token_stride;

  /* What flashspark_attention_schedule() has written for a problem like this one, or NULL. It never changes the result:
   * metadata that is too small, or that was made from other lengths or for another problem, is not used. */
  int32_t *scheduler_metadata;
  int64_t scheduler_metadata_size; /* elements */

  /* Scratch memory on the device, 16-byte aligned. flashspark_attention_workspace_size() says how much. */
  void *workspace;
  size_t workspace_size; /* bytes */
} flashspark_attention_params;

/* Where the gradient of a floating-point tensor goes that score_mod captures: float32, of the tensor's shape. */
typedef struct flashspark_captured_gradient {
  float *data;                                   /* NULL: not wanted */
  int64_t strides[FLASHSPARK_MAX_CAPTURED_RANK]; /* elements; no two elements share an address */
} flashspark_captured_gradient;

/* The gradients of flashspark_attention_forward(), from dout, the gradient of its out, and dlse, that of its lse. With
 * the modified scores s and the probabilities of the formula above,
 *
 *   p[i,j]  = exp(s[i,j] - lse[i])                      0 for keys that the mask drops, and where lse = -inf
 *   z[i,j]  = dropped(i, j) ? 0 : 1 / (1 - dropout_p)   1 without dropout
 *   dv[j]   = sum_i p[i,j] z[i,j] dout[i]
 *   ds[i,j] = p[i,j] (z[i,j] dot(dout[i], v[j]) - dot(dout[i], out[i]) + dlse[i])
 *
 * and from ds, the gradient of a modified score, by the chain rule those of everything that the score was made of. A
 * key with p = 0 adds nothing to any gradient. dk and dv of a KV head are the sums over its query heads. Probabilities
 * come from lse, which may also be that of a longer row of keys of which this call has a part: with its out, and dout,
 * the call gives this part's gradients.
 *
 * Every gradient is written, not added to, and whole: what belongs to no token in use (seqused_q, seqused_k, rows
 * outside all sequences) becomes 0. Not taken: page_table, kv_batch_index, leftpad_k, fp8 tensors, output_scale, an out
 * of another dtype than q's, or one that is q itself.
 *
 * NaN and infinity go through the formula, with the exception that an implementation other than cpu-reference may
 * multiply dout by p = 0: where dout is not finite, dv of keys that the row's mask drops may become NaN, too.
 *
 * Memory. Each gradient shares no element with any input or other gradient; interleaved views are allowed as above. */
typedef struct flashspark_attention_backward_params {
  uint32_t struct_size; /* sizeof(flashspark_attention_backward_params) */
  uint32_t abi_version; /* FLASHSPARK_ABI_VERSION */

  /* The problem as the forward call had it. out and lse hold what that call gave; both are read, none is written.
   * num_splits, scheduler_metadata and workspace are not looked at. deterministic: 1 asks that gradients are the same
   * to the last bit on every run, on the CPU with any number of threads. On a GPU those in dtensors are then exact
   * sums, rounded once, which take 84 bytes of scratch memory an element, up to 2 GiB: more elements take more time.
   * With seqused_k and cu_seqlens_k no sequence may reach beyond its own keys: the CPU refuses it, on a GPU dk and dv
   * are undefined. */
  flashspark_attention_params forward;

  flashspark_tensor dout; /* as out; dtype of q */
  flashspark_tensor dq;   /* as q, k and v, with strides of their own; dtype of q. data == NULL: not wanted */
  flashspark_tensor dk;
  flashspark_tensor dv;
  const float *dlse; /* laid out as lse, with its strides. NULL: 0 everywhere */

  /* Gradients of what else the scores depend on. NULL: not wanted. */
  float *dsinks;        /* (Hq) contiguous */
  float *drel_logits;   /* laid out as rel_logits, with its strides, in which no two elements share an address */
  float *dalibi_slopes; /* contiguous: (Hq), or (B, Hq) if alibi_batch_stride != 0 */
  const flashspark_captured_gradient *dtensors; /* (score_mod.num_tensors) in host memory; the data on the device */

  /* Scratch memory on the device, 16-byte aligned. flashspark_attention_backward_workspace_size() says how much. */
  void *workspace;
  size_t workspace_size; /* bytes */
} flashspark_attention_backward_params;

/* Writes new keys and values into a dense or paged cache, turning the new keys (and q, in place) by rotary embedding
 * when cos and sin are given. Row i of sequence b goes to row seqlens[b] + i of its cache, or, with slot_mapping, row t
 * to slot slot_mapping[t] of the cache. It turns by position seqlens[b] + i, left padding included, or
 * rotary_seqlens[b] + i. Sizes as above.
 *
 * k_new, v_new and q share no element with the caches, nor q with k_new and v_new (slices of one projection may lie
 * between each other, as above); v_cache may lie inside k_cache's rows. No two rows may go to the same row of the
 * cache: the CPU refuses them, on a GPU it is undefined which one stays. The CPU checks every length, page and slot and
 * refuses what is out of range before it writes; a GPU leaves out rows that the cache has no room for, or whose
 * position is not in cos and sin. */
typedef struct flashspark_append_params {
  uint32_t struct_size; /* sizeof(flashspark_append_params) */
  uint32_t abi_version;
  int32_t device; /* flashspark_device */
  int32_t device_index;
  void *stream;
  int32_t check_device; /* as above */
  int32_t reserved0;

  int64_t num_seqs;
  int64_t num_heads_q; /* only with rotary embedding of q */
  int64_t num_heads_kv;
  int64_t head_dim;       /* 1..512 */
  int64_t head_dim_v;     /* 1..512 */
  int64_t seqlen_new;     /* new rows of each sequence (dense k_new), or their upper bound (cu_seqlens_new) */
  int64_t total_new;      /* rows of k_new with cu_seqlens_new or slot_mapping; else 0 */
  int64_t seqlen_q;       /* rows of each sequence (dense q), or their upper bound (cu_seqlens_q) */
  int64_t total_q;        /* rows of q with cu_seqlens_q or slot_mapping; else 0 */
  int64_t seqlen_cache;   /* dense: rows of one cache sequence; paged: 0 */
  int64_t num_cache_rows; /* sequences of a dense cache, or rows of page_table, that kv_batch_index may name */
  int64_t num_pages, page_size, num_page_slots;

  flashspark_tensor k_new, v_new;     /* (B, seqlen_new, Hkv, D | Dv) or (total_new, Hkv, D | Dv) */
  flashspark_tensor k_cache, v_cache; /* as k and v above; e4m3 caches take f32, f16, bf16 rows divided by k_scale */
  flashspark_tensor q;                /* optional: rotated in place; (B, seqlen_q, Hq, D) or (total_q, Hq, D) */

  const int32_t *seqlens;        /* (B) keys in the cache before the call. NULL: 0 */
  const int32_t *cu_seqlens_new; /* (B + 1) or NULL */
  const int32_t *cu_seqlens_q;   /* (B + 1) or NULL: row offsets into q. NULL without q */
  const int32_t *seqused_q;      /* (B) or NULL: rows of q in use; the others are not turned. NULL without q */
  const int32_t *kv_batch_index; /* (B) or NULL: the sequence of a dense cache, or the row of page_table */
  const int32_t *rotary_seqlens; /* (B) or NULL: replace seqlens in rotary positions. NULL without cos, sin */
  const int32_t *page_table;     /* (B or num_cache_rows, num_page_slots) */
  int64_t page_table_stride;
  flashspark_scale k_descale, v_descale; /* of an e4m3 cache */

  const void *rotary_cos, *rotary_sin; /* (seqlen_rotary, rotary_dim / 2), see rotary_stride. NULL: no rotation */
  int32_t rotary_dtype;                /* f32, f16, bf16 */
  int32_t rotary_interleaved;          /* 1: pairs (0, 1), (2, 3) ..; 0: pairs (0, r/2), (1, r/2 + 1) .. */
  int64_t seqlen_rotary;               /* positions in cos and sin: above that of every row that turns */
  int64_t rotary_dim;                  /* multiple of 2, <= D */
  int32_t q_rotary_per_token; /* 1: q row i turns as new row i does; 0: all rows as new row 0 (not with slot_mapping) */
  int32_t reserved1;

  /* (total_new) contiguous, on the device: row t goes to row slot_mapping[t] % page_size of page slot_mapping[t] /
   * page_size; rows of negative entries are left out, no two others are equal. num_seqs is 1, the sequence of the
   * scales; page_size may be any number, and num_pages * page_size is below 2^31. NULL: no slots. Not with seqlens,
   * cu_seqlens_new, cu_seqlens_q, seqused_q, kv_batch_index, rotary_seqlens or page_table; q has total_new
   * rows (total_q is total_new). */
  const int64_t *slot_mapping;
  /* (total_new) contiguous, on the device; with slot_mapping and rotary_cos, else NULL: row t of k_new and of q turns
   * by position rotary_positions[t], which is from 0 to seqlen_rotary - 1. q's row also turns where no slot takes k's.
   */
  const int64_t *rotary_positions;
  int64_t rotary_stride; /* elements between positions of rotary_cos, and of rotary_sin; 0: rotary_dim / 2 */
} flashspark_append_params;

/* Block lists of a mask function: for each block of query tokens, which blocks of keys it sees, wholly or in part. No
 * memory but that of the lists is needed, however long the sequences are.
 *
 * The function is asked about B sequences and H heads of seqlen_q query tokens and seqlen_k keys each, with offsets of
 * 0. An index of a captured tensor that is out of range reads the nearest element, on the CPU, too, and is no error. A
 * block is seen wholly if it has block_size_q * block_size_k scores and all are kept: a block that sticks out of a
 * sequence never is. */
typedef struct flashspark_block_mask_params {
  uint32_t struct_size; /* sizeof(flashspark_block_mask_params) */
  uint32_t abi_version;
  int32_t device; /* flashspark_device: where captured tensors and lists live */
  int32_t device_index;
  void *stream;
  int32_t num_threads; /* CPU threads; 0: all */
  int32_t reserved0;

  flashspark_function mask_mod;
  int64_t num_seqs;                   /* B > 0, and */
  int64_t num_heads;                  /* H > 0: 1 for a mask that all have in common */
  int64_t seqlen_q, seqlen_k;         /* 1 to 2^30 */
  int64_t block_size_q, block_size_k; /* 1 to 2^31 - 1 */

  /* Contiguous: counts (B, H, query blocks), indices (B, H, query blocks, key blocks). Each row of indices has all key
   * blocks, those of the list first, both parts in ascending order. full_counts and full_indices NULL: blocks that are
   * seen wholly are among the masked ones. */
  int32_t *masked_counts, *masked_indices;
  int32_t *full_counts, *full_indices;
} flashspark_block_mask_params;

/* Zeroes the struct and sets struct_size, abi_version, open windows and softmax_scale = 1. */
FLASHSPARK_API void flashspark_attention_params_init(flashspark_attention_params *params);
FLASHSPARK_API void flashspark_attention_backward_params_init(flashspark_attention_backward_params *params);
FLASHSPARK_API void flashspark_append_params_init(flashspark_append_params *params);
FLASHSPARK_API void flashspark_block_mask_params_init(flashspark_block_mask_params *params);

/* Makes a function from `text`, which is copied: one function in C, or a graph (docs/design/score-graph.md), which
 * begins with "flashspark-graph". The same on every device; errors name the line and what is wrong with it.
 *
 *   float alibi(float score, int b, int h, int q_idx, int kv_idx, const float *slopes, int window) {
 *     int distance = q_idx - kv_idx;
 *     if (distance >= window) return -INFINITY;
 *     return score - slopes[h] * distance;
 *   }
 *
 * A mask function begins with (int b, int h, int q_idx, int kv_idx) and returns bool. Behind the positions stand what
 * it captures: pointers are tensors, read by as many indices as they have dimensions, numbers are scalars, each counted
 * in order; int parameters called seqlen_q, seqlen_k, offset_q and offset_k are those of the sequence. docs/flex.md has
 * the statements, operators and functions. */
FLASHSPARK_API flashspark_status flashspark_score_mod_create(const char *text, flashspark_mod **mod);
FLASHSPARK_API flashspark_status flashspark_mask_mod_create(const char *text, flashspark_mod **mod);
/* The number of the captured tensor, or scalar, whose parameter has this name in the C text; -1: there is none. */
FLASHSPARK_API int32_t flashspark_mod_tensor_index(const flashspark_mod *mod, const char *name);
FLASHSPARK_API int32_t flashspark_mod_scalar_index(const flashspark_mod *mod, const char *name);
FLASHSPARK_API void flashspark_mod_retain(flashspark_mod *mod);  /* one reference more */
FLASHSPARK_API void flashspark_mod_release(flashspark_mod *mod); /* one less; NULL is allowed */

/* Folders, separated by colons (Windows: semicolons), in which to look for libnvrtc before the system's: where Python
 * keeps NVIDIA's wheels, which a C library does not know. Without effect once NVRTC is in use. */
FLASHSPARK_API void flashspark_set_nvrtc_search_path(const char *folders);

/* Computes out (and lse). On the CPU it returns when done; on a GPU when the work is on the stream. */
FLASHSPARK_API flashspark_status flashspark_attention_forward(const flashspark_attention_params *params);

/* The same for a caller with an allocator of its own: where the call needs scratch memory and params->workspace is
 * NULL, it takes all of it from allocate(context, bytes), once, instead of from the driver. It checks and plans once,
 * where flashspark_attention_workspace_size() before flashspark_attention_forward() does both twice. What `allocate`
 * returns is aligned to 16 bytes and lies on the device; the caller keeps it until the work on the stream is done, or
 * gives it back in the stream's order. NULL makes the call fail with FLASHSPARK_OUT_OF_MEMORY, before any launch.
 * `allocate` may be NULL, and is not called for a problem of the CPU. */
typedef void *(*flashspark_allocator)(void *context, size_t bytes);
FLASHSPARK_API flashspark_status flashspark_attention_forward_with_allocator(const flashspark_attention_params *params,
                                                                             flashspark_allocator allocate,
                                                                             void *context);

/* Bytes of workspace that flashspark_attention_forward() needs for these params (0 on the CPU). */
FLASHSPARK_API flashspark_status flashspark_attention_workspace_size(const flashspark_attention_params *params,
                                                                     size_t *size);

/* Work distribution of decoding, found once for many calls: layers of a model that attend to sequences of the same
 * lengths, or replays of a graph. Writes params->scheduler_metadata on the stream, from the lengths on the device at
 * that time; later calls that are given it start sooner (docs/experiments.md E40). The params have device, stream,
 * sizes, dtypes, lengths, mask, num_splits and deterministic as the calls will have them; addresses and strides of
 * tensors, and page_table, are not looked at. For a problem that needs no schedule nothing is written.
 */
FLASHSPARK_API flashspark_status flashspark_attention_schedule(const flashspark_attention_params *params);

/* Elements of scheduler_metadata that flashspark_attention_schedule() writes for these params; 0: none. */
FLASHSPARK_API flashspark_status flashspark_attention_schedule_size(const flashspark_attention_params *params,
                                                                    int64_t *size);

/* Checks the params as flashspark_attention_forward() does; computes nothing. */
FLASHSPARK_API flashspark_status flashspark_attention_validate(const flashspark_attention_params *params);

/* Writes as text which implementation would run and why, or what each one lacks, and on a GPU every launch: kernel,
 * grid, tile, splits or Stream-K, scratch memory. Returns the status that flashspark_attention_forward() would give.
 * `buffer` may be NULL; it is always terminated when size > 0. */
FLASHSPARK_API flashspark_status flashspark_attention_explain(const flashspark_attention_params *params, char *buffer,
                                                              size_t size);

/* Computes the gradients that are wanted. On the CPU it returns when done; on a GPU when the work is on the stream. The
 * other four are to it what their namesakes above are to flashspark_attention_forward(). */
FLASHSPARK_API flashspark_status flashspark_attention_backward(const flashspark_attention_backward_params *params);
FLASHSPARK_API flashspark_status flashspark_attention_backward_with_allocator(
    const flashspark_attention_backward_params *params, flashspark_allocator allocate, void *context);
FLASHSPARK_API flashspark_status
flashspark_attention_backward_workspace_size(const flashspark_attention_backward_params *params, size_t *size);
FLASHSPARK_API flashspark_status
flashspark_attention_backward_validate(const flashspark_attention_backward_params *params);
FLASHSPARK_API flashspark_status
flashspark_attention_backward_explain(const flashspark_attention_backward_params *params, char *buffer, size_t size);

FLASHSPARK_API flashspark_status flashspark_append_kv(const flashspark_append_params *params);

/* Writes the lists: on the CPU it returns when done, on a GPU when the work is on the stream, without waiting for it.
 */
FLASHSPARK_API flashspark_status flashspark_create_block_mask(const flashspark_block_mask_params *params);

/* The last error of this thread, never NULL. Names the argument, its value and the rule. */
FLASHSPARK_API const char *flashspark_last_error(void);

/* Implementations in this build, best first; NULL past the end. */
FLASHSPARK_API const char *flashspark_implementation_name(int32_t index);
FLASHSPARK_API const char *flashspark_implementation_description(int32_t index);

FLASHSPARK_API const char *flashspark_version(void); /* "0.1.0" */

/* The SIMD target in use ("AVX2", "NEON", ...), and the threads of num_threads == 0. They cannot fail: if a switch of
 * the environment has a wrong value, they return what holds without it. */
FLASHSPARK_API const char *flashspark_cpu_target(void);
FLASHSPARK_API int32_t flashspark_cpu_threads(void);
FLASHSPARK_API const char *flashspark_status_name(flashspark_status status);
FLASHSPARK_API size_t flashspark_dtype_size(int32_t dtype);      /* bytes; 0 for an unknown dtype */
FLASHSPARK_API const char *flashspark_dtype_name(int32_t dtype); /* "bfloat16"; "unknown" for an unknown dtype */

#ifdef __cplusplus
}
#endif
#endif /* FLASHSPARK_FLASHSPARK_H_ */
