"""Layer norm and RMS norm with residuals, in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import dropout


def layer_norm_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    x1: None = None,
    weight1: None = None,
    bias1: None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: torch.Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    **more: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The norm of dropout(x * rowscale) + residual over the last dimension, computed in float32.

    x, residual: (.., size). weight, bias: (size,); zero_centered_weight: 1 is added. rowscale: (..), one for each row.
    prenorm: return (norm, the sum before it), in residual's type, x's without one, float32 with residual_in_fp32.
    out_dtype: of the norm; x's if None.

    Raises NotImplementedError for a second input, its weights, and what else is not listed.
    """
    unknown = {"x1": x1, "weight1": weight1, "bias1": bias1, "return_dropout_mask": return_dropout_mask or None, **more}
    for name, value in unknown.items():
        if value is not None:
            raise NotImplementedError(f"{name} = given: this flash_attn is flashspark's, which has not this form")
    total = x.float() if rowscale is None else x.float() * rowscale[..., None].float()
    if dropout_p:
        total = dropout(total, dropout_p)
    if residual is not None:
        total = total + residual.float()
    if is_rms_norm:
        normed = total * (total.square().mean(-1, keepdim=True) + eps).rsqrt()
    else:
        centred = total - total.mean(-1, keepdim=True)
        normed = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed = normed * (weight.float() + 1 if zero_centered_weight else weight.float())
    if bias is not None:
        normed = normed + bias.float()
    normed = normed.to(out_dtype or x.dtype)
    if not prenorm:
        return normed
    kept = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype
    return normed, total.to(kept)


def rms_norm_fn(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *args: Any, **kwargs: Any
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """layer_norm_fn without the mean. Arguments and errors are its."""
    return layer_norm_fn(x, weight, bias, *args, is_rms_norm=True, **kwargs)


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension of hidden_size."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.dropout_p, self.zero_centered_weight = eps, dropout_p, zero_centered_weight
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual=residual,
            eps=self.eps,
            dropout_p=self.dropout_p if self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            zero_centered_weight=self.zero_centered_weight,
        )
