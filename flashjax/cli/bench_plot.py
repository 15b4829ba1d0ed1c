"""Plots of ``flashjax bench generate``."""

import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flashjax.cli.memory_watch import memory_bytes


def plot(path: Path) -> None:
    """Draws a result file beside itself, as a PNG.

    Speed and memory against the batch, and the speed at the largest batch as bars, with
    those that do not fit the device named.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    results = content["results"]
    first = results[0]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    speed, memory, bars = figure.subplots(1, 3)
    for sparsity in sorted({r["sparsity"] for r in results}):
        rows = [r for r in results if r["sparsity"] == sparsity]
        timed = [r for r in rows if "tokens_per_s" in r]
        label = _label(sparsity)
        batches = [r["batch"] for r in timed]
        speed.plot(batches, [r["tokens_per_s"] for r in timed], "o-", label=label)
        memory.plot(
            [r["batch"] for r in rows],
            [memory_bytes(r) / 1e9 for r in rows],
            "o-",
            label=label,
        )
    if content["device_bytes"]:
        memory.axhline(content["device_bytes"] / 1e9, color="black", linestyle=":")
    for axes, title in ((speed, "tokens/s"), (memory, "memory, GB")):
        axes.set(xlabel="batch", title=title, ylim=(0, None))
        axes.legend()
    _bars(bars, results)
    device = content["environment"]["device"]
    figure.suptitle(
        f"{first['model']}, {first['layers']} layers, {first['dtype']}, prompts of "
        f"{first['prompt']}, {first['new']} new tokens, {device}"
    )
    figure.savefig(path.with_suffix(".png"), dpi=120)


def _bars(axes: Any, results: list[dict[str, Any]]) -> None:
    largest = max(r["batch"] for r in results)
    rows = [r for r in results if r["batch"] == largest]
    heights = [r.get("tokens_per_s", 0) for r in rows]
    labels = [_label(r["sparsity"]) for r in rows]
    axes.bar(labels, heights)
    for index, height in enumerate(heights):
        text = f"{height:.0f}" if height else "does not fit"
        axes.annotate(text, (index, height), ha="center", va="bottom")
    axes.set(title=f"tokens/s at a batch of {largest}")


def _label(sparsity: float) -> str:
    return f"{sparsity:.0%} zeros" if sparsity else "dense"
