"""One schedule a step for the layers of a group: how decoding is spread over the GPU, found before the first layer."""

from __future__ import annotations

from typing import Any

from . import calls

# Words of a block's line, and more blocks than any kernel has on an SM at once.
_WORDS, _BLOCKS = 32, 16


def of_step(builder: Any, metadata: Any) -> Any:
    """What the attention calls of this step are given as scheduler_metadata; None where there is nothing to gain.

    The memory is the builder's own, the same at every step, so that captured graphs find each step's schedule in it. A
    call that it does not suit (cascade, a layer with another window, lengths that have changed since) does without.
    """
    import torch
    from flashspark import get_scheduler_metadata

    lengths, starts, spec = metadata.seq_lens, metadata.query_start_loc, builder.kv_cache_spec
    memory = getattr(builder, "flashspark_schedule", None)
    if memory is None:
        multiprocessors = (
            torch.cuda.get_device_properties(lengths.device).multi_processor_count if lengths.is_cuda else 0
        )
        memory = builder.flashspark_schedule = lengths.new_zeros(multiprocessors * _BLOCKS * _WORDS, dtype=torch.int32)
    window = getattr(metadata, "sliding_window", None)
    if window is None:
        width = getattr(spec, "sliding_window", None)
        window = (-1, -1) if width is None else (width - 1, 0)
    each = metadata.causal if isinstance(metadata.causal, torch.Tensor) else None
    made = get_scheduler_metadata(
        len(starts) - 1, metadata.max_query_len, metadata.max_seq_len, builder.num_heads_q, spec.num_kv_heads,
        spec.head_size, lengths, torch.float8_e4m3fn if spec.dtype.itemsize == 1 else spec.dtype,
        getattr(spec, "head_size_v", None), starts, causal=each is None and bool(metadata.causal),
        window_size=tuple(window), num_splits=getattr(metadata, "max_num_splits", 0),
        deterministic=calls.batch_invariant(), causal_per_seq=each, out=memory,
    )  # fmt: skip
    return memory if len(made) else None
