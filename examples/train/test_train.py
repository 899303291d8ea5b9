"""The small GPT trains on the CPU: its loss falls, and is that of torch's attention. Skipped without torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parent))

import train as program  # noqa: E402
from attention import flashspark_attention, torch_attention  # noqa: E402
from documents import batches, texts  # noqa: E402
from gpt import GPT, Config  # noqa: E402

STEPS, TOKENS = 14, 512
ON_THE_CPU = ("flashspark", "torch")


@pytest.fixture(scope="module")
def runs():
    return {name: program.train(name, STEPS, TOKENS, rate=2e-3) for name in ON_THE_CPU}


def test_size():
    assert 9e6 < sum(p.numel() for p in GPT().parameters()) < 11e6


def test_loss_falls(runs):
    losses = runs["flashspark"]["losses"]
    assert losses[0] == pytest.approx(5.55, abs=0.3)  # log(256): nothing is known yet
    # Batches are of this repository's files, which change, and differ in how hard they are: by a fifth of their losses.
    assert sum(losses[-6:]) / 6 < 0.75 * losses[0]


def test_losses_are_those_of_torchs_attention(runs):
    ours, theirs = (runs[name]["losses"] for name in ("flashspark", "torch"))
    assert ours == pytest.approx(theirs, rel=2e-3)
    assert ours[:2] == pytest.approx(theirs[:2], rel=1e-5)


@pytest.mark.parametrize("dense", [False, True])
def test_gradients_are_those_of_torchs_attention(dense):
    """A window that cuts documents, in the second layer."""
    x, y, packed = next(batches(texts(), TOKENS, 256 if dense else 200, 3, dense=dense))
    assert len(packed.offsets) >= 3 and packed.offsets[-1] == TOKENS == len(x)
    assert not dense or packed.offsets.tolist() == [0, 256, 512]
    found = []
    for attention in (flashspark_attention, torch_attention):
        torch.manual_seed(0)
        model = GPT(Config(layers=2, window=50), attention)
        torch.nn.functional.cross_entropy(model(x, packed), y).backward()
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item() + 1e-9)


def test_documents_do_not_see_each_other():
    x, _, packed = next(batches(texts(), TOKENS, 100, 1))
    model = GPT(Config(layers=2)).eval()
    with torch.no_grad():
        before = model(x, packed)
        first = packed.offsets[1]
        x[:first] = 0
        after = model(x, packed)
    assert torch.equal(before[first:], after[first:]) and not torch.equal(before[:first], after[:first])


def test_batches_are_whole_and_repeat():
    a, b = (next(batches(texts(), TOKENS, 64, 5)) for _ in range(2))
    assert torch.equal(a[0], b[0]) and len(a[0]) == len(a[1]) == TOKENS
    inside = torch.ones(TOKENS, dtype=torch.bool)
    inside[a[2].offsets[1:].long() - 1] = False
    assert torch.equal(a[0][1:][inside[:-1]], a[1][:-1][inside[:-1]])  # a target is the next input
    assert a[2].places.max() < 64 and (a[2].places == 0).sum() == len(a[2].offsets) - 1


@pytest.mark.parametrize("limit", ["steps", "seconds"])
def test_command(tmp_path, monkeypatch, capsys, limit):
    words = ["--tokens", "1024", "--compare", "--device", "cpu", "--out", str(tmp_path / "a"), "--dense", "1"]
    monkeypatch.setattr(sys, "argv", ["train.py", *words, f"--{limit}", "2"])
    program.main()
    result = json.loads((tmp_path / "a/training.json").read_text())
    for runs in (result["runs"], result["dense"]):
        assert [run["attention"] for run in runs] == list(ON_THE_CPU)
        assert all(run["losses"] and run["tokens_per_second"] > 0 for run in runs)
    assert all(len(run["losses"]) == 1 for run in result["dense"])
    assert limit == "seconds" or all(len(run["losses"]) == 2 for run in result["runs"])
    ours, theirs = (run["losses"][0] for run in result["dense"])
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert (tmp_path / "a/training.svg").read_text().count("<polyline") == 2 and "tokens/s" in capsys.readouterr().out
