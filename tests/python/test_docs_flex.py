"""The examples of docs/flex.md, run in order as a reader would, against float64. Skipped without torch."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from flex_reference import check, kept_by

torch = pytest.importorskip("torch")
pytest.importorskip("torch.nn.attention.flex_attention")
TEXT = (Path(__file__).resolve().parents[2] / "docs" / "flex.md").read_text()
# Section: names of its score function and of its mask functions.
EXAMPLES = {
    "ALiBi": ("alibi", ["causal"]),
    "Documents": (None, ["causal", "same_document"]),
    "A sliding window with sink tokens": (None, ["window_and_sinks"]),
    "PrefixLM": (None, ["prefix_lm"]),
    "A learned bias": ("learned", ["causal"]),
    "Models that call torch's flex_attention": ("alibi", ["causal"]),
}


def sections():
    """(title, Python blocks) of the sections that have some."""
    for part in re.split(r"^## ", TEXT, flags=re.MULTILINE):
        blocks = re.findall(r"^```python\n(.*?)^```", part, flags=re.MULTILINE | re.DOTALL)
        if blocks:
            yield part.partition("\n")[0], blocks


def on_numpy(function, names):
    def call(*at):
        return torch.as_tensor(function(*map(torch.as_tensor, at))).numpy()

    def with_number(*at):  # a scalar is no number outside of a trace
        held = names["strength"]
        names["strength"] = held.value
        try:
            return call(*at)
        finally:
            names["strength"] = held

    return with_number if "strength" in names else call


@pytest.fixture(scope="module")
def results():
    torch.manual_seed(0)
    names, found = {}, {}
    for title, blocks in sections():
        for block in blocks:
            exec(compile(block, f"docs/flex.md, {title}", "exec"), names)
        found[title] = {**names}
    return found


@pytest.mark.parametrize("title", EXAMPLES)
def test_example(results, title):
    score, masks = EXAMPLES[title]
    names = results[title]
    tensors = [names[name].numpy() for name in ("q", "k", "v")]
    batch, heads, rows, _ = tensors[0].shape
    keep = np.ones((batch, heads, rows, rows), bool)
    for mask in masks:
        keep = keep & kept_by(on_numpy(names[mask], names[mask].__globals__), batch, heads, rows, rows)
    function = None if score is None else on_numpy(names[score], names[score].__globals__)
    check(names["out"].numpy(), *tensors, function, keep)


def test_packed_example(results):
    names = results["FlashAttention 4's functions"]
    start = 0
    for n in names["lengths"].tolist():
        rows = slice(start, start + n)
        tensors = [x[rows].transpose(0, 1)[None].numpy() for x in names["packed"]]
        weights = names["weights"][rows].numpy()
        causal = kept_by(lambda b, h, q, k: q >= k, 1, tensors[0].shape[1], n, n)
        score = lambda s, b, h, q, k: s + weights[k]  # noqa: E731, B023
        check(names["out"][rows].transpose(0, 1)[None].numpy(), *tensors, score, causal)
        start += n


def test_every_example_is_checked():
    titles = [title for title, _ in sections()]
    assert set(titles[1:]) == {*EXAMPLES, "FlashAttention 4's functions"} and len(titles) == 8
