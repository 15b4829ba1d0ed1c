"""Times generation with an OPT of synthetic weights, dense beside sparse.

    python benchmarks/generate.py [--model opt_125m] [--sparsity 0,0.8] [--batch 1,8]

Prefill is a call of `opt.generate` for one token. Decoding is a call for `--new`
tokens less that, per token after the first. Both are medians of several calls after
one that compiles, and wait for the tokens on the host. Sparsity 0 is the dense model;
all linear layers of the others are sparse. Speed depends on the shapes and on where
the zeros are (here anywhere), not on what the weights say.

Prints a table and writes `benchmarks/results/generate-DEVICE.json`.
"""

import dataclasses
import statistics
import time
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import report
import rich
import typer
from flax import nnx
from rich.progress import track
from rich.table import Table

import flashjax as fj
from flashjax.models import opt
from flashjax.models.opt.modeling import DecoderLayer

MODELS = ("125m", "350m", "1_3b", "2_7b", "6_7b", "13b", "30b", "66b", "175b")


@jax.jit
def _drop(kernel: jax.Array, key: jax.Array, sparsity: float) -> jax.Array:
    keep = jax.random.uniform(key, kernel.shape) >= sparsity
    return jnp.where(keep, kernel, jnp.zeros((), kernel.dtype))


def build(config: opt.OPTConfig, dtype, sparsity: float) -> opt.OPT:
    """A model of random weights; one layer at a time is dense."""
    rngs = nnx.Rngs(0)
    model = opt.OPT(dataclasses.replace(config, num_layers=1), dtype=dtype, rngs=rngs)
    model.config = config
    model.layers = nnx.List()
    for _ in track(range(config.num_layers), f"layers of sparsity {sparsity:.0%}"):
        layer = DecoderLayer(config, dtype=dtype, rngs=rngs)
        if sparsity:
            for _, linear in nnx.iter_graph(layer, graph=True):
                if isinstance(linear, nnx.Linear):
                    kernel = linear.kernel
                    kernel[...] = _drop(kernel[...], rngs.params(), sparsity)
            fj.sparsify(layer)
        model.layers.append(layer)
    return model


def median_seconds(call, repetitions: int) -> float:
    call()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def time_model(
    model: opt.OPT, batch: int, prompt: int, new: int, repetitions: int
) -> dict[str, float]:
    ids = np.random.default_rng(0).integers(4, model.config.vocab_size, (batch, prompt))

    def run(tokens: int) -> None:
        out = opt.generate(model, ids, max_new_tokens=tokens, eos_token_id=-1)
        out.block_until_ready()

    prefill = median_seconds(lambda: run(1), repetitions)
    step = (median_seconds(lambda: run(new), repetitions) - prefill) / (new - 1)
    return {
        "prefill_ms": round(prefill * 1e3, 2),
        "prefill_tokens_per_s": round(batch * prompt / prefill, 1),
        "step_ms": round(step * 1e3, 3),
        "decode_tokens_per_s": round(batch / step, 1),
    }


def print_table(title: str, results: list[dict]) -> None:
    table = Table(title=title)
    columns = ("sparsity", "batch", "weights MB", "prefill ms", "ms/step", "tokens/s")
    for column in (*columns, "x dense"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in results:
        table.add_row(
            f"{r['sparsity']:.0%}" if r["sparsity"] else "dense",
            str(r["batch"]),
            f"{r['weight_bytes'] / 1e6:.0f}",
            f"{r['prefill_ms']:.1f}",
            f"{r['step_ms']:.2f}",
            f"{r['decode_tokens_per_s']:.1f}",
            f"{r['speedup']:.2f}" if "speedup" in r else "",
        )
    rich.print(table)


def main(
    model: Annotated[str, typer.Option(help=f"opt_SIZE of {MODELS}.")] = "opt_125m",
    layers: Annotated[int, typer.Option(help="Fewer layers; 0: all.", min=0)] = 0,
    sparsity: Annotated[str, typer.Option(help="0 is dense.")] = "0,0.6,0.8",
    batch: Annotated[str, typer.Option(help="Prompts at once.")] = "1,8",
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.", min=1)] = 64,
    new: Annotated[int, typer.Option(help="Tokens to generate.", min=2)] = 64,
    dtype: Annotated[str, typer.Option(help="Sparse models need a half.")] = "float16",
    dense_dtype: Annotated[
        str, typer.Option(help="Of the dense model; empty: as --dtype.")
    ] = "",
    repetitions: Annotated[int, typer.Option(min=1)] = 5,
    name: Annotated[str, typer.Option(help="Stem of the result file.")] = "generate",
) -> None:
    """Times generation with an OPT of synthetic weights."""
    if model.removeprefix("opt_") not in MODELS:
        raise SystemExit(f"expected --model opt_SIZE of {MODELS}, got {model!r}")
    config = getattr(opt.OPTConfig, f"opt_{model.removeprefix('opt_')}")()
    config = dataclasses.replace(config, num_layers=layers or config.num_layers)
    results = []
    for s in (float(part) for part in sparsity.split(",")):
        used = jnp.dtype(dtype if s else dense_dtype or dtype)
        built = build(config, used, s)
        weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(built)))
        for rows in (int(part) for part in batch.split(",")):
            result = {
                "model": model,
                "layers": config.num_layers,
                "sparsity": s,
                "dtype": used.name,
                "batch": rows,
                "prompt": prompt,
                "new": new,
                "weight_bytes": weight_bytes,
                **time_model(built, rows, prompt, new, repetitions),
            }
            dense = [r for r in results if r["batch"] == rows and not r["sparsity"]]
            if dense:
                result["speedup"] = round(dense[0]["step_ms"] / result["step_ms"], 3)
            results.append(result)
        del built
    title = f"{model}, {config.num_layers} layers, {jnp.dtype(dtype).name}"
    print_table(f"{title}: prompts of {prompt}, {new} new tokens", results)
    print(f"written to {report.save(name, {'results': results})}")


if __name__ == "__main__":
    typer.run(main)
