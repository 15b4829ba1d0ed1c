"""Times a training step of one sparse layer beside a dense and a masked dense one.

    python benchmarks/trainable_step.py [--size 2048] [--rows 512] [--sparsity 0.8] ...

A step is the product in float32 and its gradients with respect to x and the weights.
The three take turns in one process. The table has medians of the wall time and of the
processor time of all threads, on which other programs have less influence, and the
bytes of the weights' Adam state.

Prints a table and writes `benchmarks/results/trainable_step-DEVICE.json`.
"""

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
        "dense": (step(lambda w, x: jnp.dot(x, w)), jnp.asarray(dense)),
        "dense, masked": (
            step(lambda w, x: jnp.dot(x, jnp.where(mask, w, 0))),
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
    turns: Annotated[int, typer.Option(min=1)] = 20,
    save: Annotated[bool, typer.Option(help="Write the result file")] = True,
) -> None:
    """Times a training step of one sparse layer beside dense ones."""
    load = [os.getloadavg()[0]]
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((rows, size), np.float32))
    dy = jnp.asarray(rng.standard_normal((rows, size), np.float32))
    functions = steps(size, rows, sparsity)
    wall: dict[str, list[float]] = {name: [] for name in functions}
    busy: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(turns + 1):
        for name, (function, weights) in functions.items():
            begin, begin_busy = time.perf_counter(), time.process_time()
            jax.block_until_ready(function(weights, x, dy))
            if turn:  # the first one compiles
                wall[name].append(time.perf_counter() - begin)
                busy[name].append(time.process_time() - begin_busy)
    results = [
        {
            "weights": name,
            "in": size,
            "out": size,
            "rows": rows,
            "sparsity": sparsity if name != "dense" else 0.0,
            "ms": round(statistics.median(wall[name]) * 1e3, 2),
            "processor_ms": round(statistics.median(busy[name]) * 1e3, 2),
            "trained_values": weights.size,
            "adam_bytes": adam_bytes(weights),
        }
        for name, (_, weights) in functions.items()
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
        print(report.save("trainable_step", {**facts, "results": results}))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    typer.run(main)
