"""Training through attn_implementation="flashspark": losses and gradients against eager attention's. CPU, float32."""

from __future__ import annotations

import importlib.util
import os

import pytest

for package in ("torch", "transformers"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import flashspark.integrations.transformers  # noqa: E402
import tiny_models as tiny  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # threads of OpenMP spin while they wait, on a machine that other tests share
flashspark.integrations.transformers.register()
BOTH = ("flashspark", "eager")


def inputs(side="none"):
    """A batch with labels. What padding predicts is left out of the loss, also the first token behind it."""
    ids, mask = tiny.padded([23, 23, 23] if side == "none" else [23, 5, 14], side)
    labels = ids.masked_fill((mask == 0) | (mask.cumsum(1) == 1), -100)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": tiny.position_ids(mask), "labels": labels}


def step(model, **given):
    model.zero_grad()
    loss = model(**given).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(got, want):
    assert got[0] == pytest.approx(want[0], rel=1e-5)
    assert got[1].keys() == want[1].keys() and got[1]
    for name, x in want[1].items():
        torch.testing.assert_close(got[1][name], x, rtol=1e-3, atol=1e-4 * x.abs().max().item() + 1e-7, msg=name)


@pytest.mark.parametrize("name", tiny.CAUSAL)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_gradients_are_eagers(name, side):
    """GQA, sliding windows, softcap, sinks and their gradients, padding on either side."""
    same(*[step(tiny.build(tiny.CAUSAL[name], attention), **inputs(side)) for attention in BOTH])


def test_gradient_checkpointing():
    models = [tiny.build(tiny.llama, attention).train() for attention in BOTH]
    models[0].gradient_checkpointing_enable()
    same(*[step(model, **inputs("right")) for model in models])


def test_packed_documents():
    """A batch of one whose positions restart, beside the documents one by one."""
    ids = torch.randint(2, 90, (1, 30), generator=torch.Generator().manual_seed(3))
    positions = torch.cat([torch.arange(n) for n in (11, 19)])[None]
    labels = ids.clone()
    labels[0, [0, 11]] = -100  # no document predicts the first token of the next
    packed = step(tiny.build(tiny.llama, "flashspark"), input_ids=ids, position_ids=positions, labels=labels)
    model = tiny.build(tiny.llama, "eager")
    model.zero_grad()
    total = 0.0
    for part in (slice(0, 11), slice(11, 30)):
        loss = model(input_ids=ids[:, part], labels=labels[:, part]).loss * (part.stop - part.start - 1) / 28
        loss.backward()
        total += loss.item()
    same(packed, (total, {name: p.grad for name, p in model.named_parameters()}))


def test_steps_of_an_optimiser():
    """As a Trainer makes them: AdamW, clipped gradients, two batches accumulated a step."""
    losses = []
    for attention in BOTH:
        model, seen = tiny.build(tiny.llama, attention).train(), []
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(4):
            for side in ("left", "right"):
                loss = model(**inputs(side)).loss / 2
                loss.backward()
                seen.append(loss.item())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
        losses.append(seen)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < 0.8 * losses[0][1]


class LoRA(torch.nn.Module):
    """A frozen layer with a trained product of two narrow matrices beside it."""

    def __init__(self, base, rank=4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = torch.nn.Parameter(torch.randn(rank, base.in_features) / rank)
        self.b = torch.nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + x @ self.a.t() @ self.b.t()


@pytest.mark.parametrize("layers", [("q_proj", "v_proj"), ("v_proj",), ("q_proj",)], ids=str)
def test_lora_steps(layers):
    """All else frozen: in the first layer, tensors of the attention without gradients stand beside others with them."""
    results = []
    for attention in BOTH:
        model = tiny.build(tiny.llama, attention).requires_grad_(False).train()
        torch.manual_seed(4)
        for layer in model.model.layers:
            for name in layers:
                setattr(layer.self_attn, name, LoRA(getattr(layer.self_attn, name)))
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == 2 * 3 * len(layers)
        optimiser = torch.optim.SGD(trained, lr=0.5)
        for _ in range(3):
            result = step(model, **inputs("right"))
            optimiser.step()
        results.append(result)
    same(*results)


def test_autocast():
    """bfloat16 layers over weights in float32."""
    results = []
    for attention in BOTH:
        model = tiny.build(tiny.llama, attention)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**inputs("right")).loss
        loss.backward()
        results.append((loss.item(), model.model.layers[0].self_attn.q_proj.weight.grad))
    assert results[0][0] == pytest.approx(results[1][0], rel=2e-2)
    assert results[0][1].dtype == torch.float32
    cosine = torch.nn.functional.cosine_similarity(results[0][1].flatten(), results[1][1].flatten(), 0)
    assert cosine > 0.98


def test_dropout_of_attention():
    """The model's attention_dropout in training: drawn from torch's generator, and off in evaluation."""
    model = tiny.build(tiny.llama, "flashspark").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(step(model, **inputs()))
    assert found[0][0] == found[1][0] != found[2][0]
    assert all(torch.equal(x, found[1][1][name]) for name, x in found[0][1].items())
    model.eval()
    same(step(model, **inputs()), step(tiny.build(tiny.llama, "eager"), **inputs()))
