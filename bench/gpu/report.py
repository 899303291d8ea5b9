"""Turns measured times into the table, the plot and one JSON document, and joins the runs of two builds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
from plot import bar_chart

PEERS = ("torch FA2", "FA2", "FlashInfer", "FA3")
BEST_OF = ("FA2", "FlashInfer")
SHORT_S = 60e-6  # below this duration the table shows times instead of rates


def best_peer(row: dict[str, Any]) -> str | None:
    """The fastest mma.sync peer that ran: vLLM's FA2 or FlashInfer, else torch's FA2."""
    there = [name for name in BEST_OF if name in row["times"]] or [n for n in PEERS[:1] if n in row["times"]]
    return min(there, key=lambda name: row["times"][name]["graph_s"], default=None)


def ratio(row: dict[str, Any], ours: str, rows: list[dict[str, Any]]) -> float | None:
    """Speed relative to the row's reference, from medians of the same run."""
    if ours not in row["times"]:
        return None
    mine = row["times"][ours]["graph_s"]
    if not row["own"]:
        peer = best_peer(row)
        return row["times"][peer]["graph_s"] / mine if peer else None
    if not row["page_size"]:
        return None
    same = [r for r in rows if r["own"] and not r["page_size"] and r["shape"] == row["shape"] and ours in r["times"]]
    return same[0]["times"][ours]["graph_s"] / mine if same else None


def complete(document: dict[str, Any]) -> None:
    """Adds rates and ratios to the times."""
    peak, copy = document["mma_peak_tflops"], document["copy_gb_per_s"]
    for row in document["rows"]:
        for entry in row["times"].values():
            entry["tflops"] = row["flop"] / entry["graph_s"] / 1e12
            entry["gb_per_s"] = row["bytes"] / entry["graph_s"] / 1e9
            if peak:
                entry["of_mma_peak"] = entry["tflops"] / peak
            entry["of_copy"] = entry["gb_per_s"] / copy
        if not row["own"]:
            row["best_peer"] = best_peer(row)
        row["ratio"] = {ours: ratio(row, ours, document["rows"]) for ours in document["ours"]}


def join(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Adds the second document's own columns to the first. Their ratios refer to the peers of the second run."""
    if first["machine"]["name"] != second["machine"]["name"]:
        raise SystemExit(f"runs of different machines: {first['machine']['name']}, {second['machine']['name']}")
    clash = set(first["ours"]) & set(second["ours"])
    if clash:
        raise SystemExit(f"both runs call themselves {sorted(clash)}: give one a --label")
    rows = {row["name"]: row for row in second["rows"]}
    for row in first["rows"]:
        other = rows.get(row["name"])
        for ours in second["ours"]:
            if other and ours in other["times"]:
                row["times"][ours] = other["times"][ours]
                row["ratio"][ours] = other["ratio"][ours]
    first["ours"] += second["ours"]
    first["host_call_us"] |= second["host_call_us"]
    return first


def figure(row: dict[str, Any], name: str) -> str:
    if name not in row["times"]:
        return "-"
    entry = row["times"][name]
    return f"{entry['graph_s'] * 1e6:.1f} us" if entry["graph_s"] < SHORT_S else f"{entry['tflops']:.0f}"


def verdict(value: float | None, row: dict[str, Any], first: bool) -> str:
    if value is None:
        return "-"
    must = row["must"] if first else 0.95 * (not row["own"])
    mark = "" if not must else " ✗" if value < must else " ✓✓" if value >= row["aim"] else " ✓"
    return f"{value:.2f}{mark}"


def table(document: dict[str, Any]) -> str:
    ours, machine, peak = document["ours"], document["machine"], document["mma_peak_tflops"]
    peers = [name for name in PEERS if any(name in row["times"] for row in document["rows"])]
    head = ["workload", *(f"{x} | ratio" for x in ours), "must", "aim", "of ceiling", *peers, "eager us"]
    lines = [
        f"{machine['name']}, driver {machine.get('driver_version', '?')}, SM clock {machine.get('clocks.sm', '?')}, "
        f"{document['date']}, commit {document['commit']}",
        f"mma.sync ceiling {peak:.0f} TFLOP/s" if peak else "mma.sync ceiling not measured",
        f"copy {document['copy_gb_per_s']:.0f} GB/s",
        "",
        "TFLOP/s in a CUDA graph, us below 60 us. Ratio: to the better of FA2 and FlashInfer; pages: to our contiguous",
        "",
        "| " + " | ".join(head) + " |",
        "|---|" + "---:|" * (len(head) - 1 + len(ours)),
    ]
    for row in document["rows"]:
        cells = [row["name"]]
        for n, name in enumerate(ours):
            cells += [figure(row, name), verdict(row["ratio"].get(name), row, n == 0)]
        share = row["times"].get(ours[0], {}).get("of_mma_peak")
        cells += [f"{row['must']:.2f}" if row["must"] else "-", f"{row['aim']:.2f}" if row["aim"] else "-"]
        cells += [f"{share:.0%}" if share else "-", *(figure(row, name) for name in peers)]
        eager = row["times"].get(ours[0], {}).get("eager_s")
        cells.append(f"{eager * 1e6:.1f}" if eager else "-")
        lines.append("| " + " | ".join(cells) + " |")
    calls = ", ".join(f"{name} {us:.1f}" for name, us in document["host_call_us"].items())
    lines += ["", f"Host time of a call from torch, us (must 8, aim 4): {calls}"]
    if document.get("first_call_ms"):
        imported, first = document["first_call_ms"]
        lines.append(f"New process: import {imported:.0f} ms, first call {first:.0f} ms (must 50)")
    for name, reason in document["left_out"].items():
        lines.append(f"left out: {name}: {reason}")
    return "\n".join(lines)


def plot(document: dict[str, Any]) -> str:
    """Rates of the rows that are long enough to have meaningful ones."""
    names = [*document["ours"], *(n for n in ("FA2", "FlashInfer", "FA3", "torch FA2"))]
    bars = {}
    for row in document["rows"]:
        first = row["times"].get(document["ours"][0])
        if row["own"] or not first or first["graph_s"] < SHORT_S:
            continue
        bars[row["name"]] = {n: row["times"][n]["tflops"] for n in names[:4] if n in row["times"]}
    return bar_chart(f"Attention, bf16, TFLOP/s ({document['machine']['name']})", bars, left=250) if bars else ""


def missed(document: dict[str, Any]) -> list[str]:
    """Cells that miss their requirement."""
    values = [(row["name"], row["ratio"].get(document["ours"][0]), row["must"]) for row in document["rows"]]
    return [f"{name}: {value:.3f} < {must}" for name, value, must in values if value is not None and value < must]
