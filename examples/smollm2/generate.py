"""Greedy generation for several prompts in one batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from model import Model
from paged_attention import PagedAttention


@dataclass(frozen=True)
class Step:
    """The outcome of one forward pass: a token for each sequence that is still running."""

    num_tokens: int  # in the pass: first those of the prompts, then one per sequence
    chosen: dict[int, int]  # sequence to token


def generate(
    model: Model, attention: PagedAttention, prompts: Sequence[Sequence[int]], max_tokens: int, eos: int
) -> Iterator[Step]:
    """Yields after each pass. A sequence leaves the batch and frees its pages at its end-of-text token."""
    pending = {seq: list(prompt) for seq, prompt in enumerate(prompts)}
    for _ in range(max_tokens):
        seqs, tokens = list(pending), list(pending.values())
        positions = attention.begin(seqs, [len(t) for t in tokens])
        hidden = model.forward(np.concatenate(tokens), positions, attention.attend)
        last = np.cumsum([len(t) for t in tokens]) - 1
        best = model.logits(hidden[last]).argmax(axis=-1)
        chosen = {seq: int(token) for seq, token in zip(seqs, best)}
        yield Step(len(hidden), chosen)
        for seq, token in chosen.items():
            if token == eos:
                attention.release(seq)
        pending = {seq: [token] for seq, token in chosen.items() if token != eos}
        if not pending:
            return
