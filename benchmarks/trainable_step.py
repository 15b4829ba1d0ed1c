"""Times a training step of one sparse layer beside a dense and a masked dense one.

    python benchmarks/trainable_step.py [--size 2048] [--rows 512] [--sparsity 0.8] ...

A step is the product and its gradients with respect to x and the weights, which are
float32; x is too, or half precision, to which the weights are then cast.
The three take turns in one process. The table has medians of the wall time and of the
processor time of all threads, on which other programs have less influence, and the
bytes of the weights' Adam state. Runs on JAX's default device; float32 products are in
full precision in all three.

Prints a table and writes `benchmarks/results/trainable_step-DEVICE.json`.
"""

import functools
import os
import statistics
import time
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
import rich
import typer
from rich.table import Table

import flashjax as fj


def steps(size: int, rows: int, sparsity: float) -> dict:
    """Functions of (weights, x, dy) by name, with the weights."""
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((size, size), np.float32)
    pruned = fj.prune.magnitude(dense, sparsity)
    t = fj.TrainableMatrix.from_sparse(
        fj.SparseMatrix.from_dense(pruned.astype(np.float16))
    )
    mask = jnp.asarray(pruned != 0)
    dot = functools.partial(jnp.dot, precision="highest")

    def step(product):
        def one(weights, x, dy):
            y, pull_back = jax.vjp(product, weights, x)
            return y, pull_back(dy)

        return jax.jit(one)

    return {
        "sparse": (
            step(lambda values, x: fj.sparse_matmul(x, t.replace(values))),
            t.values,
        ),
        "dense": (step(lambda w, x: dot(x, w.astype(x.dtype))), jnp.asarray(dense)),
        "dense, masked": (
            step(lambda w, x: dot(x, jnp.where(mask, w, 0).astype(x.dtype))),
            jnp.asarray(pruned),
        ),
    }


def adam_bytes(weights: jax.Array) -> int:
    state = jax.eval_shape(optax.adam(1e-3).init, weights)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def main(
    size: Annotated[int, typer.Option(help="in and out")] = 2048,
    rows: Annotated[int, typer.Option()] = 512,
    sparsity: Annotated[float, typer.Option()] = 0.8,
    dtype: Annotated[str, typer.Option(help="Of x")] = "float32",
    turns: Annotated[int, typer.Option(min=1)] = 20,
    name: Annotated[str, typer.Option(help="Stem of the result")] = "trainable_step",
    save: Annotated[bool, typer.Option(help="Write the result file")] = True,
) -> None:
    """Times a training step of one sparse layer beside dense ones."""
    load = [os.getloadavg()[0]]
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((rows, size), np.float32), dtype)
    dy = jnp.asarray(rng.standard_normal((rows, size), np.float32), dtype)
    functions = steps(size, rows, sparsity)
    wall: dict[str, list[float]] = {name: [] for name in functions}
    busy: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(turns + 1):
        for way, (function, weights) in functions.items():
            begin, begin_busy = time.perf_counter(), time.process_time()
            jax.block_until_ready(function(weights, x, dy))
            if turn:  # the first one compiles
                wall[way].append(time.perf_counter() - begin)
                busy[way].append(time.process_time() - begin_busy)
    results = [
        {
            "weights": way,
            "in": size,
            "out": size,
            "rows": rows,
            "dtype": dtype,
            "sparsity": sparsity if way != "dense" else 0.0,
            "ms": round(statistics.median(wall[way]) * 1e3, 2),
            "processor_ms": round(statistics.median(busy[way]) * 1e3, 2),
            "trained_values": weights.size,
            "adam_bytes": adam_bytes(weights),
        }
        for way, (_, weights) in functions.items()
    ]
    table = Table(title=f"{size}x{size}, {rows} rows, {sparsity:.0%} zeros")
    for key in ("weights", "ms", "processor_ms", "trained_values", "adam_bytes"):
        table.add_column(key, justify="left" if key == "weights" else "right")
    for r in results:
        table.add_row(
            r["weights"],
            f"{r['ms']:.1f}",
            f"{r['processor_ms']:.1f}",
            f"{r['trained_values']:,}",
            f"{r['adam_bytes']:,}",
        )
    rich.print(table)
    if save:
        # More than the cores at the end: other programs ran beside the benchmark.
        load.append(os.getloadavg()[0])
        facts = {"cores": os.cpu_count(), "load_average_before_and_after": load}
        print(report.save(name, {**facts, "results": results}))


if __name__ == "__main__":
    typer.run(main)
