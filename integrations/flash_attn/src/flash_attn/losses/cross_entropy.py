"""Cross entropy as a layer."""

from __future__ import annotations

from typing import Any

import torch

from ..ops.triton.cross_entropy import cross_entropy_loss


class CrossEntropyLoss(torch.nn.Module):
    """flash_attn.ops.triton.cross_entropy's function, reduced: "mean" of the labels that count, "sum" or "none."""

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group: Any = None,
        return_z_loss: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "none", "sum"):
            raise NotImplementedError(f"reduction = {reduction!r}: must be 'mean', 'none' or 'sum'")
        self.ignore_index, self.reduction, self.return_z_loss = ignore_index, reduction, return_z_loss
        self.options = {
            "label_smoothing": label_smoothing,
            "logit_scale": logit_scale,
            "lse_square_scale": lse_square_scale,
            "ignore_index": ignore_index,
            "process_group": process_group,
        }

    def forward(
        self, input: torch.Tensor, target: torch.Tensor, precomputed_lse: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """input: (rows, classes). target: int64 (rows,). Returns the loss; with return_z_loss its penalty, too."""
        results = cross_entropy_loss(input, target, precomputed_lse, **self.options)
        if self.reduction == "mean":
            count = (target != self.ignore_index).sum()
            results = tuple(x.sum() / count for x in results)
        elif self.reduction == "sum":
            results = tuple(x.sum() for x in results)
        return results if self.return_z_loss else results[0]
