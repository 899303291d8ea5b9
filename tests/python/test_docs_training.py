"""The examples of docs/training.md, run as a reader would. Skipped without torch and transformers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")
TEXT = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text()
LAYER, BIAS, TRANSFORMERS = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


def run(block, **names):
    exec(compile(block, "docs/training.md", "exec"), names)
    return names


def test_layer():
    names = run(LAYER)
    for name in ("q", "k", "v"):
        assert names[name].grad.shape == names[name].shape and names[name].grad.isfinite().all()


def test_learned_bias():
    names = run(BIAS)
    assert names["table"].grad.abs().sum() > 0 and names["q"].grad.isfinite().all()
    # By hand, in float64.
    q, k, v = (names[name].detach().double() for name in ("q", "k", "v"))
    table = names["table"].detach().double().requires_grad_()
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).transpose(2, 3) * q.shape[-1] ** -0.5
    at = torch.arange(q.shape[2])
    distance = at[:, None] - at
    scores = (scores + table[:, distance.clamp(0, 63)]).masked_fill(distance < 0, -torch.inf)
    (scores.softmax(-1) @ v.repeat_interleave(group, 1)).sum().backward()
    torch.testing.assert_close(names["table"].grad, table.grad.float(), rtol=1e-3, atol=1e-4)


def test_transformers(tmp_path):
    config = hf.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = run(TRANSFORMERS, name=str(tmp_path))["model"]
    ids = torch.randint(2, 97, (2, 20))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in model.parameters())
