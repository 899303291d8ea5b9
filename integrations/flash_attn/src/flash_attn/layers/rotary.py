"""Rotary embeddings: functions of tensors and of packed ones, and the layer that keeps the tables."""

from __future__ import annotations

import torch

from ..ops.triton.rotary import apply_rotary

Offsets = int | torch.Tensor


def apply_rotary_emb(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: Offsets = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    """flash_attn.ops.triton.rotary.apply_rotary with the arguments in another order."""
    return apply_rotary(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace)


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_torch(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """apply_rotary_emb of x (B, T, heads, D) whose first token has position 0; cos may have more positions."""
    return apply_rotary(x, cos, sin, interleaved=interleaved)


def rotate_half(x: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """x turned by 90 degrees: (a, b) becomes (-b, a), for halves or for neighbours."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def apply_rotary_emb_qkv_(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cos_k: torch.Tensor | None = None,
    sin_k: torch.Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: Offsets = 0,
    num_heads_q: int | None = None,
) -> torch.Tensor:
    """Turns queries and keys in place. qkv: (B, T, 3, heads, D), or (B, T, num_heads_q + 2 * KV heads, D) with
    num_heads_q. cos_k, sin_k: other tables for keys. Returns qkv."""
    if num_heads_q is None:
        q, k = qkv[:, :, 0], qkv[:, :, 1]
    else:
        q, k = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : (qkv.shape[2] + num_heads_q) // 2]
    apply_rotary(q, cos, sin, seqlen_offsets, interleaved=interleaved, inplace=True)
    cos_k, sin_k = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
    apply_rotary(k, cos_k, sin_k, seqlen_offsets, interleaved=interleaved, inplace=True)
    return qkv


def apply_rotary_emb_kv_(
    kv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    seqlen_offsets: Offsets = 0,
) -> torch.Tensor:
    """Turns keys in place. kv: (B, T, 2, heads, D). Returns kv."""
    apply_rotary(kv[:, :, 0], cos, sin, seqlen_offsets, interleaved=interleaved, inplace=True)
    return kv


class RotaryEmbedding(torch.nn.Module):
    """The embedding with its tables of cosines and sines, which grow as positions are asked for.

    dim: numbers of a head that are turned. base: the slowest angle is about 1 / base a token. scale_base: xPos
    (arXiv:2212.10554): queries grow and keys shrink with their position. pos_idx_in_fp32 is always so.
    """

    inv_freq: torch.Tensor
    scale: torch.Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        pos_idx_in_fp32: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.base, self.interleaved, self.scale_base = dim, float(base), interleaved, scale_base
        self.pos_idx_in_fp32 = pos_idx_in_fp32
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        scale = None
        if scale_base is not None:
            scale = (torch.arange(0, dim, 2, device=device, dtype=torch.float32) + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: torch.Tensor | None = None
        self._sin_cached: torch.Tensor | None = None
        self._cos_k_cached: torch.Tensor | None = None
        self._sin_k_cached: torch.Tensor | None = None

    def _compute_inv_freq(self, device: torch.device | str | None = None) -> torch.Tensor:
        return self.base ** -(torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim)

    def _update_cos_sin_cache(
        self, seqlen: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Makes the tables for positions below seqlen, unless they are there."""
        known = self._cos_cached
        # Tables that were made under inference_mode cannot be used in training.
        usable = known is not None and known.dtype == dtype and not (self.training and known.is_inference())
        if usable and seqlen <= self._seq_len_cached and (device is None or known.device == torch.device(device)):
            return
        self._seq_len_cached = seqlen
        positions = torch.arange(seqlen, device=device, dtype=torch.float32)
        # Not from the buffer, which may have been rounded with the model's weights.
        frequencies = self.inv_freq if self.inv_freq.dtype == torch.float32 else self._compute_inv_freq(device)
        angles = torch.outer(positions, frequencies.to(positions.device))
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        power = (positions - seqlen // 2) / self.scale_base
        grown = self.scale.to(positions.device, torch.float32) ** power[:, None]
        self._cos_cached, self._sin_cached = (cos * grown).to(dtype), (sin * grown).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / grown).to(dtype), (sin / grown).to(dtype)

    def forward(
        self,
        qkv: torch.Tensor,
        kv: torch.Tensor | None = None,
        seqlen_offset: Offsets = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """qkv: (B, T, 3, heads, D), or (B, T, num_heads_q + 2 * KV heads, D) with num_heads_q, turned in place and
        returned; or with kv (B, T, 2, heads, D) the queries alone, (B, T, heads, D): returns (q, kv), kv in place.

        seqlen_offset: the position of the first token, int or (B,), which then needs max_seqlen, the highest position
        plus one.
        """
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, qkv.device, qkv.dtype)
        elif isinstance(seqlen_offset, int):
            self._update_cos_sin_cache(qkv.shape[1] + seqlen_offset, qkv.device, qkv.dtype)
        else:
            raise ValueError("max_seqlen = None: must be given with a tensor of offsets")
        cos, sin = self._cos_cached, self._sin_cached
        cos_k, sin_k = (cos, sin) if self.scale is None else (self._cos_k_cached, self._sin_k_cached)
        common = {"interleaved": self.interleaved, "seqlen_offsets": seqlen_offset}
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, num_heads_q=num_heads_q, **common)
        return apply_rotary_emb(qkv, cos, sin, inplace=True, **common), apply_rotary_emb_kv_(kv, cos_k, sin_k, **common)
