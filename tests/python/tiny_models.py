"""Small random models of Hugging Face transformers, for the tests of integrations. Needs torch and transformers."""

from __future__ import annotations

import torch
import transformers as hf

VOCABULARY = 97
# Large weights: with the usual ones, attention is so even that a wrong mask would hardly show.
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 7}


def llama():
    return hf.LlamaForCausalLM, hf.LlamaConfig(**COMMON)


def qwen3():
    return hf.Qwen3ForCausalLM, hf.Qwen3Config(**COMMON)


def gemma2():
    config = hf.Gemma2Config(**COMMON, **WINDOWS, query_pre_attn_scalar=16, attn_logit_softcapping=3.0)
    return hf.Gemma2ForCausalLM, config


def gemma3():
    return hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**COMMON, **WINDOWS, query_pre_attn_scalar=16)


def gemma3_bidirectional():
    config = hf.Gemma3TextConfig(**COMMON, **WINDOWS, query_pre_attn_scalar=16, use_bidirectional_attention=True)
    return hf.Gemma3ForCausalLM, config


def gpt_oss():
    config = hf.GptOssConfig(**COMMON, **WINDOWS, num_local_experts=4, num_experts_per_tok=2)
    return hf.GptOssForCausalLM, config


def qwen2_vl():
    """Images of 8 patches (16 x 16 pixels in patches of 4, merged by 2) are 4 tokens, numbered VOCABULARY - 1."""
    names = {"vision_start_token_id": 90, "vision_end_token_id": 91, "image_token_id": 96, "video_token_id": 95}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = {name: value for name, value in COMMON.items() if name != "head_dim"} | {"rope_parameters": rope}
    config = hf.Qwen2VLConfig(text_config=text, vision_config=vision | {"initializer_range": 0.25}, **names)
    return hf.Qwen2VLForConditionalGeneration, config


CAUSAL = {"llama": llama, "qwen3": qwen3, "gemma2": gemma2, "gemma3": gemma3, "gpt_oss": gpt_oss}


def build(maker, attention="eager"):
    """The model of one of the functions above, with the same weights every time."""
    kind, config = maker()
    config._attn_implementation = attention
    torch.manual_seed(0)
    return kind(config).eval()


def padded(lengths, side):
    """input_ids and attention_mask of a batch of random sequences."""
    generator = torch.Generator().manual_seed(1)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, place] = torch.randint(2, 90, (length,), generator=generator)
        mask[row, place] = 1
    return ids, mask


def position_ids(mask):
    """Positions that count tokens, not padding, as generate() makes them."""
    return (mask.cumsum(1) - 1).clamp(min=0)
