"""Generates text with the pruned demo OPT of this folder; `make demo` runs it.

Prints the texts as they come, then the device, speed, bytes, sparsity and held-out
perplexities. The perplexities of the dense and the pruned model were measured after
training; that of the pruned one is measured again here, on the held-out excerpt that
lies beside the model.
"""

import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from flax import nnx

import flashjax as fj
from flashjax.checkpoint import CheckpointError, read_json
from flashjax.cli import report
from flashjax.models import opt

FOLDER = Path(__file__).resolve().parent / "demo-opt"
PROMPTS = ("It is a truth universally acknowledged, that", "ROMEO.\nO,")
SAMPLING = {"temperature": 0.8, "top_k": 40, "seed": 1}

_EXCERPT = "heldout.txt"
_BATCH = 4


def main(
    folder: Annotated[Path, typer.Argument(help="Model folder.")] = FOLDER,
    new_tokens: Annotated[int, typer.Option(help="Tokens of a text.")] = 80,
) -> None:
    """Generates text with the pruned demo OPT and prints figures about it."""
    try:
        run(folder, new_tokens)
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


def run(folder: Path, new_tokens: int) -> None:
    """Loads, generates, measures and prints."""
    record = read_record(folder)
    began = time.perf_counter()
    model, tokenizer = opt.from_pretrained(folder, dtype=jnp.float16)
    load_seconds = time.perf_counter() - began
    if tokenizer is None:
        raise CheckpointError(f"{folder}: expected a tokenizer.json, got none")
    typer.echo(
        f"FlashJAX {fj.__version__}, a pruned OPT loaded in {load_seconds:.1f} s"
    )

    tokens, seconds = 0, 0.0
    for prompt in PROMPTS:
        count, took = continue_prompt(model, tokenizer, prompt, new_tokens)
        tokens, seconds = tokens + count, seconds + took

    perplexity, excerpt_tokens = excerpt_perplexity(model, tokenizer, folder)
    excerpt = record["held_out"]["excerpt"]
    lines = [
        ("device", report.device_line(model)),
        (
            "speed",
            f"{tokens / seconds:.1f} tokens/s ({tokens} tokens in {seconds:.2f} s, one "
            "text at a time, prefill included, compilation not)",
        ),
        *report.weight_lines(report.measure(model)),
        (
            "perplexity",
            "on held-out text: "
            + compare(record["dense_perplexity"], record["pruned_perplexity"]),
        ),
        (
            "",
            f"on {_EXCERPT}: "
            + compare(excerpt["dense_perplexity"], excerpt["pruned_perplexity"])
            + f", measured again now: {perplexity:.2f} ({excerpt_tokens:,} tokens)",
        ),
    ]
    typer.echo()
    for title, text in lines:
        typer.echo(f"{title:<14} {text}")


def continue_prompt(
    model: opt.OPT, tokenizer: Any, prompt: str, new_tokens: int
) -> tuple[int, float]:
    """Prints a continuation; returns the number of tokens and the seconds."""
    prompt_ids = tokenizer.encode(prompt).ids
    token_ids = np.asarray([prompt_ids], np.int32)
    options = {"max_new_tokens": new_tokens, **SAMPLING}
    # The first two steps compile all that is timed below.
    for _ in zip(
        range(2), opt.generate_stream(model, token_ids, **options), strict=False
    ):
        pass
    typer.echo()
    typer.secho(prompt, bold=True, nl=False)
    began = time.perf_counter()
    count = 0

    def new_ids():
        nonlocal count
        for column in opt.generate_stream(model, token_ids, **options):
            count += 1
            yield int(column[0])

    for piece in opt.stream_text(new_ids(), tokenizer, prompt_ids):
        typer.echo(piece, nl=False)
    seconds = time.perf_counter() - began
    typer.echo()
    return count, seconds


def compare(dense: float, pruned: float) -> str:
    """Two perplexities and their distance."""
    return f"dense {dense:.2f}, pruned {pruned:.2f} ({pruned / dense - 1:+.1%})"


def read_record(folder: Path) -> dict[str, Any]:
    """Reads the figures of the training run.

    Raises:
      CheckpointError: there are none, or some are missing.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: expected the folder of the demo model, got nothing; "
            "examples/train_demo.py makes one"
        )
    path = folder / "training.json"
    record = read_json(path)
    try:
        excerpt = record["held_out"]["excerpt"]
        for part in (record, excerpt):
            for key in ("dense_perplexity", "pruned_perplexity"):
                float(part[key])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: expected the figures of a training run, got "
            f"{json.dumps(record)[:60]}"
        ) from error
    return record


def excerpt_perplexity(
    model: opt.OPT, tokenizer: Any, folder: Path
) -> tuple[float, int]:
    """Perplexity on the held-out excerpt, as it was measured after training.

    The text is cut into pieces as long as the model has positions, each after the BOS
    token; every token is predicted from those of its piece before it.

    Returns:
      The perplexity per token and the number of tokens.
    """
    text = (folder / _EXCERPT).read_text(encoding="utf-8")
    ids = np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
    length = model.config.max_positions
    pieces = -(-len(ids) // (length * _BATCH)) * _BATCH
    targets = np.zeros((pieces, length), np.int32)
    targets.reshape(-1)[: len(ids)] = ids
    counted = (np.arange(targets.size) < len(ids)).reshape(targets.shape)
    inputs = np.roll(targets, 1, axis=1)
    inputs[:, 0] = model.config.bos_token_id

    @nnx.jit
    def loss(model, inputs, targets, counted):
        log_probs = jax.nn.log_softmax(model(inputs))
        chosen = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(counted, chosen, 0))

    total = 0.0
    for start in range(0, pieces, _BATCH):
        rows = slice(start, start + _BATCH)
        total += float(loss(model, inputs[rows], targets[rows], counted[rows]))
    return math.exp(total / len(ids)), len(ids)


if __name__ == "__main__":
    typer.run(main)
