"""Plots the measured speed-up against rows of x and zeros: docs/images/speedup.svg.

    python benchmarks/plot_speedup.py

The figures are those of `results/matmul-six-layers-nvidia-h200.json` up to 128 rows,
and above of `matmul-many-rows-nvidia-h200.json`. Named, a result file of matmul.py gets
a plot of all its layers beside it, as a PNG; matmul.py does so, too.
"""

import io
import itertools
import pathlib
import re
import sys

import matplotlib
from result_tables import H200, RESULTS, ROOT, load, origin, shape

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FEW_ROWS = RESULTS / f"matmul-six-layers-{H200}.json"
MANY_ROWS = RESULTS / f"matmul-many-rows-{H200}.json"
OUT = ROOT / "docs" / "images" / "speedup.svg"

# Stand-ins for the colours of the page; the style sheet has those of both modes.
INK, PAPER = "#010203", "#fdfcfb"
STYLE = """<style>
svg { --ink: #222; --paper: #fff; }
@media (prefers-color-scheme: dark) { svg { --ink: #ddd; --paper: #1e2129; } }
</style>"""
COLORS = ("#4c9be8", "#2ca58d", "#d9912b", "#d9566b", "#a97bd1")  # on both papers
LAYERS = ("opt-30b.attention", "opt-30b.fc1", "opt-30b.fc2")


def figure() -> str:
    """The plot as SVG."""
    facts, few_rows = load(FEW_ROWS)
    many_facts, many_rows = load(MANY_ROWS)
    results = few_rows + many_rows
    most = max(r["n"] for r in few_rows)
    settings = {
        "svg.hashsalt": "flashjax",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 10,
        "figure.facecolor": PAPER,
        "axes.facecolor": PAPER,
        **{
            f"{name}color": INK
            for name in ("text.", "xtick.", "ytick.", "axes.edge", "axes.label")
        },
    }
    layers = {r["layer"]: r for r in results if r["layer"] in LAYERS}
    with plt.rc_context(settings):
        drawing, panels = plt.subplots(
            1, len(layers), figsize=(9, 3.4), sharey=True, layout="constrained"
        )
        for axes, (layer, example) in zip(panels, layers.items(), strict=True):
            draw(axes, [r for r in results if r["layer"] == layer])
            axes.set_ylim(0.6, 2.4)
            axes.set_title(f"{layer.split('.')[1]}, {shape(example)}", fontsize=10)
        panels[0].set_ylabel("times as fast as dense")
        panels[0].legend(frameon=False, fontsize=9)
        drawing.suptitle(
            f"{facts['device']}, {results[0]['dtype']}, OPT-30B ({origin(facts)};\n"
            f"above {most} rows {origin(many_facts)})",
            fontsize=9,
        )
        buffer = io.StringIO()
        drawing.savefig(buffer, format="svg", metadata={"Date": None})
        plt.close(drawing)
    svg = buffer.getvalue().replace(INK, "var(--ink)").replace(PAPER, "var(--paper)")
    return re.sub(r"(<svg[^>]*>)", rf"\1\n{STYLE}", svg, count=1)


def save_png(path: pathlib.Path) -> pathlib.Path:
    """Draws a result file of matmul.py beside itself; returns the plot's path.

    A panel is a layer with one dtype and one pattern of zeros.
    """
    facts, results = load(path)
    panels: dict[tuple, list[dict]] = {}
    for r in results:
        key = r["layer"], r["dtype"], r.get("pattern", "random")
        panels.setdefault(key, []).append(r)
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    drawing, grid = plt.subplots(
        lines,
        columns,
        figsize=(3.2 * columns, 3 * lines + 0.4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (key, found) in zip(grid.flat, panels.items(), strict=False):
        draw(axes, found)
        axes.set_title(f"{' '.join(key)}\n{shape(found[0])}", fontsize=9)
    grid[0, 0].set_ylim(0, 1.05 * max(r["speedup"] for r in results))
    grid[0, 0].set_ylabel("times as fast as dense")
    grid[0, 0].legend(frameon=False, fontsize=8)
    drawing.suptitle(f"{facts['device']} ({origin(facts)})", fontsize=9)
    plot = path.with_suffix(".png")
    drawing.savefig(plot, dpi=120)
    plt.close(drawing)
    return plot


def draw(axes: plt.Axes, results: list[dict]) -> None:
    sparsities = sorted({r["sparsity"] for r in results})
    for sparsity, color in zip(sparsities, itertools.cycle(COLORS), strict=False):
        points = sorted(
            (r["n"], r["speedup"]) for r in results if r["sparsity"] == sparsity
        )
        axes.plot(
            *zip(*points, strict=True),
            marker="o",
            markersize=3,
            color=color,
            label=f"{sparsity:.0%} zeros",
        )
    axes.axhline(1, color=INK, linewidth=1, linestyle="--")
    axes.set_xscale("log", base=2)
    rows = sorted({r["n"] for r in results})
    labels, last = [], 0
    for n in rows:  # those for which there is room
        labels.append(str(n) if n >= 4 * last else "")
        last = n if labels[-1] else last
    axes.set_xticks(rows, labels)
    axes.set_xlabel("rows of x")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def main() -> None:
    if sys.argv[1:]:
        for name in sys.argv[1:]:
            print(save_png(pathlib.Path(name)))
        return
    OUT.write_text(figure(), encoding="utf-8")
    print(OUT.relative_to(ROOT))


if __name__ == "__main__":
    main()
