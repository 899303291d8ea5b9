"""SmolLM2's tokenizer: byte-level BPE in which every digit is a token of its own."""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SPECIAL = 3  # token type of control tokens

# The GPT-2 pattern. Digits are split off beforehand, so \w matches letters and "_" only.
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
WORDS = re.compile(rf"'(?:s|t|re|ve|m|ll|d)| ?[^\W_]+| ?(?:[^{SPACE}\w]|_)+|[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+")


def byte_symbols() -> list[str]:
    """The printable character that stands for each of the 256 bytes in the vocabulary."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


class Tokenizer:
    def __init__(self, metadata: dict[str, Any]) -> None:
        self.tokens: list[str] = metadata["tokenizer.ggml.tokens"]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.ranks = {tuple(m.split(" ")): i for i, m in enumerate(metadata["tokenizer.ggml.merges"])}
        self.special = [t for t, kind in zip(self.tokens, metadata["tokenizer.ggml.token_type"]) if kind == SPECIAL]
        self.eos: int = metadata["tokenizer.ggml.eos_token_id"]
        self._split_special = re.compile("(" + "|".join(map(re.escape, self.special)) + ")")
        self._symbols = byte_symbols()
        self._bytes = {symbol: byte for byte, symbol in enumerate(self._symbols)}
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Special tokens such as <|im_end|> are recognised; none is added."""
        ids: list[int] = []
        for part in self._split_special.split(text):
            if part in self.special:
                ids.append(self.ids[part])
                continue
            for piece in isolate_digits(part):
                for word in WORDS.findall(piece):
                    ids += self._encode_word(word)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some tokens, without the special ones."""
        symbols = "".join(self.tokens[i] for i in ids if self.tokens[i] not in self.special)
        return bytes(self._bytes[s] for s in symbols).decode("utf-8", errors="replace")

    def chat(self, question: str) -> list[int]:
        """Token ids of a conversation up to the assistant's turn."""
        turns = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
        return self.encode(turns + "<|im_start|>assistant\n")

    def _encode_word(self, word: str) -> list[int]:
        if word not in self._cache:
            parts = [self._symbols[byte] for byte in word.encode("utf-8")]
            parts = [p for p in parts if p in self.ids]  # 21 bytes do not occur in the training set and have no token
            while len(parts) > 1:
                pairs = list(zip(parts, parts[1:]))
                best = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)))
                if best not in self.ranks:
                    break
                parts = merge(parts, best)
            self._cache[word] = [self.ids[p] for p in parts]
        return self._cache[word]


def merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """Joins every occurrence of a pair, from left to right."""
    merged: list[str] = []
    i = 0
    while i < len(parts):
        joined = i + 1 < len(parts) and (parts[i], parts[i + 1]) == pair
        merged.append(parts[i] + parts[i + 1] if joined else parts[i])
        i += 2 if joined else 1
    return merged


def isolate_digits(text: str) -> Iterator[str]:
    """Splits a text around every numeric character: "in 1987." gives "in ", "1", "9", "8", "7", "."."""
    start = 0
    for i, char in enumerate(text):
        if unicodedata.category(char).startswith("N"):
            if start < i:
                yield text[start:i]
            yield char
            start = i + 1
    if start < len(text):
        yield text[start:]
