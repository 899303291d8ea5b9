"""Turns the times of bench/gpu/decode.py into a table, a heat map and a plot of cost against batch x context."""

from __future__ import annotations

import sys
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
from plot import svg

PEERS = ("FA2", "FA3", "FlashInfer")
# (fraction of the read bandwidth that the best peer stays below, required speed relative to that peer)
MUSTS = ((0.30, 1.30), (0.70, 1.20), (0.90, 1.08), (99.0, 1.00))
SKEWED_MUST, VERIFY_MUST, FP8_MUST, FP8_BYTES = 1.30, 0.93, 1.60, 256 << 20


def join(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Joins runs of one machine with different peers. A peer's time is scaled by the ratio of our own times in the two
    runs."""
    first, *others = documents
    for other in others:
        if other["machine"]["name"] != first["machine"]["name"]:
            raise SystemExit(f"runs of different machines: {first['machine']['name']}, {other['machine']['name']}")
        theirs = {(row["group"], row["name"], row["keys"]): row for row in other["rows"]}
        for row in first["rows"]:
            match = theirs.get((row["group"], row["name"], row["keys"]))
            for name, entry in (match["times"] if match else {}).items():
                factor = row["times"]["flashspark"]["graph_s"] / match["times"]["flashspark"]["graph_s"]
                row["times"].setdefault(name, entry | {"graph_s": entry["graph_s"] * factor})
        first["left_out"] |= other["left_out"]
    return first


def complete(document: dict[str, Any]) -> None:
    """Adds the fraction of bandwidth, the ratios and the requirement of each row."""
    read = document["read_gb_per_s"] * 1e9
    plain = {tuple(r["shape"]): r for r in document["rows"] if r["group"] == "decode"}
    for row in document["rows"]:
        mine = row["times"]["flashspark"]["graph_s"]
        row["of_read"] = row["bytes"] / mine / read
        there = [name for name in PEERS if name in row["times"]]
        best = min(there, key=lambda name: row["times"][name]["graph_s"], default=None)
        row["best_peer"], row["ratio"], row["must"], row["of_own"] = best, None, None, None
        if best:
            theirs = row["times"][best]["graph_s"]
            row["ratio"] = theirs / mine
            share = row["bytes"] / theirs / read
            row["must"] = SKEWED_MUST if "long" in row["group"] else next(m for most, m in MUSTS if share < most)
        shape = row["shape"]
        same = plain.get((*shape[:4], 1, shape[5]))
        if same and row["group"] == "verify":  # relative to our own one-row decode
            row["of_own"], row["own_must"] = same["times"]["flashspark"]["graph_s"] / mine, VERIFY_MUST
        elif same and row["fp8"]:  # relative to our own bf16 cache
            row["of_own"] = same["times"]["flashspark"]["graph_s"] / mine
            row["own_must"] = FP8_MUST if same["bytes"] >= FP8_BYTES else None


def missed_musts(row: dict[str, Any]) -> list[str]:
    """The requirements that a row misses."""
    found = []
    if row["ratio"] is not None and row["ratio"] < row["must"]:
        found.append(f"{row['must']:.2f}")
    if row["of_own"] is not None and row.get("own_must") and row["of_own"] < row["own_must"]:
        found.append(f"own {row['own_must']:.2f}")
    return found


def table(document: dict[str, Any]) -> str:
    machine = document["machine"]
    lines = [
        f"{machine['name']}, driver {machine.get('driver_version', '?')}, {machine.get('clocks.sm', '?')}, "
        f"{document['date']}, commit {document['commit'] or '?'}; read bandwidth {document['read_gb_per_s']:.0f} GB/s. "
        "Microseconds in a CUDA graph.",
        "",
        "| rows | flashspark | of bandwidth | FA2 | FA3 | FlashInfer | best / ours | our q=1 or bf16 / this | missed |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in document["rows"]:
        times = [f"{1e6 * row['times'][n]['graph_s']:.1f}" if n in row["times"] else "-" for n in PEERS]
        cells = [f"{row['group']}: {row['name']}", f"{1e6 * row['times']['flashspark']['graph_s']:.1f}"]
        cells += [f"{row['of_read']:.0%}", *times, f"{row['ratio']:.2f}" if row["ratio"] else "-"]
        cells += [f"{row['of_own']:.2f}" if row["of_own"] else "", ", ".join(missed_musts(row))]
        lines.append("| " + " | ".join(cells) + " |")
    held = [r for r in document["rows"] if r["ratio"] is not None or r["of_own"] is not None]
    lines += ["", f"{sum(bool(missed_musts(r)) for r in held)} of {len(held)} rows miss a must."]
    return "\n".join(lines)


def _colour(ratio: float) -> str:
    """Red below a ratio of 1, white at 1, green above."""
    depth = min(abs(ratio - 1) / 0.5, 1.0)
    low = round(255 - 120 * depth)
    return f"rgb({low},{round(255 - 40 * depth)},{low})" if ratio >= 1 else f"rgb(255,{low},{low})"


def heat_map(document: dict[str, Any]) -> str:
    """Ratio to the best peer for every cell, one panel per head configuration."""
    rows = [r for r in document["rows"] if r["group"] == "decode" and r["ratio"]]
    panels = list(dict.fromkeys(tuple(r["shape"][1:4]) for r in rows))
    keys = sorted({r["shape"][5] for r in rows})
    parts = ['<text class="title" x="16" y="26">best peer / flashspark, decode, pages of 16</text>']
    cell_x, cell_y, top = 58, 22, 50
    for heads in panels:
        batches = sorted({r["shape"][0] for r in rows if tuple(r["shape"][1:4]) == heads})
        parts.append(f'<text x="16" y="{top + 12}">{heads[0]}/{heads[1]} D{heads[2]}</text>')
        for x, length in enumerate(keys):
            parts.append(f'<text x="{130 + x * cell_x}" y="{top + 12}">{length} keys</text>')
        for y, batch in enumerate(batches):
            at = top + 20 + y * cell_y
            parts.append(f'<text x="70" y="{at + 15}">B {batch}</text>')
            for x, length in enumerate(keys):
                found = [r for r in rows if r["shape"] == [batch, *heads, 1, length]]
                if found:
                    ratio = found[0]["ratio"]
                    parts.append(
                        f'<rect x="{126 + x * cell_x}" y="{at}" width="{cell_x - 2}" height="{cell_y - 2}" '
                        f'fill="{_colour(ratio)}"/><text x="{136 + x * cell_x}" y="{at + 15}">{ratio:.2f}</text>'
                    )
        top += 20 + len(batches) * cell_y + 16
    return svg(150 + cell_x * len(keys), top, parts)


def cost_plot(document: dict[str, Any]) -> str:
    """Microseconds against keys in the batch, both axes logarithmic: a performance cliff shows as a step."""
    from math import log2

    rows = [r for r in document["rows"] if r["group"] == "decode"]
    panels = list(dict.fromkeys(tuple(r["shape"][1:4]) for r in rows))
    colours = ("#0b7285", "#e8590c", "#5f3dc4", "#2b8a3e", "#c2255c", "#1864ab", "#868e96")
    xs = [log2(r["keys"]) for r in rows]
    ys = [log2(1e6 * r["times"]["flashspark"]["graph_s"]) for r in rows]

    def scale(values: list[float], first: int, last: int) -> Callable[[float], float]:
        low, high = min(values), max(values)
        return lambda v: first + (v - low) / max(high - low, 1e-9) * (last - first)

    at_x, at_y = scale(xs, 70, 700), scale(ys, 420, 60)
    parts = [
        '<text class="title" x="16" y="26">flashspark, decode: microseconds against keys of the whole batch</text>'
    ]
    for power in range(round(min(xs)), round(max(xs)) + 1, 2):
        parts.append(f'<text x="{at_x(power) - 10:.0f}" y="445">2^{power}</text>')
    for power in range(int(min(ys)), round(max(ys)) + 1):
        parts.append(f'<text x="20" y="{at_y(power) + 4:.0f}">{2**power} us</text>')
    for number, heads in enumerate(panels):
        colour = colours[number % len(colours)]
        parts.append(
            f'<text x="{90}" y="{70 + 16 * number}" style="fill:{colour}">{heads[0]}/{heads[1]} D{heads[2]}</text>'
        )
        for row in rows:
            if tuple(row["shape"][1:4]) == heads:
                x, y = at_x(log2(row["keys"])), at_y(log2(1e6 * row["times"]["flashspark"]["graph_s"]))
                title = f"<title>{escape(row['name'])}</title>"
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}">{title}</circle>')
    return svg(740, 460, parts)


def write_pictures(document: dict[str, Any], folder: Path, label: str) -> None:
    if any(r["group"] == "decode" for r in document["rows"]):
        (folder / f"{label}-cost.svg").write_text(cost_plot(document))
    if any(r["group"] == "decode" and r["ratio"] for r in document["rows"]):
        (folder / f"{label}-heat.svg").write_text(heat_map(document))
