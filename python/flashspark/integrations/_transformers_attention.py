"""The attention functions that flashspark.integrations.transformers registers: dense and paged."""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.flash_attention import get_target_dtype
from transformers.utils import logging

from ._transformers_masks import Rows, documents_of, documents_of_positions, is_documents, padding_of, rows_of
from .compiling import traceable

_log = logging.get_logger(__name__)

flash_attn_func = traceable("flash_attn_func")
flash_attn_varlen_func = traceable("flash_attn_varlen_func")
flash_attn_with_kvcache = traceable("flash_attn_with_kvcache")


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    block_table: torch.Tensor | None = None,
    k_cache: torch.Tensor | None = None,
    v_cache: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface. Nothing is copied where flashspark can read the views as they are.

    query: (B, heads, Tq, D). key: (B, KV heads, Tk, D). value: (B, KV heads, Tk, Dv).
    attention_mask: one of those that flashspark.integrations._transformers_masks describes; a float (B, 1 or heads, Tq,
    Tk) is added to the scores.
    position_ids: int (1, Tq) that restart within a batch of one: packed sequences, as transformers reads them.
    cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: packed sequences, as in flash_attn_varlen_func.
    block_table, k_cache, v_cache: pages of continuous batching (transformers 5.23 and newer), which a new token of each
    sequence is written into: int32 (sequences, pages of one), and (pages, page size, KV heads, D).

    Returns (B, Tq, heads, Dv) and None: there are no attention weights. Raises what flash_attn_func raises.
    """
    if kwargs.get("output_attentions"):
        _log.warning_once("flashspark returns no attention weights: use attn_implementation='eager' for those")
    query, key, value = _of_one_type(module, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    options: dict[str, Any] = {"softmax_scale": scaling, "causal": causal, "softcap": softcap or 0.0, "sinks": s_aux}
    if sliding_window is not None:
        # A causal mask cuts the right side. Models that are not causal count the token itself, as for flash-attention.
        options["window_size"] = (sliding_window - 1, sliding_window - 1)
    if dropout:
        options["dropout_p"] = dropout
    if block_table is not None and k_cache is not None and v_cache is not None and cu_seq_lens_k is not None:
        rows = [_flat(x)[:, None] for x in (query, key, value)]
        out = _paged_decode(*rows, k_cache, v_cache, cu_seq_lens_k, block_table, options).view(
            *query.shape[:3], value.shape[-1]
        )
    elif attention_mask is not None:
        out = _masked(query, key, value, attention_mask, options)
    elif cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        out = flash_attn_varlen_func(
            *map(_flat, (query, key, value)),
            cu_seq_lens_q.int(),
            cu_seq_lens_k.int(),
            None if max_length_q is None else int(max_length_q),
            None if max_length_k is None else int(max_length_k),
            **options,
        ).view(*query.shape[:3], value.shape[-1])
    elif (documents := _packed(query, key, position_ids)) is not None:
        out = _unpadded(query, key, value, documents, documents, options)
    else:
        out = flash_attn_func(query, key, value, **options)
    return out, None


def _of_one_type(module: torch.nn.Module, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Norms may leave a query in float32 that the model's type is meant for (PEFT, autocast): kernels for GPUs have
    none of that type."""
    query, key, value = tensors
    if query.dtype == key.dtype == value.dtype and (query.dtype != torch.float32 or query.device.type == "cpu"):
        return tensors
    target = get_target_dtype(query, module) or query.dtype
    return query.to(target), key.to(target), value.to(target)


def _flat(x: torch.Tensor) -> torch.Tensor:
    """(B, T, H, D) as (B * T, H, D): a view, for one sequence whatever its strides."""
    return x[0] if x.shape[0] == 1 else x.flatten(0, 1)


def _packed(query: torch.Tensor, key: torch.Tensor, position_ids: torch.Tensor | None) -> Rows | None:
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[0] != 1 or query.shape[0] != 1:
        return None
    if query.shape[1] == 1 or query.shape[1] != key.shape[1] or torch.compiler.is_compiling():
        return None  # a later part of one sequence; and torch.compile cannot look at values
    return documents_of_positions(position_ids)


def _masked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor:
    if mask.dim() == 4:
        return _written_out(query, key, value, mask, options)
    key, value = key[:, : mask.shape[1]], value[:, : mask.shape[1]]  # a static cache may have more rows than are in use
    rows, columns = query.shape[1], key.shape[1]
    if mask.dtype != torch.bool:
        if rows == columns and is_documents(mask):
            documents = documents_of(mask)
            return _unpadded(query, key, value, documents, documents, options)
        mask = mask != 0
    trains = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if trains or torch.compiler.is_compiling() or "dropout_p" in options or not (padding := padding_of(mask)).whole:
        queries = rows_of(mask, rows) if rows <= columns else rows_of(mask.new_ones(len(mask), rows), rows)
        return _unpadded(query, key, value, queries, rows_of(mask, columns), options)
    # Where nothing depends on a query's position, rows need not be left out, and may even belong to another sequence.
    placed = padding.on_the_right and (options["causal"] or "window_size" in options)
    if placed:
        options["seqused_q"] = (padding.last - (columns - rows)).clamp(min=0)
        options["out"] = query.new_zeros(*query.shape[:3], value.shape[-1])  # rows of padding are left untouched
    return flash_attn_with_kvcache(
        query, key, value, cache_seqlens=padding.last, cache_leftpad=padding.first, **options
    )


def _unpadded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    queries: Rows,
    keys: Rows,
    options: dict[str, Any],
) -> torch.Tensor:
    """Attention of the rows that belong to sequences; the others' results are zero."""
    # Every row of a batch is used by most packed ones, and then nothing has to be gathered.
    tensors = []
    for x, rows in ((query, queries), (key, keys), (value, keys)):
        flat = _flat(x)
        tensors.append(flat if len(rows.indices) == len(flat) else flat[rows.indices])
    result = flash_attn_varlen_func(
        *tensors, queries.cu_seqlens, keys.cu_seqlens, queries.longest, keys.longest, **options
    )
    shape = (*query.shape[:3], value.shape[-1])
    if len(result) == shape[0] * shape[1]:
        return result.view(shape)
    out = result.new_zeros(shape[0] * shape[1], *shape[2:])
    out[queries.indices] = result
    return out.view(shape)


def _keep(b: Any, h: Any, q: Any, k: Any, _info: Any, aux: Any) -> Any:
    return aux[0][b, 0, q, k]


def _keep_by_head(b: Any, h: Any, q: Any, k: Any, _info: Any, aux: Any) -> Any:
    return aux[0][b, h, q, k]


def _add(score: Any, b: Any, h: Any, q: Any, k: Any, _info: Any, aux: Any) -> Any:
    return score + aux[0][b, 0, q, k]


def _add_by_head(score: Any, b: Any, h: Any, q: Any, k: Any, _info: Any, aux: Any) -> Any:
    return score + aux[0][b, h, q, k]


@torch.compiler.disable  # the operators take no functions
def _written_out(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor:
    """A mask of four dimensions says all, also what is causal or outside of a window."""
    key, value = key[:, : mask.shape[-1]], value[:, : mask.shape[-1]]
    by_head = mask.shape[1] != 1
    mask = mask[..., : key.shape[1]].expand(query.shape[0], -1, query.shape[1], -1)
    if mask.dtype == torch.bool:
        options["mask_mod"] = _keep_by_head if by_head else _keep
    else:
        options["score_mod"] = _add_by_head if by_head else _add
    options |= {"causal": False, "window_size": (-1, -1)}
    return flash_attn_func(query, key, value, aux_tensors=[mask], **options)


def paged_attention(
    module: torch.nn.Module,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Any,
    cu_seq_lens_q: torch.Tensor,
    cu_seq_lens_k: torch.Tensor | dict[str, torch.Tensor],
    max_seqlen_q: int,
    max_seqlen_k: int | dict[str, int],
    block_table: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of transformers' continuous batching, "paged|flashspark": q (1, heads, total_q, D), k and v alike.

    cache: transformers' PagedAttentionCache, which the new rows are written into. block_table: int32 (groups, B, pages
    of a sequence): a batch in which every sequence has one new token; those are written and read in place. None: the
    cache gathers the keys, (total_k, KV heads, D), whose sequences cu_seq_lens_k gives for each type of layer.

    Returns (1, total_q, heads, Dv) or (B, heads, Dv), as transformers' own, and None.
    """
    window = getattr(module, "sliding_window", None)
    if isinstance(cu_seq_lens_k, dict):
        kind = "sliding_attention" if window else "full_attention"
        cu_seq_lens_k, max_seqlen_k = cu_seq_lens_k[kind], max_seqlen_k[kind]  # type: ignore[index]
    options: dict[str, Any] = {
        "softmax_scale": kwargs.get("scaling", getattr(module, "scaling", None)),
        "causal": True,
        "window_size": (window - 1, 0) if window else (-1, -1),
        "softcap": kwargs.get("softcap") or 0.0,
        "sinks": kwargs.get("s_aux"),
    }
    if block_table is not None:
        group, layer = cache.layer_index_to_group_indices[module.layer_idx]
        shape = (-1, cache.block_size, cache.num_key_value_heads, cache.head_dim)
        pages = [x[layer].view(shape) for x in (cache.key_cache, cache.value_cache)]
        rows = [x.permute(2, 0, 1, 3) for x in (q, k, v)]
        return _paged_decode(*rows, *pages, cu_seq_lens_k, block_table[group], options).squeeze(1), None
    k, v = cache.update(
        key_states=k,
        value_states=v,
        layer_idx=module.layer_idx,
        read_index=kwargs["read_index"],
        write_index=kwargs["write_index"],
    )
    q = q.transpose(1, 2)[0]
    out = flash_attn_varlen_func(
        q, k, v, cu_seq_lens_q.int(), cu_seq_lens_k.int(), int(max_seqlen_q), int(max_seqlen_k), **options
    )
    return out, None


def _paged_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    cu_seq_lens_k: torch.Tensor,
    block_table: torch.Tensor,
    options: dict[str, Any],
) -> torch.Tensor:
    """q, k, v: (B, 1, heads, D), one new token of each sequence; cu_seq_lens_k counts it. Returns (B, 1, heads, Dv)."""
    size = k.shape[0]
    lengths = (cu_seq_lens_k[1 : size + 1] - cu_seq_lens_k[:size] - 1).int()
    return flash_attn_with_kvcache(q, k_pages, v_pages, k, v, cache_seqlens=lengths, block_table=block_table, **options)
