"""The figures of a run for people: loss curve, tables in the documentation."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marked_page import write_between

from flashjax.checkpoint import CheckpointError

_MARKS = (
    "<!-- figures of training.json, written by demo_report.py -->",
    "<!-- end of the figures -->",
)


def read_record(folder: Path) -> dict[str, Any]:
    """Reads the `training.json` of a model folder.

    Raises:
      CheckpointError: there is none, or it is no record of a run.
    """
    path = folder / "training.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: expected the record of a training run, got {error}"
        ) from error
    if not isinstance(record, dict) or "dense_perplexity" not in record:
        raise CheckpointError(
            f"{path}: expected the record of a training run, got other JSON"
        )
    return record


def tables(record: Mapping[str, Any]) -> str:
    """Returns the figures of a run as Markdown."""
    held_out = record["held_out"]
    dense, pruned = record["dense_perplexity"], record["pruned_perplexity"]
    seconds = record["seconds"]
    settings = record["settings"]
    phases = {phase["name"]: phase for phase in record["history"] if phase["kept"]}
    lines = [
        "| | dense | pruned |",
        "| --- | ---: | ---: |",
        f"| zeros in the pruned matrices | 0.0% | {record['sparsity']:.1%} |",
        f"| parameters that are not zero | {record['parameters']:,} "
        f"| {record['nonzero_parameters']:,} |",
        f"| held-out perplexity | {dense:.2f} | {pruned:.2f} "
        f"({pruned / dense - 1:+.1%}) |",
    ]
    for name, book in held_out["books"].items():
        lines.append(
            f"| of it, `{name}` ({book['tokens']:,} tokens) "
            f"| {book['dense_perplexity']:.2f} | {book['pruned_perplexity']:.2f} |"
        )
    excerpt = held_out["excerpt"]
    lines += [
        f"| `{excerpt['file']}` ({excerpt['tokens']:,} tokens) "
        f"| {excerpt['dense_perplexity']:.2f} | {excerpt['pruned_perplexity']:.2f} |",
        f"| held-out bits per byte | {held_out['dense_bits_per_byte']:.3f} "
        f"| {held_out['pruned_bits_per_byte']:.3f} |",
        f"| epochs | {len(phases['dense']['train_loss'])} "
        f"| {len(phases['pruned']['train_loss'])} more |",
        f"| dropout | {phases['dense']['dropout']:g} "
        f"| {phases['pruned']['dropout']:g} |",
        f"| seconds | {seconds['dense']:.0f} | {seconds['pruned']:.0f} |",
        "",
        f"Held out: {held_out['description']} Perplexities are measured in float32 "
        "on the float16 weights that were saved.",
        "",
        f"Trained on {record['training_tokens']:,} tokens with seed "
        f"{settings['seed']} on {record['device']} with "
        + ", ".join(f"{k} {v}" for k, v in record["versions"].items())
        + ".",
    ]
    lines += [
        "",
        "What the pruned model wrote, prompts included (temperature 0.8, the 40 "
        "likeliest tokens):",
    ]
    for sample in record["samples"]:
        lines += ["", "```text", sample["text"].strip(), "```"]
    return "\n".join(lines)


def update_page(page: Path, record: Mapping[str, Any]) -> None:
    """Puts the figures between the two marks of a Markdown page.

    Raises:
      ValueError: the page lacks the marks.
    """
    write_between(page, _MARKS, tables(record))


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Draws perplexity and sparsity over the epochs of both phases as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    kept = [phase for phase in record["history"] if phase["kept"]]
    figure, (top, bottom) = pyplot.subplots(
        2,
        1,
        sharex=True,
        figsize=(8, 5.5),
        height_ratios=(3, 1),
        layout="constrained",
    )
    start = 0
    for phase in kept:
        epochs = range(start + 1, start + 1 + len(phase["train_loss"]))
        first = start == 0
        for key, colour, label in (
            ("train_loss", "tab:blue", "training (with dropout)"),
            ("validation_loss", "tab:orange", "validation"),
        ):
            values = [math.exp(loss) for loss in phase[key]]
            top.plot(epochs, values, color=colour, label=label if first else None)
        bottom.plot(epochs, [100 * s for s in phase["sparsity"]], color="tab:green")
        if not first:
            for axes in (top, bottom):
                axes.axvline(start + 0.5, color="0.6", linewidth=0.8)
        top.text(
            start + 1,
            0.97,
            "dense" if first else "pruning, then fixed zeros",
            transform=top.get_xaxis_transform(),
            verticalalignment="top",
            color="0.3",
        )
        start += len(phase["train_loss"])
    best = min(kept[0]["validation_loss"])
    top.axhline(
        math.exp(best),
        color="tab:orange",
        linestyle="--",
        linewidth=0.8,
        label="best dense validation",
    )
    top.set_yscale("log")
    worst = max(math.exp(phase["validation_loss"][0]) for phase in kept)
    lowest = min(math.exp(min(phase["train_loss"])) for phase in kept)
    top.set_ylim(min(lowest, math.exp(best)) * 0.9, worst * 1.1)
    ticks = [t for t in (10, 20, 30, 50, 100, 200, 300, 500, 1000) if t < worst]
    top.set_yticks(ticks, [str(tick) for tick in ticks])
    top.minorticks_off()
    top.set_ylabel("perplexity per token")
    top.grid(alpha=0.3)
    top.legend()
    bottom.set_ylabel("zeros in %")
    bottom.set_ylim(-3, 100)
    bottom.set_xlabel("epoch")
    bottom.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
