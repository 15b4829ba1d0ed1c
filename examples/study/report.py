"""The figures of a study for people: tables, what stands out, a plot."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from marked_page import write_between

_MARKS = (
    "<!-- figures, written by pruning_study.py -->",
    "<!-- end of the figures -->",
)
# Better to worse, as the papers say: each compares itself with those after it.
_ORDER = ("alps", "sparsegpt", "wanda", "magnitude")
# Perplexities closer than this are called equal.
_EQUAL = 0.005
# Okabe and Ito's colours, told apart with any colour vision.
_STYLES = {
    "magnitude": ("#D55E00", "o"),
    "wanda": ("#E69F00", "s"),
    "sparsegpt": ("#0072B2", "^"),
    "alps": ("#009E73", "D"),
}
_TUNED = {"masked": ("#CC79A7", "v"), "sparse": ("#000000", "x")}


class Figures:
    """The rows of a record, found by what was measured."""

    def __init__(self, record: Mapping[str, Any]):
        self.record, self.rows = record, record["rows"]
        self.dense = self.one(method="dense", tuning="none")["perplexity"]

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        """Returns the rows with these values, in order of sparsity."""
        found = [r for r in self.rows if all(r[k] == v for k, v in wanted.items())]
        return sorted(found, key=lambda row: row["sparsity"])

    def one(self, **wanted: Any) -> dict[str, Any]:
        """Returns the first such row."""
        return self.find(**wanted)[0]

    def one_shot(self, **wanted: Any) -> dict[float, float]:
        """Returns perplexity by sparsity in one shot, without patterns."""
        rows = self.find(tuning="none", pattern=None, **wanted)
        return {row["sparsity"]: row["perplexity"] for row in rows}

    @property
    def methods(self) -> list[str]:
        """The methods, in the order they were asked for."""
        return list(dict.fromkeys(r["method"] for r in self.rows[1:] if r["zeros"]))

    def change(self, perplexity: float) -> str:
        """Returns how far a perplexity is from the dense model's."""
        return f"{perplexity / self.dense - 1:+.1%}"


def page(record: Mapping[str, Any]) -> str:
    """Returns the figures of a study as Markdown."""
    figures = Figures(record)
    parts = [_about(record), "![Perplexity against sparsity](images/pruning-study.png)"]
    parts += [_one_shot(figures), *_notes(figures), _patterns(figures)]
    if figures.find(tuning="dense"):
        parts.append(_tuned(figures))
    return "\n\n".join(parts)


def update_page(path: Path, record: Mapping[str, Any]) -> None:
    """Puts the figures between the two marks of a Markdown page.

    Raises:
      ValueError: the page lacks the marks.
    """
    write_between(path, _MARKS, page(record))


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Draws perplexity over sparsity as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figures = Figures(record)
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    top = 8 * figures.dense  # what is above is in the table
    for method in figures.methods:
        colour, marker = _STYLES[method]
        for budget, line in (("uniform", "-"), ("owl", ":")):
            curve = figures.one_shot(method=method, budget=budget)
            if curve:
                axes.plot(
                    [100 * s for s in curve],
                    list(curve.values()),
                    line,
                    color=colour,
                    marker=marker,
                    markersize=5 if budget == "uniform" else 3,
                    label=method + (", OWL budgets" if budget == "owl" else ""),
                )
    for kind, (colour, marker) in _TUNED.items():
        for method in figures.methods:
            rows = figures.find(method=method, tuning=kind)
            if rows:
                axes.plot(
                    [100 * row["sparsity"] for row in rows],
                    [row["perplexity"] for row in rows],
                    "--",
                    color=colour,
                    marker=marker,
                    label=f"{method}, fine-tuned {kind}",
                )
    axes.axhline(figures.dense, color="0.5", linewidth=0.8, label="dense")
    axes.set_yscale("log")
    axes.set_ylim(0.9 * figures.dense, top)
    ticks = [t for t in (5, 10, 20, 50, 100, 200, 500, 1000, 2000) if t < top]
    axes.set_yticks([t for t in ticks if t > 0.9 * figures.dense])
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("zeros in the pruned matrices in %")
    axes.set_ylabel("held-out perplexity per token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def _about(record: Mapping[str, Any]) -> str:
    model, training = record["model"], record["training"]
    settings, facts = record["settings"], record["environment"]
    text = (
        f"An OPT of {model['layers']} layers of width {model['width']}, "
        f"{model['positions']} positions and {model['vocabulary']:,} tokens; "
        f"{model['prunable_weights']:,} weights are pruned. "
    )
    if training:
        books = ", ".join(f"`{name}`" for name in training["texts"])
        epochs = training["epochs"]
        text += (
            f"`train_demo.py` trained it dense, {epochs} epoch{'s' * (epochs > 1)} of "
            f"{training['training_tokens']:,} tokens ({books}), in "
            f"{training['seconds']:.0f} s on {training['device']}. "
        )
    text += (
        f"Perplexity is of {model['held_out_tokens']:,} held-out tokens in windows of "
        f"{model['positions']}, in float32 on weights stored in float16; dense it is "
        f"**{Figures(record).dense:.2f}**. Calibration: {settings['samples']} windows, "
        f"{model['calibration_tokens']:,} tokens, of the training text. Seed "
        f"{settings['seed']}, {facts['device']}, jax {facts['jax']}, {facts['date']}."
    )
    if record["missing"]:
        text += f" {record['missing']} models have not been measured yet."
    if model["zeros_before"] > 0.01 * model["prunable_weights"]:
        share = model["zeros_before"] / model["prunable_weights"]
        text += f" {share:.1%} of the weights were zero to begin with."
    return text


def _one_shot(figures: Figures) -> str:
    sparsities = sorted(
        {s for method in figures.methods for s in figures.one_shot(method=method)}
    )
    lines = ["| one shot | " + " | ".join(f"{s:.4g}" for s in sparsities) + " |"]
    lines.append("|---" + "|---:" * len(sparsities) + "|")
    for budget in ("uniform", "owl"):
        for method in figures.methods:
            curve = figures.one_shot(method=method, budget=budget)
            if curve:
                label = f"`{method}`" + (", OWL" if budget == "owl" else "")
                values = [_number(curve[s]) if s in curve else "" for s in sparsities]
                lines.append(f"| {label} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def _notes(figures: Figures) -> list[str]:
    """What the table says: the best at 60%, and where the papers' claims fail."""
    notes = []
    at_60 = figures.find(tuning="none", pattern=None, sparsity=0.6)
    if at_60:
        best = min(at_60, key=lambda row: row["perplexity"])
        budget = " with OWL budgets" if best["budget"] == "owl" else ""
        notes.append(
            f"Best at 60%: `{best['method']}`{budget}, "
            f"{_number(best['perplexity'])} ({figures.change(best['perplexity'])} over "
            "dense)."
        )
    notes.append(_ordering(figures))
    notes.append(_owl(figures))
    return [note for note in notes if note]


def _ordering(figures: Figures) -> str:
    order = [method for method in _ORDER if method in figures.methods]
    if len(order) < 2:
        return ""
    wrong, equal = [], []
    for better, worse in itertools.pairwise(order):
        first = figures.one_shot(method=better, budget="uniform")
        second = figures.one_shot(method=worse, budget="uniform")
        changes = {s: first[s] / second[s] - 1 for s in first if s in second}
        lost = [s for s, change in changes.items() if change > _EQUAL]
        same = [s for s, change in changes.items() if abs(change) <= _EQUAL]
        if lost:
            wrong.append(f"`{better}` is worse than `{worse}` at {_percents(lost)}")
        if same:
            equal.append(f"`{better}` and `{worse}` at {_percents(same)}")
    names = ", ".join(f"`{method}`" for method in order)
    text = f"The papers' order, best first, is {names}. "
    text += f"Not here: {', '.join(wrong)}." if wrong else "It holds throughout."
    if any(note.startswith("`wanda` is worse than `magnitude`") for note in wrong):
        text += (
            " (`wanda` compares the weights of an output with each other, as its paper "
            "does, `magnitude` those of the whole matrix.)"
        )
    return text + (f" Equal within 0.5%: {', '.join(equal)}." if equal else "")


def _owl(figures: Figures) -> str:
    parts = []
    for method in figures.methods:
        uniform = figures.one_shot(method=method, budget="uniform")
        owl = figures.one_shot(method=method, budget="owl")
        changes = [
            f"{owl[s] / uniform[s] - 1:+.1%} at {s:.0%}" for s in owl if s in uniform
        ]
        if changes:
            parts.append(f"`{method}` {', '.join(changes)}")
    if not parts:
        return ""
    return (
        "OWL's paper, which is about large models with many layers, promises lower "
        "perplexity at high sparsity. Here, beside uniform budgets: "
        f"{'; '.join(parts)}."
    )


def _percents(sparsities: Sequence[float]) -> str:
    return ", ".join(f"{100 * s:.4g}" for s in sparsities) + "%"


def _patterns(figures: Figures) -> str:
    patterns = list(dict.fromkeys(r["pattern"] for r in figures.rows if r["pattern"]))
    lines = [
        "| half zeros | any place | " + " | ".join(patterns) + " |",
        "|---" + "|---:" * (len(patterns) + 1) + "|",
    ]
    for method in figures.methods:
        free = figures.one_shot(method=method, budget="uniform").get(0.5)
        values = ["" if free is None else _number(free)]
        for pattern in patterns:
            rows = figures.find(method=method, pattern=pattern)
            values.append(_number(rows[0]["perplexity"]) if rows else "")
        lines.append(f"| `{method}` | " + " | ".join(values) + " |")
    return "\n".join(lines)


def _tuned(figures: Figures) -> str:
    control = figures.one(tuning="dense")
    settings = figures.record["settings"]
    lines = [
        f"Fine-tuned for {control['steps']} steps of {settings['batch']} windows, peak "
        f"learning rate {settings['learning_rate']:g}; *masked*: dense with a mask "
        "after every step, *sparse*: the nonzero values alone "
        "([fine-tuning.md](fine-tuning.md)). The dense model trained on in the same "
        f"way comes to {control['perplexity']:.2f} "
        f"({figures.change(control['perplexity'])}).",
        "",
        "| start | zeros | one shot | masked | sparse |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in figures.find(tuning="masked"):
        same = {"method": row["method"], "sparsity": row["sparsity"]}
        cells = []
        for kind in ("masked", "sparse"):
            rows = figures.find(**same, tuning=kind)
            value = rows[0]["perplexity"] if rows else None
            cells.append(f"{_number(value)} ({figures.change(value)})" if value else "")
        before = figures.find(**same, tuning="none", pattern=None, budget="uniform")
        shot = _number(before[0]["perplexity"]) if before else ""
        lines.append(
            f"| `{row['method']}` | {row['sparsity']:.0%} | {shot} | {cells[0]} "
            f"| {cells[1]} |"
        )
    return "\n".join(lines)


def _number(perplexity: float) -> str:
    if perplexity < 1000:
        return f"{perplexity:.2f}"
    return f"{perplexity:,.0f}" if perplexity < 1e6 else f"{perplexity:.1e}"
