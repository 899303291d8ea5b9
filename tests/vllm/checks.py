"""Checks of a process in which flashspark has taken over vLLM: who holds which name, and what vLLM is told.

Each check is a function of a Context; it returns nothing, a remark, or raises AssertionError.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

FA_UTILS = "vllm.v1.attention.backends.fa_utils"
FLASH_ATTN = "vllm.v1.attention.backends.flash_attn"
INTERFACE = "vllm.vllm_flash_attn.flash_attn_interface"
_BACKENDS, _LAYERS = "vllm.v1.attention.backends", "vllm.model_executor.layers.attention"

# Modules that take functions by name when they are imported. Which of them a release has differs.
IMPORTERS = (
    FLASH_ATTN,
    *(
        f"{_BACKENDS}.{name}"
        for name in ("flash_attn_diffkv", "turboquant_attn", "ultraquant_attn", "triton_flash_attn")
    ),
    *(f"{_BACKENDS}.mla.{name}" for name in ("flashattn_mla", "flashattn_mla_sparse", "prefill.flash_attn")),
    *(f"{_LAYERS}.{name}" for name in ("mla_attention", "mm_encoder_attention", "sparse_mla_attention")),
    *("vllm.models.dots3_note.nvidia.attention", "vllm.models.dots3_note.nvidia.vision_attention"),
    *("vllm.v1.attention.ops.vit_attn_wrappers", "vllm.vllm_flash_attn", INTERFACE, FA_UTILS),
)
REPLACED = (
    *("flash_attn_varlen_func", "get_flash_attn_version", "flash_attn_supports_fp8", "flash_attn_supports_sinks"),
    *("flash_attn_supports_kv_cache_dtype", "compile_flash_attn_varlen_func_from_specs"),
    *("FlashAttnPrefillBackend", "_FA4_DENSE_ATTENTION_KERNEL"),
)


@dataclass
class Context:
    version: str  # of vLLM
    config: Any  # a VllmConfig

    def select(self, **wanted: Any) -> type:
        """The backend class that vLLM gives a decoder layer."""
        from vllm.config import set_current_vllm_config
        from vllm.v1.attention.selector import get_attn_backend

        asked = {"head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": None} | wanted
        known = inspect.signature(get_attn_backend).parameters
        with set_current_vllm_config(self.config):
            return get_attn_backend(**{name: value for name, value in asked.items() if name in known})

    def knows(self, argument: str) -> bool:
        from vllm.v1.attention.selector import get_attn_backend

        return argument in inspect.signature(get_attn_backend).parameters


def load_importers() -> dict[str, str]:
    """Imports every importer of the release; why the others could not be."""
    lost = {}
    for name in IMPORTERS:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("vllm"):
                lost[name] = str(error)
        except Exception as error:
            lost[name] = f"{type(error).__name__}: {error}"
    return lost


def slot(c: Context) -> None:
    """The class of the FLASH_ATTN slot, for every layer that the kernels serve and for no other."""
    from flashspark.vllm.backend import FlashSparkBackend, FlashSparkImpl

    served = [{"head_size": d} for d in (*range(8, 257, 8), 320, 448, 512)]
    served += [{"dtype": torch.float16}, {"has_sink": True}, {"head_size": 512, "has_sink": True}]
    served += [{"kv_cache_dtype": "fp8", "head_size": d} for d in (64, 80, 128, 256, 512)]
    if c.knows("use_mm_prefix") and hasattr(sys.modules[FLASH_ATTN], "_make_mm_prefix_mask_mod"):
        served += [{"use_mm_prefix": True}, {"use_mm_prefix": True, "head_size": 256}]
    for wanted in served:
        found = c.select(**wanted)
        assert found is FlashSparkBackend, f"{wanted}: {found}"
    for wanted in (
        {"kv_cache_dtype": "fp8_e5m2"},
        {"kv_cache_dtype": "fp8", "head_size": 72},
        {"head_size": 128 + 4},
        {"head_size": 576},
    ):
        try:
            found = c.select(**wanted)
        except ValueError:  # no backend at all
            continue
        assert found is not FlashSparkBackend, f"{wanted}: {found}"
    assert FlashSparkBackend.get_name() == "FLASH_ATTN"
    assert FlashSparkBackend.get_impl_cls() is FlashSparkImpl
    full_name = getattr(FlashSparkBackend, "full_cls_name", None)
    if full_name is not None:
        assert full_name() in (
            ("flashspark.vllm.backend", "FlashSparkBackend"),
            "flashspark.vllm.backend.FlashSparkBackend",
        )


def importers(c: Context) -> str:
    """Every module that holds one of the functions holds ours."""
    lost = load_importers()
    from flashspark.vllm import replace

    ours = {record.name: record.ours for record in replace.records}
    count = 0
    for module in IMPORTERS:
        for name in REPLACED:
            held = getattr(sys.modules.get(module), name, None)
            if held is None:
                continue
            count += 1
            assert held is ours.get(name), f"{module}.{name} is {held}"
    utils, stock = sys.modules[FA_UTILS], sys.modules[INTERFACE]
    if hasattr(utils, "is_fa_version_supported"):
        assert utils.is_fa_version_supported is ours["is_fa_version_supported"]
        assert sys.modules[FLASH_ATTN].is_fa_version_supported is ours["is_fa_version_supported"]
    # The gate itself stays shut: other code that asks it gets stock's answer.
    assert stock._is_fa4_supported()[0] is False and stock.is_fa_version_supported(4) is False
    for record in replace.records:
        assert not replace.holders(record.stock), f"{replace.holders(record.stock)} hold stock's {record.name}"
    assert count >= 6, count
    return f"{count} names" + "".join(f"; {name.rpartition('.')[2]}: {why}" for name, why in lost.items())


def version(c: Context) -> None:
    """4 for whatever the kernels serve, stock's answer otherwise, and never an exception on keywords."""
    ask = sys.modules[FA_UTILS].get_flash_attn_version
    assert ask() == 4
    for d in (40, 64, 72, 80, 96, 128, 160, 192, 224, 256, 512):
        assert ask(head_size=d) == 4, d
    assert ask(False, 128) == 4 and ask(True, 128) == 4
    assert ask(head_size=192, head_size_v=128, has_sinks=True, requires_softcap=True, nobody_knows_this=1) == 4
    assert ask(head_size=132) == 2 and ask(head_size=1024) == 2


def predicates(c: Context) -> None:
    """What vLLM is told is the feature table, row by row."""
    from dataclasses import replace as changed

    from flashspark.vllm import backend as module
    from flashspark.vllm.features import FEATURES

    backend = module.FlashSparkBackend
    assert (
        backend.supports_head_size(512) and not backend.supports_head_size(520) and not backend.supports_head_size(100)
    )
    assert backend.supports_sink()
    flash_attn = sys.modules[FLASH_ATTN]
    assert backend.supports_mm_prefix() is hasattr(flash_attn, "_make_mm_prefix_mask_mod")
    assert backend.supports_rswa() is hasattr(flash_attn, "_make_rswa_mask_mod")
    assert backend.supports_non_causal() and backend.supports_per_head_quant_scales()
    for dtype, served in (("auto", True), ("bfloat16", True), (None, True), ("fp8", True), ("fp8_e5m2", False)):
        assert backend.supports_kv_cache_dtype(dtype) is served, dtype
    rows = {
        "supports_sink": {"sinks": False},
        "supports_non_causal": {"non_causal": False},
        "supports_per_head_quant_scales": {"per_head_scales": False},
        "supports_mm_prefix": {"mm_prefix": False},
        "supports_rswa": {"rswa": False},
    }
    try:
        for question, row in rows.items():
            module.FEATURES = changed(FEATURES, **row)
            assert getattr(backend, question)() is False, question
        module.FEATURES = changed(FEATURES, kv_cache_dtypes=FEATURES.kv_cache_dtypes - {"fp8", "fp8_e4m3"})
        assert backend.supports_kv_cache_dtype("fp8") is False
    finally:
        module.FEATURES = FEATURES


def relatives(c: Context) -> str:
    """What reaches flashspark without the slot: DiffKV, vision encoders, MLA prefill's frozen partial."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    done = []
    diffkv = importlib.import_module(f"{_BACKENDS}.flash_attn_diffkv").FlashAttentionDiffKVBackend
    if hasattr(diffkv, "is_supported_on_current_device"):
        assert diffkv.is_supported_on_current_device(head_size=192, head_size_v=128, has_sinks=True)
        done.append("DiffKV")
    for head_size in (64, 72, 80, 88, 128):
        chosen = current_platform.get_vit_attn_backend(head_size, torch.bfloat16)
        assert chosen is AttentionBackendEnum.FLASH_ATTN, (head_size, chosen)
    done.append("ViT")
    try:
        prefill = importlib.import_module(f"{_BACKENDS}.mla.prefill.flash_attn")
    except ModuleNotFoundError:  # up to 0.21 it is a part of mla_attention, which `importers` looks at
        return ", ".join(done)
    from vllm.config import set_current_vllm_config

    wanted = {
        "num_heads": 4, "scale": 0.1, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "vllm_config": c.config,
    }  # fmt: skip
    cls = prefill.FlashAttnPrefillBackend
    known = inspect.signature(cls.__init__).parameters
    with set_current_vllm_config(c.config):
        layer = cls(**{name: value for name, value in wanted.items() if name in known})
    assert layer.vllm_flash_attn_version == 4 and not layer.requires_v_padding
    assert layer.flash_attn_varlen_func.func is prefill.flash_attn_varlen_func
    assert layer.flash_attn_varlen_func.keywords == {"fa_version": 4}
    return ", ".join([*done, "MLA prefill"])


MLA_DIMS = {"DeepSeek": (128, 64, 128), "GLM": (192, 64, 256), "Mistral": (64, 64, 128)}


def _module(name: str) -> Any:
    """The module, or None where the release has none of this name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert (error.name or "").startswith("vllm"), error
        return None


def mla_model(c: Context, dims: tuple[int, int, int]) -> Any:
    """Of a VllmConfig, what an MLA layer of this size and the warm-ups look at."""
    names = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank", "q_lora_rank")
    text = types.SimpleNamespace(**dict(zip(names, (*dims, 512, None))))
    model = types.SimpleNamespace(
        dtype=torch.bfloat16, hf_text_config=text, use_mla=True, rswa_window=None,
        get_num_attention_heads=lambda _: 16,
    )  # fmt: skip
    shared = ("attention_config", "kernel_config", "parallel_config", "compilation_config", "cache_config")
    found = {name: getattr(c.config, name) for name in shared if hasattr(c.config, name)}
    return types.SimpleNamespace(model_config=model, **found)


def mla_layer(config: Any) -> Any:
    """MLA prefill's backend as vLLM chooses and makes it; None up to 0.21."""
    selector = _module(f"{_BACKENDS}.mla.prefill.selector")
    if selector is None:
        return None
    select = selector.get_mla_prefill_backend
    text = vars(config.model_config.hf_text_config)
    sizes = {name: text[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")}
    return select(config)(num_heads=16, scale=0.1, vllm_config=config, **sizes)


def _count_units() -> int:
    """Runs vLLM's CuTe-DSL warm-up (from 0.25) on the providers that have registered; how many units there were."""
    warmup = _module("vllm.model_executor.warmup.cutedsl_warmup")
    if warmup is None:
        return 0
    units = warmup._collect_unique_compile_units(warmup._iter_cutedsl_warmup_compile_units())
    for unit in units:
        unit.compile()
    return len(units)


def warmups(c: Context) -> str:
    """Version 4 makes vLLM compile nothing of FlashAttention 4 at start-up, which SM12x would end with an error."""
    from vllm.config import set_current_vllm_config
    from vllm.platforms import current_platform

    prefill = _module(f"{_BACKENDS}.mla.prefill.flash_attn")
    if prefill is None:  # up to 0.21
        return "none"
    jit = _module("vllm.model_executor.warmup.jit_warmup")
    registry = getattr(jit, "JitWarmupRegistry", None)  # from 0.29
    asked, real = [], torch.cuda.get_device_capability
    torch.cuda.get_device_capability = lambda *_: asked.append(1) or tuple(current_platform.get_device_capability())
    done, loaded = [], {*sys.modules}
    try:
        with set_current_vllm_config(c.config):
            for model, dims in MLA_DIMS.items():
                config = mla_model(c, dims)
                registered = registry and registry(config)
                with registered.activate() if registered else nullcontext():
                    layer = mla_layer(config)
                    assert layer.vllm_flash_attn_version == 4 and type(layer) is prefill.FlashAttnPrefillBackend, layer
                    _register_dense(config)
                assert _count_units() == 0, f"{model}: {_count_units()} units"
                if registered:
                    registered.warmup()
                elif kernel := getattr(prefill, "FA4_MLA_PREFILL_KERNEL", None):  # 0.27 and 0.28
                    kernel.warmup(config)
                done.append(model)
    finally:
        torch.cuda.get_device_capability = real
    assert not asked, "FlashAttention 4's list of kernels was made"
    cute = f"{INTERFACE.rpartition('.')[0]}.cute"
    assert not any(name.startswith(cute) for name in {*sys.modules} - loaded), "FlashAttention 4 was loaded"
    return ", ".join(done)


def _register_dense(config: Any) -> None:
    """From 0.30 on Gemma 4's layers register FlashAttention 4 for a warm-up, as the stock builder does at version 4."""
    kernel = getattr(sys.modules[FLASH_ATTN], "_FA4_DENSE_ATTENTION_KERNEL", None)
    if kernel is None:
        return
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    spec = FullAttentionSpec(block_size=128, num_kv_heads=2, head_size=512, dtype=torch.bfloat16)
    assert not kernel.get_warmup_keys(vllm_config=config, kv_cache_spec=spec, num_qo_heads=16)
    kernel.register_warmup(vllm_config=config, kv_cache_spec=spec, num_qo_heads=16)


def graphs(c: Context) -> str:
    """The CUDA-graph class is what this release states at version 4."""
    from flashspark.vllm.backend import FlashSparkBackend
    from flashspark.vllm.versions import RELEASES

    builder = FlashSparkBackend.get_builder_cls()
    name = builder._cudagraph_support.name
    assert name == RELEASES[c.version].graphs, name
    if hasattr(builder, "get_cudagraph_support"):
        assert builder.get_cudagraph_support(c.config, None).name == name
    return name


def release(c: Context) -> None:
    """The table of releases says what the release's functions say."""
    from flashspark.vllm.versions import RELEASES, measured

    assert measured() == RELEASES[c.version], measured()


def masks(c: Context) -> str:
    """The mask factories give tags with the right windows; R-SWA's comes with the call."""
    from flashspark import mods

    module = sys.modules[FLASH_ATTN]
    make = getattr(module, "_make_mm_prefix_mask_mod", None)
    if make is None:
        return "none"
    parameters = inspect.signature(make).parameters
    first = {"max_ranges": 3} if "max_ranges" in parameters else {}
    assert make(**first) == mods.MmPrefix()
    if "sliding_window_left" in parameters:
        assert make(**first, sliding_window=0, sliding_window_left=17) == mods.MmPrefix(window_left=16)
        clamped = make(**first, sliding_window=17, sliding_window_left=17)
        assert clamped == mods.MmPrefix(window_left=16, clamp_window=True)
    rswa = getattr(module, "_make_rswa_mask_mod", None)
    if rswa is None:
        return "PrefixLM"
    assert rswa() == mods.RSwa()
    return "PrefixLM, R-SWA"


def doctor(c: Context) -> None:
    """What `flashspark doctor` would print of this process."""
    from flashspark.vllm import doctor as module

    report = module.inspect_process()
    names = {row["name"]: row["holder"] for row in report["names"]}
    assert names[f"{FA_UTILS}.get_flash_attn_version"] == "flashspark", names
    assert report["active"] and report["capability"] == "12.0", report
    assert report["backends"]["128, auto"] == "flashspark.vllm.backend.FlashSparkBackend", report["backends"]
    assert report["backends"]["128, fp8"] == "flashspark.vllm.backend.FlashSparkBackend", report["backends"]
    assert not report["backends"]["128, nvfp4"].startswith("flashspark"), report["backends"]


def _first(modules: list[str], name: str) -> Any:
    """The name from the first of these modules that exists."""
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError:
            continue
    raise AssertionError(f"none of {modules} exists")


def docs(c: Context) -> str:
    """Every `vllm serve` line of docs/vllm.md is one that this release's command line takes."""
    import shlex
    from pathlib import Path

    homes = ("openai.cli_args", "launchers.cli_args", "common.cli_args")  # it has moved twice
    make_arg_parser = _first([f"vllm.entrypoints.{home}" for home in homes], "make_arg_parser")
    parser = make_arg_parser(_first(["vllm.utils.argparse_utils", "vllm.utils"], "FlexibleArgumentParser")())
    text = Path(__file__).parents[2].joinpath("docs/vllm.md").read_text()
    lines = [shlex.split(line)[2:] for line in text.splitlines() if line.startswith("vllm serve ")]
    for words in [*lines, ["some/model", "--attention-config.flash_attn_version=2"]]:
        try:
            parser.parse_args(words)
        except SystemExit as error:
            raise AssertionError(f"vllm serve {shlex.join(words)}: exit status {error}") from error
    assert len(lines) >= 5, lines
    return f"{len(lines)} lines"


TAKEN = (slot, importers, version, predicates, relatives, warmups, graphs, release, masks, doctor, docs)
