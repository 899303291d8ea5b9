"""SGLang's attention on flashspark: `python -m sglang.launch_server --model-path ... --attention-backend flashspark`.

Nothing has to be called. `register` is an entry point of SGLang's group for plug-ins, sglang.srt.plugins, which every
process of a server runs before it reads its arguments. SGLANG_PLUGINS, a list of names, leaves it out where flashspark
is not in it. Until the backend is chosen, this adds a name to SGLang's lists and changes nothing that SGLang computes.

The name is accepted for --attention-backend, --prefill-attention-backend, --decode-attention-backend and
--speculative-draft-attention-backend, and with --enable-deterministic-inference. What the backend is, and what it
refuses, is in _sglang_backend, which is imported when SGLang builds it.

SGLang has lists of backends in places that no plug-in can extend. Where such a list holds what flashspark can do, the
question is answered as for PEER, whose calls flashspark takes, too: which backends a hybrid model may have on
Blackwell, and which ones gpt-oss and Gemma 4 may have. The other lists stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = "flashspark"
PEER = "trtllm_mha"  # in every such list on SM12x
GROUP = "sglang.srt.plugins"
ARGUMENTS = "sglang.srt.server_args"
REGISTRY = "sglang.srt.layers.attention.attention_registry"
# Its functions in ARGUMENTS, one for each list of names.
CHOICES = (
    "add_attention_backend_choices",
    "add_draft_attention_backend_choices",
    "add_deterministic_attention_backend_choices",
    "add_radix_supported_deterministic_attention_backend_choices",
)
MODEL_CHECKS = "sglang.srt.arg_groups.model_hook"


def register() -> None:
    """SGLang's plug-in. SGLang logs what it raises, and then does not know the backend."""
    registry, arguments = import_module(REGISTRY), import_module(ARGUMENTS)
    if NAME in registry.ATTENTION_BACKENDS:
        return
    hooks = import_module("sglang.srt.plugins.hook_registry")
    around = hooks.HookType.AROUND
    hooks.HookRegistry.register(f"{REGISTRY}.attn_backend_wrapper", hybrid_backend, around)
    hooks.HookRegistry.register(
        "sglang.srt.speculative.draft_utils.DraftBackendFactory._create_backend", draft_backend, around
    )
    checks = import_module(MODEL_CHECKS)
    checks.attention_backends_of = as_peer(checks.attention_backends_of)
    for name in CHOICES:
        getattr(arguments, name)([NAME])
    registry.register_attention_backend(NAME)(backend)


def backend(runner: Any) -> Any:
    """The backend of a model runner, as SGLang's registry asks for it."""
    from ._sglang_backend import FlashSparkBackend

    return FlashSparkBackend(runner)


def draft_backend(
    original: Callable[..., Any], factory: Any, name: str, choices: Mapping[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """The two backends of a speculative draft: for its decoding steps, and for its extension.

    SGLang has them in two tables, which its method is called with. Only the first has children, one for each step.
    """
    steps = args[1] if len(args) > 1 else kwargs.get("stamps_children", False)

    def build() -> tuple[str, Any]:
        from . import _sglang_backend as ours

        runner = factory.draft_model_runner
        if steps:
            return NAME, ours.FlashSparkMultiStepBackend(runner, factory.topk, factory.speculative_num_steps)
        return NAME, ours.FlashSparkBackend(runner)

    return original(factory, name, {**choices, NAME: build}, *args, **kwargs)


def hybrid_backend(original: Callable[..., Any], runner: Any, full_attn_backend: Any) -> Any:
    """The backend of a model with linear attention around that of its full attention."""
    with _known_as_peer(runner):
        return original(runner, full_attn_backend)


@contextmanager
def _known_as_peer(runner: Any) -> Iterator[None]:
    names = ("prefill_attention_backend_str", "decode_attention_backend_str")
    ours = [name for name in names if getattr(runner, name, None) == NAME]
    for name in ours:
        setattr(runner, name, PEER)
    try:
        yield
    finally:
        for name in ours:
            setattr(runner, name, NAME)


def as_peer(original: Callable[[Any], tuple[str, str]]) -> Callable[[Any], tuple[str, str]]:
    """SGLang's function from the arguments to the names for prefill and decode, with PEER in flashspark's place."""

    def attention_backends_of(arguments: Any) -> tuple[str, str]:
        prefill, decode = original(arguments)
        return (PEER if prefill == NAME else prefill, PEER if decode == NAME else decode)

    return attention_backends_of
