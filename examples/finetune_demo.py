"""Prunes a model in one shot and fine-tunes what is left, sparse.

    python examples/finetune_demo.py --text book.txt --out finetuned

Magnitude pruning to 80% ruins the perplexity of the demo model; training the nonzero
weights brings much of it back. Gradients and the optimizer's state exist at the
nonzeros alone. Beside it the same training runs dense, with a mask that sets the pruned
weights to 0 after every step: both must give the same perplexity.

Writes the model to --out with the record of the run, finetune.json, and the curves,
finetune.png. The last 5% of every text are not trained on.
"""

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from demo_training import text
from demo_training.text import BOS_ID
from fine_tuning import DECODER, decoder_kernels, masked_step, random_batches, train
from marked_page import write_between

import flashjax as fj
from flashjax.models import opt
from flashjax.models.opt.evaluation import perplexity

HERE = Path(__file__).resolve().parent
CALIBRATION = Path(opt.__file__).parent / "data" / "calibration.txt"
HELD_OUT = 0.05
MARKS = ("<!-- figures, written by finetune_demo.py -->", "<!-- end of the figures -->")


def pruned_model(folder: Path, sparsity: float) -> tuple[opt.OPT, Any]:
    """The model in float32, its decoder's matrices pruned by magnitude."""
    # Each matrix is pruned on its own, those of q, k and v too.
    model, tokenizer = opt.from_pretrained(
        folder, dtype=jnp.float32, sparse=False, fuse_qkv=False
    )
    if tokenizer is None:
        raise ValueError(f"{folder}: expected a tokenizer, got none")
    for kernel in decoder_kernels(model).values():
        kernel.set_value(fj.prune.magnitude(kernel.get_value(), sparsity))
    return model, tokenizer


def training_ids(tokenizer: Any, paths: list[Path]) -> np.ndarray:
    """Token ids of all but the last 5% of the texts."""
    parts = []
    for path in paths:
        content = text.clean(path.read_text(encoding="utf-8"))
        ids = text.encode(tokenizer, content[: int(len(content) * (1 - HELD_OUT))])
        parts += [ids, np.array([BOS_ID], np.int32)]
    return np.concatenate(parts)


def run(
    folder: Path,
    texts: list[Path],
    *,
    sparsity: float,
    steps: int,
    batch: int,
    length: int,
    learning_rate: float,
    seed: int,
    say: Callable[[str], None],
) -> tuple[opt.OPT, Any, dict[str, Any]]:
    """Prunes, trains sparse and dense, and measures.

    Returns:
      The sparse model, its tokenizer and the record.
    """
    held_out_path = folder / "heldout.txt"
    dense, tokenizer = pruned_model(folder, sparsity)
    held_out = text.encode(tokenizer, held_out_path.read_text(encoding="utf-8"))
    before, _ = opt.from_pretrained(folder, dtype=jnp.float32, sparse=False)
    record: dict[str, Any] = {
        "model": folder.name,
        "perplexity_unpruned": perplexity(before, held_out).perplexity,
    }
    del before
    ids = training_ids(tokenizer, texts)
    masks = {n: k.get_value() != 0 for n, k in decoder_kernels(dense).items()}
    sparse, _ = pruned_model(folder, sparsity)
    sparse = fj.sparsify(
        sparse, lambda path, _: bool(DECODER.fullmatch(path)), dtype=jnp.float16
    )
    sparse = fj.trainable(sparse)
    layers = [layer for _, layer in fj.nn.sparse_layers(sparse)]
    record |= {
        "sparsity": 1
        - sum(int(m.sum()) for m in masks.values())
        / sum(m.size for m in masks.values()),
        "nonzeros": sum(layer.kernel.get_value().nnz for layer in layers),
        "trained_values": sum(layer.values.get_value().size for layer in layers),
        "training_tokens": len(ids),
        "texts": [path.name for path in texts],
        "steps": steps,
        "batch": batch,
        "length": length,
        "learning_rate": learning_rate,
        "seed": seed,
        "device": jax.devices()[0].device_kind,
        "versions": {
            name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")
        },
    }
    for name, model, after in (
        ("sparse", sparse, lambda model: None),
        ("dense, masked", dense, masked_step(masks)),
    ):
        curve: list[tuple[int, float]] = []

        def measure(done, model, name=name, curve=curve):
            curve.append((done, perplexity(model, held_out).perplexity))
            say(f"{name}: step {done}, held-out perplexity {curve[-1][1]:.2f}")

        batches = random_batches(ids, batch, length, seed)
        result = train(
            model,
            batches,
            measure,
            steps=steps,
            learning_rate=learning_rate,
            after=after,
        )
        record[name] = {"perplexity": curve, **result}
    return sparse, tokenizer, record


def plot(record: dict[str, Any], path: Path) -> None:
    """Draws held-out perplexity over the steps."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, style in (("dense, masked", "o-"), ("sparse", "x--")):
        steps, perplexities = zip(*record[name]["perplexity"], strict=True)
        axes.plot(steps, perplexities, style, label=f"{record['sparsity']:.0%}, {name}")
    axes.axhline(
        record["perplexity_unpruned"],
        color="0.5",
        linewidth=0.8,
        label="the model before it was pruned to this",
    )
    axes.set_yscale("log")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("held-out perplexity per token")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def table(record: dict[str, Any]) -> str:
    """The figures as Markdown."""
    sparse, dense = record["sparse"], record["dense, masked"]
    lines = [
        f"| `{record['model']}`, {record['sparsity']:.1%} zeros | sparse | dense, "
        "masked |",
        "| --- | ---: | ---: |",
        f"| held-out perplexity after pruning | {sparse['perplexity'][0][1]:.2f} "
        f"| {dense['perplexity'][0][1]:.2f} |",
        f"| after {record['steps']} steps | {sparse['perplexity'][-1][1]:.2f} "
        f"| {dense['perplexity'][-1][1]:.2f} |",
        f"| bytes of AdamW's state | {sparse['optimizer_bytes']:,} "
        f"| {dense['optimizer_bytes']:,} |",
        "",
        "Before this pruning the perplexity is "
        f"{record['perplexity_unpruned']:.2f}. The sparse layers have "
        f"{record['nonzeros']:,} nonzeros and train {record['trained_values']:,} "
        f"values ({record['trained_values'] / record['nonzeros'] - 1:.1%} padding); "
        "AdamW's state includes the embeddings, which are dense in both.",
        "",
        f"{record['batch']} sequences of {record['length']} tokens a step, peak "
        f"learning rate {record['learning_rate']:g}, seed {record['seed']}, "
        f"{record['training_tokens']:,} tokens of {', '.join(record['texts'])}, on "
        f"{record['device']} with "
        + ", ".join(f"{k} {v}" for k, v in record["versions"].items())
        + ".",
    ]
    return "\n".join(lines)


def update_page(page: Path, record: dict[str, Any]) -> None:
    """Puts the figures between the marks of a Markdown page."""
    write_between(page, MARKS, table(record))


def main(
    out: Annotated[Path, typer.Option(help="Model folder to write.")],
    model: Annotated[Path, typer.Option(help="Folder with heldout.txt.")] = (
        HERE / "demo-opt"
    ),
    texts: Annotated[
        list[Path] | None, typer.Option("--text", help="UTF-8 file; give several.")
    ] = None,
    docs: Annotated[
        Path | None, typer.Option(help="Folder whose fine-tuning.md is updated.")
    ] = None,
    sparsity: Annotated[float, typer.Option()] = 0.8,
    steps: Annotated[int, typer.Option(min=1)] = 300,
    batch: Annotated[int, typer.Option(min=1)] = 4,
    length: Annotated[int, typer.Option(min=2)] = 256,
    learning_rate: Annotated[float, typer.Option()] = 5e-4,
    seed: Annotated[int, typer.Option()] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace --out.")] = False,
) -> None:
    """Prunes a model in one shot and fine-tunes what is left, sparse."""
    try:
        with fj.checkpoint.atomic_folder(out, overwrite=overwrite) as temporary:
            tuned, tokenizer, record = run(
                model,
                texts or [CALIBRATION],
                sparsity=sparsity,
                steps=steps,
                batch=batch,
                length=length,
                learning_rate=learning_rate,
                seed=seed,
                say=typer.echo,
            )
            # The folder exists already, and is replaced by the one of the model.
            opt.save_pretrained(tuned, tokenizer, temporary, overwrite=True)
            content = json.dumps(record, indent=1) + "\n"
            (temporary / "finetune.json").write_text(content, encoding="utf-8")
            plot(record, temporary / "finetune.png")
        if docs is not None:
            plot(record, docs / "images" / "finetune.png")
            update_page(docs / "fine-tuning.md", record)
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(table(record))


if __name__ == "__main__":
    typer.run(main)
