"""What a compiled kernel takes of an SM12x: what budgets.py measures, and budgets_table.py shows."""

from __future__ import annotations

from dataclasses import dataclass

import sass
from kernel_list import Kernel, Launch

SHARED_OF_CTA = 99 * 1024
SHARED_OF_SM, SHARED_RESERVED = 100 * 1024, 1024
REGISTERS_OF_SM, REGISTERS_OF_THREAD, WARPS_OF_SM = 65536, 255, 48


def hmma_of_turn(kernel: Kernel) -> int:
    """One warp's products in a turn of the inner loop: with the keys that it takes at once S = Q K^T and O += P V."""
    tile = kernel.sm_120f
    if kernel.operation == "attention_backward":  # of the rows that it takes at once S, dP, dV and dK
        of_keys = tile.warp_keys // 16 * tile.score_rows // 8 * (kernel.head_dim + kernel.head_dim_v) // 16 * 2
        if tile.sharing != "none":  # of which each has half
            of_keys //= 2
        # A block of rows that is taken at once has no loop of its own inside of that over blocks, with dQ behind it.
        key_warps = tile.warps if tile.sharing == "none" else tile.warps // 2
        whole = tile.score_rows * (2 if tile.sharing == "rows" else 1) == tile.rows
        of_rows = tile.rows * key_warps * tile.warp_keys * kernel.head_dim // 2048 // tile.warps
        if tile.stages == "all":  # dQ beside the scores of all rows
            return of_keys * (tile.rows // tile.score_rows) + of_rows
        if tile.sharing == "columns":  # dQ of two steps, of all keys, for the columns that two warps share
            of_keys *= tile.rows // tile.score_rows
            return of_keys + key_warps * tile.warp_keys // 16 * (kernel.head_dim // key_warps) // 8
        return of_keys + (of_rows if whole else 0)
    scores = tile.score_keys // 8 * (kernel.head_dim // 16)
    output = tile.score_keys // 16 * (kernel.head_dim_v // 8)
    return tile.warp_rows // 16 * (scores + output)


@dataclass
class Measured:
    kernel: Kernel
    values: dict[str, int | float]
    loop: sass.Loop | None  # of the attention kernels

    @property
    def name(self) -> str:
        return self.kernel.name

    @property
    def launch(self) -> Launch:
        return self.kernel.sm_120f

    @property
    def allowed_registers(self) -> int:
        threads = self.launch.threads * self.launch.min_ctas
        return min(REGISTERS_OF_THREAD, REGISTERS_OF_SM // threads // 8 * 8)

    @property
    def resident(self) -> int:
        """CTAs an SM holds."""
        by_registers = REGISTERS_OF_SM // (self.launch.threads * (-(-int(self.values["registers"]) // 8) * 8))
        by_shared = SHARED_OF_SM // (int(self.values["shared_bytes"]) + SHARED_RESERVED)
        return min(by_registers, by_shared, WARPS_OF_SM * 32 // self.launch.threads)
