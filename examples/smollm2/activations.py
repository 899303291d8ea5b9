"""Q, K and V of one layer for a page of prose: scores of real text reach 90, those of random numbers 6."""

from pathlib import Path

import flashspark
import numpy as np
from model import Model
from tokenizer import Tokenizer

PROSE = Path(__file__).with_name("prose.txt")


class Found(Exception):
    """Ends the forward pass once the layer has been reached."""


def activations(
    model: Model, tokenizer: Tokenizer, layer: int, text: str | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q (T, 9, 64), k (T, 3, 64), v (T, 3, 64), float32, after rotary embedding. Deeper layers are not computed."""
    tokens = np.array(tokenizer.encode(PROSE.read_text(encoding="utf-8") if text is None else text))
    lengths = np.array([0, len(tokens)], np.int32)
    found: list[np.ndarray] = []

    def attend(i: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        if i == layer:
            found.extend(np.ascontiguousarray(x) for x in (q, k, v))
            raise Found
        return flashspark.flash_attn_varlen_func(
            q,
            k,
            np.ascontiguousarray(v),
            cu_seqlens_q=lengths,
            cu_seqlens_k=lengths,
            max_seqlen_q=len(tokens),
            max_seqlen_k=len(tokens),
            causal=True,
        )

    try:
        model.forward(tokens, np.arange(len(tokens)), attend)
    except Found:
        return found[0], found[1], found[2]
    raise ValueError(f"layer = {layer}: must be below {model.config.num_layers}")


def dump_activations(model: Model, tokenizer: Tokenizer, layer: int, path: Path) -> None:
    q, k, v = activations(model, tokenizer, layer)
    np.savez(path, q=q, k=k, v=v)
    print(f"{path}: q {q.shape}, k {k.shape}, v {v.shape} of layer {layer}")
