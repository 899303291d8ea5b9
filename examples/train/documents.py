"""Batches of this repository's own documents (*.md), as bytes: pieces of documents, packed end to end."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from attention import Packed
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]


def texts(root: Path = ROOT) -> list[bytes]:
    """The documents of a folder. Raises FileNotFoundError where there are none."""
    found = sorted(p for p in root.rglob("*.md") if not any(part.startswith((".", "build")) for part in p.parts))
    if not found:
        raise FileNotFoundError(f"{root}: has no *.md files to train on")
    return [path.read_bytes() for path in found]


def pieces(documents: list[bytes], longest: int, seed: int) -> Iterator[bytes]:
    """Pieces of at most longest + 1 bytes, of all documents in a new order each time, without end."""
    chance = random.Random(seed)
    while True:
        cut = [text[i : i + longest + 1] for text in documents for i in range(0, len(text) - 1, longest)]
        chance.shuffle(cut)
        yield from (piece for piece in cut if len(piece) > 1)


def batches(
    documents: list[bytes], tokens: int, longest: int, seed: int, device: str = "cpu", dense: bool = False
) -> Iterator[tuple[Tensor, Tensor, Packed]]:
    """(inputs, targets, packed) of exactly `tokens` tokens, without end. dense: of pieces as long as the longest."""
    if dense and tokens % longest:
        raise ValueError(f"tokens = {tokens}: must be a multiple of {longest}")
    source = pieces(documents, longest, seed)
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
