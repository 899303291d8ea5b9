"""Ways in which a process can meet flashspark and vLLM. Each runs in a process of its own that has imported neither.

A scenario gives {check: remark}; it raises nothing but what stops all of it.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hugging_face
from attention import CALLS, per_request_causal
from checks import (
    FA_UTILS,
    FLASH_ATTN,
    IMPORTERS,
    INTERFACE,
    MLA_DIMS,
    REPLACED,
    TAKEN,
    Context,
    graphs,
    importers,
    load_importers,
    mla_layer,
    mla_model,
    relatives,
    slot,
    version,
    warmups,
)
from forward import FORWARD

Results = dict[str, str]
SELECTOR = "vllm.v1.attention.selector"


def run(checks: Any, *arguments: Any) -> Results:
    """{check: remark, or "FAILED: ..."}"""
    results = {}
    for check in checks:
        name = check.__name__.strip("_")
        try:
            results[name] = check(*arguments) or "ok"
        except Exception as error:
            traceback.print_exc()
            results[name] = f"FAILED: {type(error).__name__}: {error}"[:600]
    return results


def context() -> Context:
    import vllm
    from vllm.config import VllmConfig

    return Context(os.environ["CHECKED_VERSION"], VllmConfig()) if vllm else None


def disarm() -> None:
    """As if there were no start-up hook."""
    sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ not in ("_FlashSparkStart", "Finder")]


def plugins() -> None:
    """vLLM's own loading of the plug-ins."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()


def load() -> None:
    importlib.import_module(SELECTOR)
    importlib.import_module(FLASH_ATTN)


def hook() -> Results:
    """The start-up hook alone, as under VLLM_PLUGINS=""."""
    c = context()
    return run((*TAKEN, *CALLS, *FORWARD), c)


def plugin() -> Results:
    """No hook; vLLM's modules are loaded, and a backend chosen, before the plug-in comes."""
    disarm()
    c = context()
    load()
    load_importers()
    assert c.select().__module__.startswith("vllm."), c.select()
    layers = [mla_layer(mla_model(c, dims)) for dims in MLA_DIMS.values()]
    assert {getattr(layer, "vllm_flash_attn_version", 2) for layer in layers} == {2}, layers
    plugins()
    return run(TAKEN, c)


def stock_names() -> str:
    """Every name that would be replaced holds vLLM's own object, and the slot vLLM's own class."""
    load_importers()
    from flashspark.vllm import replace

    assert not replace.records
    count = 0
    for module in IMPORTERS:
        for name in (*REPLACED, "is_fa_version_supported", "_make_mm_prefix_mask_mod", "_make_rswa_mask_mod"):
            held = getattr(sys.modules.get(module), name, None)
            if held is not None:
                assert held.__module__.startswith("vllm."), f"{module}.{name} is {held}"
                code = getattr(held, "__code__", None)
                assert code is None or Path(code.co_filename).parent != Path(replace.__file__).parent, (module, code)
                assert not hasattr(held, "__wrapped__") or "cache" in type(held).__name__, f"{module}.{name}: {held}"
                count += 1
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    assert not AttentionBackendEnum.FLASH_ATTN.is_overridden()
    assert AttentionBackendEnum.FLASH_ATTN.get_class() is sys.modules[FLASH_ATTN].FlashAttentionBackend
    return f"{count} names"


def stock_everywhere(c: Context) -> str:
    """stock_names, and layers get vLLM's own class."""
    said = stock_names()
    chosen = c.select()
    assert chosen is sys.modules[FLASH_ATTN].FlashAttentionBackend, chosen
    return said


def off(name: str) -> Results:
    os.environ[name] = "0"
    c = context()
    load()
    plugins()
    result = run((stock_everywhere,), c)
    finders = [type(f).__name__ for f in sys.meta_path]
    return result | {"no hook": "ok" if "Finder" not in finders else f"FAILED: {finders}"}


def off_flashspark() -> Results:
    return off("FLASHSPARK")


def off_shim_switch() -> Results:
    return off("FA4_SM120_SHIM")


def stays_stock(reason: str, flash_attn: bool = True) -> Results:
    """vLLM works as it is, and one line of the log says why. flash_attn: stock would choose FLASH_ATTN here."""
    c = context() if flash_attn else None
    load()
    plugins()
    from flashspark.vllm import report, takeover

    results = run((stock_everywhere,), c) if flash_attn else run((stock_names,))
    said = takeover.State.reason
    results["reason"] = "ok" if reason in said else f"FAILED: {said!r}"
    results["one line"] = "ok" if len(report._said) <= 1 else f"FAILED: {report._said}"
    return results


def other_gpu() -> Results:
    os.environ["FAKE_CAPABILITY"] = "8.9"
    return stays_stock("compute capability 8.9 is not 12.x")


def unserved_gpu() -> Results:
    """A GPU that the user names and the library has no kernels for."""
    os.environ |= {"FAKE_CAPABILITY": "10.0", "FLASHSPARK_CAPABILITIES": "10.0"}
    return stays_stock("no kernels for compute capability 10.0", flash_attn=False)


def no_driver() -> Results:
    """libcuda.so.1 and NVML are missing: vLLM finds no platform, and no engine gets far enough to choose a backend."""
    os.environ["FAKE_CAPABILITY"] = ""
    return stays_stock("its platform is none (no GPU, or no driver), not CUDA", flash_attn=False)


def bad_switch() -> Results:
    os.environ["FLASHSPARK_CAPABILITIES"] = "twelve"
    return stays_stock("FLASHSPARK_CAPABILITIES = 'twelve': must be a list such as 9.0,12.x")


def own_error() -> Results:
    """An exception inside our plug-in."""
    from flashspark.vllm import probe

    probe.functions = lambda: 1 // 0
    return stays_stock("an error")


def broken_library() -> Results:
    """A package whose library is cut short."""
    return spoilt_package("library is cut short", lambda library: library.write_bytes(library.read_bytes()[:100_000]))


def missing_library() -> Results:
    """A package without its library: as copied from the source tree."""
    return spoilt_package("library does not load: ImportError: ", Path.unlink)


def doctor_warns(reason: str) -> None:
    from flashspark.vllm import doctor

    found = [f for f in doctor.report()["findings"] if reason in f["text"]]
    assert [(f["level"], f["mend"]) for f in found] == [("warning", doctor.REINSTALL)], found


def spoilt_package(reason: str, spoil: Callable[[Path], object]) -> Results:
    import flashspark

    folder = Path(tempfile.mkdtemp())
    shutil.copytree(Path(flashspark.__file__).parent, folder / "flashspark")
    for library in (folder / "flashspark").glob("*.so"):
        spoil(library)
    for name in [n for n in sys.modules if n.partition(".")[0] == "flashspark"]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        return stays_stock(reason) | run((doctor_warns,), reason)
    finally:
        shutil.rmtree(folder)


def no_kernels() -> Results:
    """A package that was built without nvcc."""
    from flashspark.vllm import takeover

    os.environ.pop("FAKE_KERNELS", None)
    takeover.NO_KERNELS = "cpu-engine"  # which every explanation names
    return stays_stock("built without GPU kernels")


def unknown_vllm() -> Results:
    """A release whose attention function requires an argument that we do not know."""
    importlib.import_module("vllm.platforms").current_platform.is_cuda()
    interface = importlib.import_module(INTERFACE)

    def flash_attn_varlen_func(q, k, v, tomorrow, **others):
        raise AssertionError

    flash_attn_varlen_func.__module__ = INTERFACE
    interface.flash_attn_varlen_func = flash_attn_varlen_func
    importlib.import_module("vllm.vllm_flash_attn").flash_attn_varlen_func = flash_attn_varlen_func
    return stays_stock("this vLLM is unknown: flash_attn_varlen_func has no")


def spark() -> Results:
    """A DGX Spark: compute capability 12.1, which lists of kernels inside vLLM do not all have."""
    os.environ["FAKE_CAPABILITY"] = "12.1"
    return run((slot, importers, version, relatives, warmups, graphs), context())


def hopper() -> Results:
    """An H100 stands in: FLASHSPARK_CAPABILITIES=9.0, where stock is version 3 and its builder says ALWAYS."""
    os.environ |= {"FAKE_CAPABILITY": "9.0", "FLASHSPARK_CAPABILITIES": "9.0"}
    disarm()
    c = context()
    load()
    stock = sys.modules[FLASH_ATTN].FlashAttentionMetadataBuilder._cudagraph_support.name
    plugins()

    def stand_in(c: Context) -> str:
        assert stock == "ALWAYS", stock
        assert sys.modules[FA_UTILS].get_flash_attn_version(head_size=128) == 4
        assert c.select().__module__ == "flashspark.vllm.backend"
        return "4"

    return run((stand_in, graphs, warmups), c)


def override() -> Results:
    """The user asks for another version, or for batch invariance: the layers are stock's."""
    c = context()
    load()

    def user(c: Context) -> None:
        from vllm.config import set_current_vllm_config

        ask = sys.modules[FA_UTILS].get_flash_attn_version
        if hasattr(c.config, "attention_config"):
            c.config.attention_config.flash_attn_version = 2
        with set_current_vllm_config(c.config):
            assert ask(head_size=128) == 2
            from flashspark.vllm.backend import FlashSparkBackend

            assert not FlashSparkBackend.supports_sink() and not FlashSparkBackend.supports_head_size(512)
            for dims in MLA_DIMS.values():
                layer = mla_layer(mla_model(c, dims))
                assert layer is None or layer.vllm_flash_attn_version == 2
        c.config.attention_config.flash_attn_version = None
        assert ask(head_size=128) == 4

    def invariant(c: Context) -> None:
        # Version 4 has no such mode in vLLM; ours does, and every call asks for it.
        from flashspark.vllm import switches

        assert not switches.batch_invariant()
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
        switches.reread()
        try:
            assert sys.modules[FA_UTILS].get_flash_attn_version(head_size=128) == 4
            assert deterministic()
        finally:
            del os.environ["VLLM_BATCH_INVARIANT"]
            switches.reread()
        assert not deterministic()

    def deterministic() -> bool:
        """Whether an attention call asks for it."""
        from flashspark.vllm import attention

        seen, native = [], attention._forward()
        loader = attention._forward
        attention._forward = lambda: (
            lambda *args, **given: seen.append(given["deterministic"]) or native(*args, **given)
        )
        try:
            per_request_causal(c)
        finally:
            attention._forward = loader
        assert len({*seen}) == 1, seen
        return seen[0]

    return run((user, invariant), c)


def community_shim() -> Results:
    """The guide's shim beside us: it takes names before and after flashspark does."""
    folder = Path(tempfile.mkdtemp())
    (folder / "fa4_sm120_shim.py").write_text(
        "def get_flash_attn_version(*args, **kwargs): return 4\n"
        "def steal(module): module.get_flash_attn_version = get_flash_attn_version\n"
    )
    sys.path.insert(0, str(folder))
    c = context()
    shim = importlib.import_module("fa4_sm120_shim")
    utils = importlib.import_module(FA_UTILS)
    shim.steal(utils)
    load()
    shim.steal(utils)
    plugins()

    def in_front(c: Context) -> None:
        from flashspark.vllm import replace, report

        for module in (utils, sys.modules[FLASH_ATTN]):
            assert module.get_flash_attn_version is next(
                r.ours for r in replace.records if r.name == "get_flash_attn_version"
            ), module
        assert utils.get_flash_attn_version(head_size=128) == 4 and utils.get_flash_attn_version(head_size=132) == 2
        said = [t for t in report._said if "shim" in t]
        assert any("fa4_sm120_shim.py" in t for t in said), said

    results = run((in_front,), c)
    shutil.rmtree(folder)
    return results


def hugging_face_kernel() -> Results:
    """flashspark's take-over is off, and an import hook gives vLLM a kernel of a Hugging Face repository."""
    os.environ["FLASHSPARK"] = "0"
    disarm()
    if not hugging_face.fits(os.environ["CHECKED_VERSION"]):
        return {"calls": "left out: wants four results"}
    folder = Path(tempfile.mkdtemp())
    kernel = hugging_face.install(folder)
    c = context()
    load()
    results = run((hugging_face.calls,), c, kernel)
    shutil.rmtree(folder)
    return results


def _child(queue: Any) -> None:
    load()
    plugins()
    from flashspark.vllm import takeover
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    queue.put((takeover.State.active, AttentionBackendEnum.FLASH_ATTN.get_class().__module__))


def workers() -> Results:
    """Worker processes, forked after the takeover and spawned afresh."""
    context()
    load()
    results = {}
    for method in ("fork", "spawn"):
        ctx = multiprocessing.get_context(method)
        queue = ctx.Queue()
        process = ctx.Process(target=_child, args=(queue,))
        process.start()
        got = queue.get(timeout=1000)
        process.join()
        results[method] = "ok" if got == (True, "flashspark.vllm.backend") else f"FAILED: {got}"
    return results


SCENARIOS: tuple[Callable[[], Results], ...] = (
    *(hook, plugin, spark, hopper, off_flashspark, off_shim_switch, other_gpu, unserved_gpu, no_driver, override),
    *(bad_switch, own_error, broken_library, missing_library, no_kernels, unknown_vllm, community_shim, workers),
    hugging_face_kernel,
)
BY_NAME: dict[str, Callable[[], Results]] = {s.__name__: s for s in SCENARIOS}
