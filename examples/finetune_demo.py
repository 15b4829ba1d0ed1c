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
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from demo_training import text
from demo_training.model import windows
from demo_training.text import BOS_ID
from flax import nnx

import flashjax as fj
from flashjax.models import opt
from flashjax.models.opt.evaluation import perplexity

HERE = Path(__file__).resolve().parent
CALIBRATION = Path(opt.__file__).parent / "data" / "calibration.txt"
HELD_OUT = 0.05
MARKS = ("<!-- figures, written by finetune_demo.py -->", "<!-- end of the figures -->")
_DECODER = re.compile(r"layers\.\d+\.(self_attn\.\w+_proj|fc1|fc2)")


def pruned_model(folder: Path, sparsity: float) -> tuple[opt.OPT, Any]:
    """The model in float32, its decoder's matrices pruned by magnitude."""
    model, tokenizer = opt.from_pretrained(folder, dtype=jnp.float32, sparse=False)
    if tokenizer is None:
        raise ValueError(f"{folder}: expected a tokenizer, got none")
    for kernel in decoder_kernels(model).values():
        kernel.set_value(fj.prune.magnitude(kernel.get_value(), sparsity))
    return model, tokenizer


def decoder_kernels(model: opt.OPT) -> dict[str, nnx.Param]:
    """The matrices that are pruned, by the layer's path."""
    return {
        ".".join(map(str, path)): node.kernel
        for path, node in nnx.iter_graph(model, graph=True)
        if isinstance(node, nnx.Linear) and _DECODER.fullmatch(".".join(map(str, path)))
    }


def masked_step(masks: dict[str, jax.Array]) -> Callable[[opt.OPT], None]:
    """Sets the pruned weights of a dense model to 0."""

    def apply(model: opt.OPT) -> None:
        for name, kernel in decoder_kernels(model).items():
            kernel.set_value(jnp.where(masks[name], kernel.get_value(), 0))

    return apply


def loss_fn(model: opt.OPT, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean of -log p(target), in nats."""
    logits = model(inputs)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def make_optimizer(model: opt.OPT, learning_rate: float, steps: int) -> nnx.Optimizer:
    """AdamW with warm-up and a cosine."""
    warmup = max(1, min(50, steps // 10))
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, steps)
    chain = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=0.01),
    )
    return nnx.Optimizer(model, chain, wrt=nnx.Param)


def state_bytes(optimizer: nnx.Optimizer) -> int:
    """Bytes of the optimizer's state."""
    leaves = jax.tree.leaves(nnx.state(optimizer.opt_state))
    return sum(leaf.nbytes for leaf in leaves)


def train(
    model: opt.OPT,
    batches: Iterator[tuple[jax.Array, jax.Array]],
    measure: Callable[[int, opt.OPT], None],
    *,
    steps: int,
    learning_rate: float,
    after: Callable[[opt.OPT], None] = lambda model: None,
) -> dict[str, Any]:
    """Trains a model in place.

    Args:
      model: float32.
      batches: inputs and targets of each step.
      measure: called with the steps done and the model now and then.
      steps: of the optimizer.
      learning_rate: its peak.
      after: changes the model after each step.

    Returns:
      Losses, seconds a step, bytes of the optimizer's state.
    """
    optimizer = make_optimizer(model, learning_rate, steps)

    @nnx.jit
    def step(model, optimizer, inputs, targets):
        loss, gradients = nnx.value_and_grad(loss_fn)(model, inputs, targets)
        optimizer.update(model, gradients)
        after(model)
        return loss

    losses, seconds = [], []
    measure(0, model)
    for done in range(1, steps + 1):
        inputs, targets = next(batches)
        begin = time.perf_counter()
        losses.append(float(step(model, optimizer, inputs, targets)))
        seconds.append(time.perf_counter() - begin)
        if done % max(1, steps // 5) == 0 or done == steps:
            measure(done, model)
    return {
        "train_loss": [round(loss, 4) for loss in losses],
        "seconds_a_step": round(float(np.median(seconds)), 3),
        "optimizer_bytes": state_bytes(optimizer),
    }


def training_ids(tokenizer: Any, paths: list[Path]) -> np.ndarray:
    """Token ids of all but the last 5% of the texts."""
    parts = []
    for path in paths:
        content = text.clean(path.read_text(encoding="utf-8"))
        ids = text.encode(tokenizer, content[: int(len(content) * (1 - HELD_OUT))])
        parts += [ids, np.array([BOS_ID], np.int32)]
    return np.concatenate(parts)


def random_batches(ids: np.ndarray, batch: int, length: int, seed: int):
    """Inputs and targets (batch, length) without end."""
    if len(ids) <= length:
        raise ValueError(
            f"expected texts of more than {length} tokens to train on, got {len(ids)}"
        )
    rng, on_device = np.random.default_rng(seed), jnp.asarray(ids)
    while True:
        starts = rng.integers(0, len(ids) - length, batch, dtype=np.int32)
        yield windows(on_device, jnp.asarray(starts), length)


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
        sparse, lambda path, _: bool(_DECODER.fullmatch(path)), dtype=jnp.float16
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
    content = page.read_text(encoding="utf-8")
    head, start, rest = content.partition(MARKS[0])
    _, end, tail = rest.partition(MARKS[1])
    if not start or not end:
        raise ValueError(f"{page}: expected the marks {MARKS[0]!r} and {MARKS[1]!r}")
    content = f"{head}{MARKS[0]}\n{table(record)}\n{MARKS[1]}{tail}"
    page.write_text(content, encoding="utf-8")


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
