"""The releases of vLLM that flashspark is tested against, and what the installed one looks like beside them.

python -m flashspark.vllm.versions        prints the table, and the installed release's row

The table decides nothing; flashspark.vllm.probe does. The tests compare it with the releases' files.
"""

from __future__ import annotations

import sys
from dataclasses import astuple, dataclass, fields
from typing import Any

from .names import FA_UTILS, FLASH_ATTN, INTERFACE


@dataclass(frozen=True)
class Release:
    """What differs between releases where flashspark touches them."""

    wrapper: int  # parameters of flash_attn_varlen_func
    version: int  # parameters of get_flash_attn_version
    fp8_gate: str  # what decides on an fp8 cache
    cache: str  # how forward splits the cache into keys and values
    mm_prefix: str  # parameters of the mask's factory
    rswa: bool
    graphs: str  # CUDA-graph class of the builder at version 4
    cascade: bool


_FUNCTION, _DTYPE = "flash_attn_supports_fp8", "flash_attn_supports_kv_cache_dtype"
_OLD, _FULL, _NEW = "max_ranges", "max_ranges sliding_window sliding_window_left", "sliding_window sliding_window_left"
_UNIFORM = "UNIFORM_BATCH"

RELEASES = {
    "0.17.1": Release(30, 2, _FUNCTION, "unbind 0", "-", False, _UNIFORM, True),
    "0.18.0": Release(30, 2, _FUNCTION, "unbind 0", "-", False, _UNIFORM, True),
    "0.19.1": Release(30, 2, _FUNCTION, "unbind 0", "-", False, _UNIFORM, True),
    "0.20.2": Release(30, 4, _FUNCTION, "unbind 0", "-", False, _UNIFORM, True),
    "0.21.0": Release(30, 4, _FUNCTION, "unbind 0", "-", False, _UNIFORM, True),
    "0.22.1": Release(30, 4, "class", "unbind 0", "-", False, _UNIFORM, True),
    "0.23.0": Release(30, 4, "class", "unbind 1", "-", False, _UNIFORM, True),
    "0.24.0": Release(34, 4, "class", "unbind 1", _OLD, False, _UNIFORM, True),
    "0.25.1": Release(34, 4, "class", "unbind 1", _FULL, True, _UNIFORM, True),
    "0.26.0": Release(34, 4, "class", "packed", _FULL, True, _UNIFORM, True),
    "0.27.1": Release(36, 5, _DTYPE, "packed", _FULL, True, _UNIFORM, True),
    "0.28.0": Release(36, 4, _DTYPE, "packed", _NEW, True, _UNIFORM, True),
    "0.29.0": Release(36, 7, _DTYPE, "packed", _NEW, True, _UNIFORM, True),
    "0.30.0": Release(36, 7, _DTYPE, "packed", _NEW, True, _UNIFORM, True),
    "0.31.0": Release(36, 7, _DTYPE, "packed", _NEW, True, _UNIFORM, True),
    "0.32.0": Release(36, 7, _DTYPE, "packed", _NEW, True, _UNIFORM, False),
    "0.33.0": Release(38, 7, _DTYPE, "packed", _NEW, True, "ALWAYS", False),
}


def measured() -> Release:
    """The row of the loaded vLLM, from its own functions."""
    from . import probe

    utils, backend = sys.modules[FA_UTILS], sys.modules[FLASH_ATTN]
    gates = [name for name in (_DTYPE, _FUNCTION) if hasattr(utils, name)]
    factory = getattr(backend, "_make_mm_prefix_mask_mod", None)
    return Release(
        wrapper=len(probe.parameters(sys.modules[INTERFACE].flash_attn_varlen_func)),
        version=len(probe.parameters(utils.get_flash_attn_version)),
        fp8_gate=gates[0] if gates else "class",
        cache=cache_split(backend.FlashAttentionBackend),
        mm_prefix=" ".join(probe.parameters(factory)) if factory else "-",
        rswa=hasattr(backend, "_make_rswa_mask_mod"),
        graphs=probe.graph_support(backend).name,
        cascade=hasattr(backend, "cascade_attention"),
    )


def cache_split(backend: Any) -> str:
    """How forward splits the cache into keys and values: "unbind 0", "unbind 1" or "packed"."""
    blocks, page, heads, dim = 7, 16, 3, 64
    shape = getattr(backend, "get_kv_cache_shape", None)
    sizes = tuple(shape(blocks, page, heads, dim)) if shape else (blocks, heads, page, 2 * dim)
    split = {(2, blocks): "unbind 0", (blocks, 2): "unbind 1", (blocks, heads): "packed"}
    return split.get(sizes[:2], f"unknown {sizes}")


def table(rows: dict[str, Release]) -> str:
    """The rows as text, in aligned columns."""
    lines = [["vLLM", *(f.name for f in fields(Release))]]
    lines += [
        [name, *("yes" if x is True else "-" if x is False else str(x) for x in astuple(row))]
        for name, row in rows.items()
    ]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def main() -> int:
    print(table(RELEASES))
    try:
        import vllm
        import vllm.v1.attention.backends.flash_attn
    except Exception as error:
        print(f"\ninstalled: none that can be imported here ({type(error).__name__}: {error})")
        return 0
    row = measured()
    like = [name for name, known in RELEASES.items() if known == row]
    print(f"\ninstalled, {'like ' + like[-1] if like else 'like none of these'}:\n{table({vllm.__version__: row})}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
