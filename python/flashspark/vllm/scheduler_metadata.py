"""Scheduler metadata of a step: how its decoding is spread over the GPU, found once for all layers of a group."""

from __future__ import annotations

from typing import Any

from . import switches

# int32 words of one CTA's record, as in the kernels (tests/python/test_constants.py compares the two).
RECORD_WORDS = 32
# At least as many CTAs as an SM can hold: it has at most 2048 threads, and the kernels' CTAs have at least 128.
CTAS_PER_SM = 16


def of_step(builder: Any, metadata: Any) -> Any:
    """The scheduler_metadata for this step's attention calls; None where there is nothing to gain.

    The memory belongs to the builder and is the same at every step, so that captured graphs find each step's metadata
    in it. Calls that it does not fit (cascade, a layer with another window, lengths that have changed since) ignore it.
    """
    import torch
    from flashspark import get_scheduler_metadata

    lengths, starts, spec = metadata.seq_lens, metadata.query_start_loc, builder.kv_cache_spec
    memory = getattr(builder, "flashspark_scheduler_metadata", None)
    if memory is None:
        sms = torch.cuda.get_device_properties(lengths.device).multi_processor_count if lengths.is_cuda else 0
        memory = lengths.new_zeros(sms * CTAS_PER_SM * RECORD_WORDS, dtype=torch.int32)
        builder.flashspark_scheduler_metadata = memory
    window = getattr(metadata, "sliding_window", None)
    if window is None:
        width = getattr(spec, "sliding_window", None)
        window = (-1, -1) if width is None else (width - 1, 0)
    causal_per_seq = metadata.causal if isinstance(metadata.causal, torch.Tensor) else None
    made = get_scheduler_metadata(
        len(starts) - 1, metadata.max_query_len, metadata.max_seq_len, builder.num_heads_q, spec.num_kv_heads,
        spec.head_size, lengths, torch.float8_e4m3fn if spec.dtype.itemsize == 1 else spec.dtype,
        getattr(spec, "head_size_v", None), starts, causal=causal_per_seq is None and bool(metadata.causal),
        window_size=tuple(window), num_splits=getattr(metadata, "max_num_splits", 0),
        deterministic=switches.batch_invariant(), causal_per_seq=causal_per_seq, out=memory,
    )  # fmt: skip
    return memory if len(made) else None
