"""Batches of this repository's own files, as bytes: pieces of documents and sources, packed end to end."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from attention import Packed
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = (".md", ".py", ".c", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".def", ".sh", ".toml")


def texts(root: Path = ROOT) -> list[bytes]:
    """The files of a folder that people write, 4 MB here. Raises FileNotFoundError where there are none."""

    def is_written(path: Path) -> bool:
        outside = any(part.startswith((".", "build", "dist")) for part in path.relative_to(root).parts)
        return path.suffix in SUFFIXES and not outside and path.is_file()

    found = sorted(filter(is_written, root.rglob("*.*")))
    if not found:
        raise FileNotFoundError(f"{root}: has no files to train on: {', '.join(SUFFIXES)}")
    return [path.read_bytes() for path in found]


def pieces(documents: list[bytes], shortest: int, longest: int, seed: int) -> Iterator[bytes]:
    """Pieces of all documents, of shortest + 1 to longest + 1 bytes where the document does not end, cut anew and in a
    new order each time, without end."""
    chance = random.Random(seed)
    while True:
        cut = []
        for text in documents:
            start = 0
            while start < len(text) - 1:
                length = chance.randint(shortest, longest)
                cut.append(text[start : start + length + 1])
                start += length
        chance.shuffle(cut)
        yield from cut


def batches(
    documents: list[bytes], tokens: int, longest: int, seed: int, device: str = "cpu", dense: bool = False
) -> Iterator[tuple[Tensor, Tensor, Packed]]:
    """(inputs, targets, packed) of exactly `tokens` tokens, without end. dense: of pieces as long as the longest."""
    if dense and tokens % longest:
        raise ValueError(f"tokens = {tokens}: must be a multiple of {longest}")
    source = pieces(documents, longest if dense else max(longest // 8, 1), longest, seed)
    while True:
        inputs, targets, offsets = bytearray(), bytearray(), [0]
        while len(inputs) < tokens:
            piece = next(source)[: tokens - len(inputs) + 1]
            if dense and len(piece) <= longest:
                continue
            inputs += piece[:-1]
            targets += piece[1:]
            offsets.append(len(inputs))
        lengths = torch.tensor(offsets).diff()
        document = torch.arange(len(lengths)).repeat_interleave(lengths)
        places = torch.arange(tokens) - torch.tensor(offsets)[document]
        starts = torch.tensor(offsets, dtype=torch.int32, device=device)
        packed = Packed(starts, longest, places.to(device), (document * longest + places).to(device), dense)
        x, y = (torch.frombuffer(text, dtype=torch.uint8).long().to(device) for text in (inputs, targets))
        yield x, y, packed
