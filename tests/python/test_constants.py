"""Constants that the package repeats are those of the C and CUDA sources. The sources are read as text."""

from __future__ import annotations

import re
from pathlib import Path

from flashspark import _call, _layout, _tensors
from flashspark._signature import SCHEDULE
from flashspark.vllm.features import FEATURES
from flashspark.vllm.scheduler_metadata import RECORD_WORDS

ROOT = Path(__file__).resolve().parents[2]


def constants(pattern: str, *paths: Path) -> dict[str, int]:
    """{name: number} of every match of the pattern's two groups."""
    found = [match for path in paths for match in re.findall(pattern, path.read_text())]
    return {name: int(number) for name, number in found}


def test_dtype_codes():
    header = constants(r"FLASHSPARK_(\w+) = (\d+)", ROOT / "include/flashspark/flashspark.h")
    names = {"float32": "FLOAT32", "float16": "FLOAT16", "bfloat16": "BFLOAT16", "float8_e4m3fn": "FLOAT8_E4M3"}
    assert {name: header[word] for name, word in names.items()} == _tensors.DTYPE_CODES
    assert SCHEDULE.fallbacks[SCHEDULE.index("qkv_dtype")] == header["BFLOAT16"]


def test_faces():
    faces = constants(r"(k\w+) = (\d)", ROOT / "bindings/signature.hpp")
    assert (faces["kFunc"], faces["kCache"], faces["kForward"]) == (_call.FUNC, _call.CACHE, _call.FORWARD)


def test_head_sizes():
    """test_errors.py holds the C++ side to the same limit."""
    assert FEATURES.max_head_size == _layout.MAX_HEAD_DIM == 512


def test_words_of_a_scheduler_metadata_record():
    """With records larger than this, the memory that vLLM's builder allocates would be too small to be used."""
    sources = [p for p in (ROOT / "kernels").rglob("*") if p.suffix in {".hpp", ".cuh"}]
    words = constants(r"constexpr int32_t k(Schedule|Record|Metadata\w*)Words = (\d+)", *sources)
    assert list(words.values()) == [RECORD_WORDS]
