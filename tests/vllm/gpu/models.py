"""Small models with random weights for e2e.py: how they are made, what vLLM needs for them, what must serve them."""

from __future__ import annotations

import json
import os
from typing import Any

# Heads of the named size; wide initial weights, so that attention is not uniform and logits are spread.
_BASE = {
    "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.06, "tie_word_embeddings": False,
}  # fmt: skip
# Prompts and texts have none of these: prompts are of ids from 100 up, and the vit models' lm_head has zeros there.
_SPECIAL = {"<unk>": 0, "<|vision_start|>": 1, "<|vision_end|>": 2, "<|image_pad|>": 3, "<|video_pad|>": 4}
_START, _END, _IMAGE, _VIDEO = list(_SPECIAL.values())[1:]
_PATCH = 28  # pixels of an image token's side
_LARGEST = 12 * _PATCH


def _vit(head_size: int) -> tuple[str, dict[str, Any]]:
    vision = {
        "depth": 4, "embed_dim": 4 * head_size, "num_heads": 4, "hidden_size": 512, "initializer_range": 0.08
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = {"num_attention_heads": 4, "rope_parameters": rope, "bos_token_id": None, "eos_token_id": None}
    return "Qwen2VL", {
        "text_config": _BASE | text, "vision_config": vision,
        "image_token_id": _IMAGE, "video_token_id": _VIDEO, "vision_start_token_id": _START,
        "vision_end_token_id": _END, "tie_word_embeddings": False,
    }  # fmt: skip


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "d64": ("Llama", _BASE | {"head_dim": 64}),
    "d128": ("Llama", _BASE | {"head_dim": 128}),
    "d256": ("Llama", _BASE | {"head_dim": 256}),
    "window": ("Mistral", _BASE | {"head_dim": 128, "sliding_window": 100}),
    "softcap": (
        "Gemma2",
        _BASE | {"head_dim": 256, "sliding_window": 64, "query_pre_attn_scalar": 256, "tie_word_embeddings": True},
    ),
    "mixed": ("Gemma3", _BASE | {"head_dim": 128, "sliding_window": 64, "query_pre_attn_scalar": 128}),
    "tp": ("Llama", _BASE | {"head_dim": 128, "num_attention_heads": 16, "num_key_value_heads": 8}),
    # One expert: nothing to route, so that no expert changes with the last bit, and no MoE kernel (see prepare).
    "sinks": (
        "GptOss",
        _BASE | {"head_dim": 64, "sliding_window": 100, "num_local_experts": 1, "num_experts_per_tok": 1},
    ),
    # Dense in all layers, for the same reasons.
    "mla": (
        "DeepseekV2",
        _BASE | {"num_key_value_heads": 8, "q_lora_rank": None, "kv_lora_rank": 512, "first_k_dense_replace": 4},
    ),
    "vit": _vit(80),
    "vit72": _vit(72),
}


def make_model(kind: str, folder: str) -> None:
    import torch
    import transformers

    name, values = MODELS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")(**values)
    what = "ConditionalGeneration" if "vision_config" in values else "CausalLM"
    model = getattr(transformers, f"{name}For{what}")(config)
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            if weight_name.endswith(".sinks"):
                weight.normal_(4, 2)  # as large as the sum of a window's keys: near zero it would be lost beside them
        if "vision_config" in values:
            model.lm_head.weight[:100] = 0
    model.to(torch.bfloat16).save_pretrained(folder)
    if "vision_config" in values:
        _make_processor(folder)


def _make_processor(folder: str) -> None:
    """Nothing is ever tokenized but the image placeholders."""
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(_SPECIAL, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", additional_special_tokens=list(_SPECIAL)[1:]
    )
    size = {"shortest_edge": _PATCH**2, "longest_edge": _LARGEST**2}
    transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(size=size), tokenizer, transformers.Qwen2VLVideoProcessor(size=size)
    ).save_pretrained(folder)


def read_config(folder: str) -> dict[str, Any]:
    with open(os.path.join(folder, "config.json")) as file:
        return json.load(file)


def served(config: dict[str, Any]) -> tuple[str, ...]:
    """What the log must say that flashspark serves."""
    kind = config["model_type"]
    if kind == "gpt_oss":
        return tuple(f"head_dim 64, bfloat16, paged, causal, {more}sinks" for more in ("", "window 99, "))
    if kind == "deepseek_v2":  # new tokens; and of prompts that come in pieces what is in the cache
        return ("head_dim 192/128, bfloat16, unpaged, causal", "head_dim 192/128, bfloat16, unpaged, full")
    if kind == "qwen2_vl":
        vision = config["vision_config"]
        size = vision["embed_dim"] // vision["num_heads"]
        return (f"head_dim {size}, bfloat16, unpaged, full", "head_dim 128, bfloat16, paged, causal")
    return ("",)


def prepare(config: dict[str, Any]) -> dict[str, Any]:
    """More arguments of vllm.LLM."""
    kind = config["model_type"]
    if kind == "gpt_oss":
        _dense_gpt_oss()
    if kind == "deepseek_v2":
        # What SM12x has for decode. FLASH_ATTN_MLA, Hopper's, takes prompts of up to 512 tokens for decode, too. Small
        # steps, so that prompts come in pieces.
        return {"attention_config": {"backend": "TRITON_MLA"}, "max_num_batched_tokens": 1024}
    if kind == "qwen2_vl":  # its tokenizer turns placeholders into ids
        return {"skip_tokenizer_init": False, "limit_mm_per_prompt": {"image": 2, "video": 0}}
    return {}


def _dense_gpt_oss() -> None:
    """gpt-oss's only expert in plain torch: the kit leaves out the extension of vLLM that its MoE layers call."""
    import torch
    from torch.nn.functional import linear
    from vllm.model_executor.models import gpt_oss

    def empty(*shape: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.empty(shape), requires_grad=False)

    class Dense(torch.nn.Module):
        def __init__(self, vllm_config: Any, layer_idx: int, prefix: str = "") -> None:
            super().__init__()
            config = vllm_config.model_config.hf_config
            hidden, inner = config.hidden_size, config.intermediate_size
            self.experts = torch.nn.Module()
            self.experts.w13_weight, self.experts.w13_bias = empty(1, 2 * inner, hidden), empty(1, 2 * inner)
            self.experts.w2_weight, self.experts.w2_bias = empty(1, hidden, inner), empty(1, hidden)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            e = self.experts
            both = linear(x, e.w13_weight[0], e.w13_bias[0])
            gate, up = both[..., ::2].clamp(max=7), both[..., 1::2].clamp(-7, 7)
            return linear((up + 1) * gate * torch.sigmoid(1.702 * gate), e.w2_weight[0], e.w2_bias[0])

    gpt_oss.TransformerBlock.mlp_cls = Dense


def with_images(asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """None, one or two in each request, of many sizes, the same ones every time."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for number, request in enumerate(asked):
        images = []
        for _ in range(number % 3):
            height, width = rng.integers(_PATCH, _LARGEST, 2)
            images.append(Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)))
            ids = request["prompt_token_ids"]
            place = int(rng.integers(len(ids) + 1))
            if _IMAGE in ids[place - 1 : place + 1]:  # not between the other one's three tokens
                place = 0
            request["prompt_token_ids"] = [*ids[:place], _START, _IMAGE, _END, *ids[place:]]
        if images:
            request["multi_modal_data"] = {"image": images}
    return asked


def float32_inputs(folder: str, request: dict[str, Any], text: list[int]) -> dict[str, Any]:
    """What transformers' model takes for a request and the text that follows it."""
    import torch
    import transformers

    ids = [*request["prompt_token_ids"], *text]
    if "multi_modal_data" not in request:
        return {"input_ids": torch.tensor([ids])}
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    seen = processor(images=request["multi_modal_data"]["image"], return_tensors="pt")
    counts = iter((seen["image_grid_thw"].prod(-1) // processor.merge_size**2).tolist())
    given = torch.tensor([[x for token in ids for x in [token] * (next(counts) if token == _IMAGE else 1)]])
    return {"input_ids": given, "mm_token_type_ids": (given == _IMAGE).int(), **seen}
