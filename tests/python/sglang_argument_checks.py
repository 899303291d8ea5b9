"""Checks of the name among SGLang's arguments, which SGLang parses and resolves; part of sglang_checks.py."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace


def arguments():
    """The command line accepts the name, where it names a backend."""
    from sglang.srt import server_args

    parser = argparse.ArgumentParser()
    server_args.ServerArgs.add_cli_args(parser)
    names = ("attention", "prefill-attention", "decode-attention", "speculative-draft-attention")
    words = [word for name in names for word in (f"--{name}-backend", "flashspark")]
    parsed = parser.parse_args(["--model-path", "m", *words])
    assert {getattr(parsed, f"{name.replace('-', '_')}_backend") for name in names} == {"flashspark"}
    assert "flashspark" in server_args.DETERMINISTIC_ATTENTION_BACKEND_CHOICES
    assert server_args.ATTENTION_BACKEND_CHOICES.count("flashspark") == 1


def resolve(architecture, model_type, **options):
    """What SGLang makes of the arguments for a model of that kind on SM12x: (prefill, decode)."""
    from sglang.srt import runtime_context
    from sglang.srt.arg_groups.overrides import attention_backends_of, resolved_view
    from sglang.srt.server_args import ServerArgs

    config = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config |= {"vocab_size": 128, "max_position_embeddings": 512, "dtype": "bfloat16", "head_dim": 16}
    sm120 = {"is_cuda": True, "is_sm120": True, "is_blackwell": True, "device_capability": (12, 0), "device_sm": 120}
    with tempfile.TemporaryDirectory() as folder, runtime_context.override_platform(**sm120):
        Path(folder, "config.json").write_text(
            json.dumps(config | {"architectures": [architecture], "model_type": model_type})
        )
        if "speculative_algorithm" in options:
            options = {**options, "speculative_draft_model_path": folder}
        arguments = ServerArgs(
            model_path=folder, attention_backend="flashspark", device="cuda", skip_tokenizer_init=True, **options
        )
        arguments.resolve_once()
        return attention_backends_of(resolved_view(arguments))


def resolved_arguments():
    """SGLang keeps the choice for these models, and says itself where it has other lists."""
    models = [("LlamaForCausalLM", "llama"), ("Gemma3ForCausalLM", "gemma3_text"), ("GptOssForCausalLM", "gpt_oss")]
    for model in (*models, ("Qwen3NextForCausalLM", "qwen3_next")):
        assert resolve(*model) == ("flashspark", "flashspark"), model
    assert resolve(*models[0], enable_deterministic_inference=True, page_size=16) == ("flashspark", "flashspark")
    tree = {"speculative_algorithm": "EAGLE", "speculative_num_steps": 3, "speculative_eagle_topk": 2}
    tree["speculative_num_draft_tokens"] = 4
    assert resolve(*models[0], **tree, page_size=1) == ("flashspark", "flashspark")
    for text, model, options in (
        ("required for Llama4", ("Llama4ForCausalLM", "llama4_text"), {}),
        ("topk > 1 with page_size > 1", models[0], {**tree, "page_size": 16}),
    ):
        try:
            resolve(*model, **options)
        except (AssertionError, ValueError) as error:
            assert text in str(error), error
        else:
            raise AssertionError(f"SGLang accepts what docs/integrations.md says that it refuses: {text}")


def checks_of_models():
    """gpt-oss and Gemma 4 have lists of their own, which are asked as for a peer; nobody else is."""
    from sglang.srt.arg_groups import model_hook, overrides

    config = SimpleNamespace(
        attention_backend="flashspark", prefill_attention_backend=None, decode_attention_backend="fa3"
    )
    assert model_hook.attention_backends_of(config) == ("trtllm_mha", "fa3")
    assert overrides.attention_backends_of(config) == ("flashspark", "fa3")
