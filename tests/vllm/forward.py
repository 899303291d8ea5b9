"""vLLM's own FlashAttentionImpl.forward, and Inkling's call, on CPU tensors: real code down to our function."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
import types
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from attention import Call, Spec, build
from checks import FLASH_ATTN, Context

CUTE = "vllm.vllm_flash_attn.cute"


def _implementation(spec: Spec, call: Call, **more: Any) -> Any:
    from flashspark.vllm.backend import FlashSparkImpl

    window = spec.window[0] + 1 if spec.window[0] >= 0 else None
    impl = FlashSparkImpl(
        num_heads=spec.heads[0], head_size=spec.dims[0], scale=spec.scale or spec.dims[0] ** -0.5,
        num_kv_heads=spec.heads[1], alibi_slopes=None, sliding_window=window, kv_cache_dtype="auto",
        logits_soft_cap=spec.softcap or None, sinks=call.sinks, **more,
    )  # fmt: skip
    assert impl.vllm_flash_attn_version == 4
    return impl


def _metadata(call: Call, **more: Any) -> Any:
    """FlashAttentionMetadata of the release; fields that it does not have are left out."""
    cls = sys.modules[FLASH_ATTN].FlashAttentionMetadata
    values = {
        "num_actual_tokens": len(call.q), "max_query_len": max(call.spec.q_lens), "query_start_loc": call.cu_q,
        "max_seq_len": 4096, "seq_lens": call.seqused, "block_table": call.table, "slot_mapping": torch.zeros(1),
        "use_cascade": False, "common_prefix_len": 0, "cu_prefix_query_lens": None, "prefix_kv_lens": None,
        "suffix_kv_lens": None, "causal": call.spec.causal, **more,
    }  # fmt: skip
    known = {f.name for f in fields(cls)}
    lost = more.keys() - known
    assert not lost, f"FlashAttentionMetadata has no {lost}"
    return cls(**{name: value for name, value in values.items() if name in known})


def _run(
    c: Context,
    spec: Spec,
    metadata: dict[str, Any],
    layer: dict[str, Any] | None = None,
    scheduler_metadata: Any = None,
    **expected: Any,
) -> None:
    from flashspark.vllm.versions import RELEASES

    split = RELEASES[c.version].cache
    spec.layout = {"unbind 0": "planes 0", "unbind 1": "planes 1", "packed": "packed NHD"}[split]
    call = build(spec)
    one = torch.ones(())
    holder = types.SimpleNamespace(_q_scale=one, _k_scale=one, _v_scale=one, **(layer or {}))
    # Rows behind num_actual_tokens are padding: NaN in, untouched out.
    q = torch.cat([call.q, torch.full_like(call.q[:3], float("nan"))])
    out = torch.full((len(q), *call.out.shape[1:]), float("nan"), dtype=q.dtype)
    given = {n: v(call) if callable(v) else v for n, v in metadata.items()}
    step = _metadata(call, **given)
    step.flashspark_scheduler_metadata = scheduler_metadata
    _implementation(spec, call).forward(holder, q, q, q, call.whole, step, out)
    call.check(out[: len(call.q)], call.expected(**expected)[0])
    assert out[len(call.q) :].isnan().all()
    assert step.scheduler_metadata is None, "vLLM would take it for FlashAttention 3's"


def forward(c: Context) -> str:
    """Mixed batches, windows, softcap, sinks, and PrefixLM, R-SWA, per-request causality where the release has them."""
    from flashspark.vllm.versions import RELEASES

    release = RELEASES[c.version]
    done = ["plain", "window", "softcap", "sinks"]
    _run(c, Spec(dims=(128, 128)), {})
    _run(c, Spec(window=(15, 0)), {})
    _run(c, Spec(softcap=20.0, dims=(256, 256)), {})
    _run(c, Spec(sinks=torch.bfloat16, window=(31, 0)), {})
    if "causal: bool | " in Path(sys.modules[FLASH_ATTN].__file__).read_text():
        dynamic = torch.tensor([1, 0, 1, 0, 1, 1], dtype=torch.int32)
        _run(c, Spec(), {"causal": dynamic}, causal=[True, False, True, False])
        done.append("causal per request")
    if release.mm_prefix != "-":
        _mm_prefix(c, release.mm_prefix)
        done.append("PrefixLM")
    if release.rswa:
        prefixes = [3, 0, 40, 7]
        rswa = {
            "rswa_prefix_lens": torch.tensor([*prefixes, 2**30, 0], dtype=torch.int32),
            "rswa_window": 9,
            "rswa_window_tensor": torch.tensor([9], dtype=torch.int32),
        }
        _run(c, Spec(), rswa, prefix_len=prefixes, rswa_window=9)
        done.append("R-SWA")
    return ", ".join(done)


def out_of_memory(c: Context) -> None:
    """torch's allocator has no room for the kernels' scratch memory: torch's own error, and the next call is right."""
    from flashspark import _call

    calls = []

    def no_room(*_: Any) -> None:
        calls.append(1)
        raise MemoryError("CUDA out of memory. Tried to allocate 2 MiB.\nException raised from malloc at a.cpp:1")

    native = _call.attend.__defaults__
    _call.attend.__defaults__ = (no_room,)
    try:
        _run(c, Spec(), {})
    except torch.OutOfMemoryError as error:
        assert str(error) == "CUDA out of memory. Tried to allocate 2 MiB." and error.__suppress_context__, error
    else:
        raise AssertionError("no error")
    finally:
        _call.attend.__defaults__ = native
    assert len(calls) == 1, "tried again"
    _run(c, Spec(), {})


def scheduler_metadata(c: Context) -> str:
    """It is made once a step from the step's own numbers, and reaches the attention calls of the layers."""
    import flashspark
    from flashspark.vllm import attention as module
    from flashspark.vllm.backend import FlashSparkBackend
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    builder_class, stock = FlashSparkBackend.get_builder_cls(), sys.modules[FLASH_ATTN].FlashAttentionMetadataBuilder
    assert "num_heads_q" in stock.__init__.__code__.co_names
    asked: list[dict[str, Any]] = []
    real, native, build_stock = flashspark.get_scheduler_metadata, module._forward(), stock.build

    def recorded(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(real).bind(*args, **kwargs).arguments
        asked.append(given)
        assert not len(real(*args, **kwargs)), "the CPU has none"
        return given["out"].new_zeros(1)

    call = build(Spec())
    sizes = {"block_size": 16, "num_kv_heads": 2, "head_size": 128}
    specs = [
        (FullAttentionSpec(**sizes, dtype=torch.bfloat16), torch.bfloat16, (-1, -1)),
        (FullAttentionSpec(**sizes, dtype=torch.uint8), torch.float8_e4m3fn, (-1, -1)),
        (SlidingWindowSpec(**sizes, dtype=torch.float16, sliding_window=64), torch.float16, (63, 0)),
    ]
    flashspark.get_scheduler_metadata = recorded
    stock.build = lambda self, *args, **kwargs: _metadata(call)
    try:
        for spec, dtype, window in specs:
            builder = object.__new__(builder_class)
            builder.kv_cache_spec, builder.num_heads_q, builder.flashspark_serves = spec, 16, True
            step = builder.build(0, None)
            again = builder.build(0, None)
            assert step.flashspark_scheduler_metadata is again.flashspark_scheduler_metadata, "not the same memory"
            given = asked.pop()
            assert given["cache_seqlens"] is call.seqused and given["cu_seqlens_q"] is call.cu_q
            assert given["batch_size"] == len(call.seqused), given
            sizes_of_step = (given["max_seqlen_q"], given["max_seqlen_k"], given["num_heads_q"], given["num_heads_kv"])
            assert sizes_of_step == (max(call.spec.q_lens), 4096, 16, 2) and given["headdim"] == 128, given
            assert (given["qkv_dtype"], given["window_size"], given["causal"]) == (dtype, window, True), given
        builder.flashspark_serves = False
        assert not hasattr(builder.build(0, None), "flashspark_scheduler_metadata")
    finally:
        flashspark.get_scheduler_metadata, stock.build = real, build_stock
    # The layers' calls.
    made, seen = torch.zeros(64, dtype=torch.int32), []

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("scheduler_metadata"))
        return native(*args, **kwargs)

    loader, module._forward = module._forward, lambda: watched
    try:
        _run(c, Spec(), {}, scheduler_metadata=made)
        _run(c, Spec(), {})
    finally:
        module._forward = loader
    assert seen[-2] is made and seen[-1] is None, seen
    return f"{len(specs)} kinds of layers"


def _mm_prefix(c: Context, factory: str) -> None:
    ranges = [[(2, 30)], [(0, 4)], [(20, 44), (80, 99)], [(46, 59)]]
    if "max_ranges" in factory:
        table = torch.full((6, 2, 2), -1, dtype=torch.int32)
        for b, each in enumerate(ranges):
            table[b, : len(each)] = torch.tensor(each)
        metadata: dict[str, Any] = {"mm_prefix_range_tensor": table}
    else:
        metadata = {"mm_prefix_query_range_tensor": lambda call: _query_ranges(call, ranges)}
    _run(c, Spec(), metadata, ranges=ranges)
    _run(c, Spec(window=(7, 0)), metadata, ranges=ranges)
    if "sliding_window_left" in factory:
        layer = {"mm_prefix_clamp_sliding_window": True}
        _run(c, Spec(window=(7, 0)), metadata, layer, ranges=ranges, clamp=_clamps(c))


def _clamps(c: Context) -> bool:
    """Whether this release's forward asks the layer for the clamp."""
    return "mm_prefix_clamp_sliding_window" in Path(sys.modules[FLASH_ATTN].__file__).read_text()


def _query_ranges(call: Call, ranges: list[list[tuple[int, int]]]) -> torch.Tensor:
    rows = torch.full((len(call.q), 2), -1, dtype=torch.int32)
    for b, each in enumerate(ranges):
        for i in range(call.spec.q_lens[b]):
            position = call.spec.k_lens[b] - call.spec.q_lens[b] + i
            for first, last in each:
                if first <= position <= last:
                    rows[int(call.cu_q[b]) + i] = torch.tensor([first, last])
    return rows


def _stand_in_for_cute() -> None:
    """cute.interface needs NVIDIA's CuTe DSL: a module with the real signature of its one function, and no body."""
    package = sys.modules["vllm.vllm_flash_attn"].__path__[0]
    path = Path(package, "cute/interface.py")
    tree = ast.parse(path.read_text())
    (node,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "flash_attn_varlen_func")
    node.body = ast.parse("raise RuntimeError('stock was called')").body
    node.returns, node.decorator_list = None, []
    for argument in [*node.args.args, *node.args.kwonlyargs]:
        argument.annotation = None
    code = compile(ast.fix_missing_locations(ast.Module([node], [])), str(path), "exec")

    class Loader:
        def create_module(self, spec: Any) -> None:
            return None

        def exec_module(self, module: types.ModuleType) -> None:
            if module.__name__ == CUTE:
                importlib.import_module(f"{CUTE}.interface")
                module.flash_attn_varlen_func = sys.modules[f"{CUTE}.interface"].flash_attn_varlen_func
            else:
                exec(code, module.__dict__)

    class Finder:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
            if name in (CUTE, f"{CUTE}.interface"):
                return importlib.util.spec_from_loader(name, Loader(), is_package=name == CUTE)
            return None

    sys.meta_path.insert(len(sys.meta_path) - 3, Finder())


def inkling(c: Context) -> str:
    """cute.flash_attn_varlen_func with the relative bias, and Inkling's own module where the release has it."""
    _stand_in_for_cute()
    module = importlib.import_module(CUTE)
    from flashspark import mods

    extent = 24
    for window in ((None, None), (extent - 1, 0)):
        spec = Spec(
            q_lens=(5, 1, 9), k_lens=(40, 70, 9), scale=1 / 64, window=(-1, -1) if window[0] is None else window
        )
        call = build(spec)
        bias = torch.randn(len(call.q), spec.heads[0], extent).to(torch.bfloat16)
        each = [bias[int(call.cu_q[b]) : int(call.cu_q[b + 1])].float().numpy() for b in range(3)]
        result = module.flash_attn_varlen_func(
            q=call.q, k=call.k, v=call.v, cu_seqlens_q=call.cu_q, seqused_k=call.seqused, max_seqlen_q=16,
            page_table=call.table, softmax_scale=1 / 64, causal=True, window_size=window, num_splits=5,
            return_lse=False, out=call.out, score_mod=mods.RelBias(), aux_tensors=[bias],
        )  # fmt: skip
        assert (result[0] if isinstance(result, tuple) else result) is call.out
        call.check(call.out, call.expected(rel_logits=each)[0])
    name = "vllm.models.inkling.nvidia.ops.fa4_rel_attention"
    if not Path(sys.modules["vllm"].__path__[0], *name.split(".")[1:]).with_suffix(".py").exists():
        return "call; the model is not in this release"
    model = importlib.import_module(name)
    assert model._get_score_mod(128) == mods.RelBias()
    return f"call, model{_inkling_warmup(model)}"


def _inkling_warmup(model: Any) -> str:
    """Inkling's compilation at start-up, which calls with fake tensors: stock's function would raise here."""
    sizes: dict[str, Any] = {
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "rel_extent": 24, "window_size": (-1, -1),
        "is_local": False, "dtype": torch.bfloat16, "kv_dtype": torch.bfloat16, "block_size": 16,
    }  # fmt: skip
    kernel = getattr(model, "InklingFA4RelAttentionKernel", None)  # from 0.28
    if kernel is not None:
        kernel().compile(
            kernel.CompileKey(**sizes, max_seqlen_q=4, num_splits=1, num_warps_bucket=None, large_num_reqs=False)
        )
        return ", warm-up"
    try:
        warmup = importlib.import_module(model.__name__.replace("fa4_rel_attention", "fa4_warmup"))
    except ModuleNotFoundError:
        return ""
    limits = {"max_kv_len": 4096, "max_num_reqs": 8, "max_num_batched_tokens": 64}
    units = list(warmup._iter_compile_units(warmup.InklingFA4WarmupConfig(**sizes, **limits)))
    for unit in units:
        unit.compile()
    return f", {len(units)} warm-ups"


def verify(c: Context) -> str:
    """What `flashspark verify --vllm` runs on a GPU, on CPU tensors; and it sees a wrong result."""
    import random

    from flashspark.vllm import verify as module

    assert module.prepare("cpu") == ""
    done = 0
    for seed in range(20):
        layer = module.random_layer(random.Random(seed))
        if layer.longest_q * layer.longest_k * layer.slots > 30_000 or not module.supported(layer):
            continue  # minutes with the oracle
        wrong = module.check(layer, "cpu", seed, 0)
        assert not wrong, f"{layer}: {wrong}"
        done += 1
    real, module.Batch.wrong = module.Batch.wrong, _spoilt(module.Batch.wrong)
    try:
        assert module.check(layer, "cpu", 1, 0).startswith("error is")
    finally:
        module.Batch.wrong = real
    return f"{done} layers"


def _spoilt(wrong: Any) -> Any:
    def spoilt(batch: Any) -> str:
        batch.out[0, 0, 0] += 1
        return wrong(batch)

    return spoilt


FORWARD = (forward, scheduler_metadata, out_of_memory, inkling, verify)
