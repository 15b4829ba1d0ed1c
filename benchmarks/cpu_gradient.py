"""Times the gradient with respect to x on the CPU: dx = dy @ w.T.

    python benchmarks/cpu_gradient.py [--size 2048,4096] [--rows 1,8,64] ...

Four ways take turns in one process: the kernel for the transposed weights ("kernel",
what `jax.grad` of `sparse_matmul` runs), the forward kernel on a second packing, that
of the transpose ("second_packing"), expanding the weights to a float32 matrix
("expand"), and XLA's product with a dense float32 matrix ("dense").

Writes `benchmarks/results/cpu_gradient-DEVICE.json`.
"""

import os
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import report
import typer
from cpu_matmul import copies_of, medians

import flashjax as fj
from flashjax import _native, packing


def time_size(size: int, sparsity: float, rows: list[int], seconds: float) -> list:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((size, size), np.float32)
    dense = np.where(rng.random(values.shape, np.float32) < sparsity, 0, values)
    w = fj.SparseMatrix.from_dense(dense.astype(np.float16))

    def gradient(dy, w):
        x = jnp.zeros_like(dy)  # the product is linear: x does not matter
        return jax.vjp(lambda x: fj.sparse_matmul(x, w), x)[1](dy)[0]

    def expand(dy, w):
        kind = np.dtype(np.float32)
        return jnp.dot(dy, packing.unpack_cpu(w.packed, w.shape, w.dtype, kind).T)

    products = {
        "kernel": jax.jit(gradient),
        "second_packing": jax.jit(gradient),
        "expand": jax.jit(expand),
        "dense": jax.jit(lambda dy, dense: jnp.dot(dy, dense.T)),
    }
    packed = copies_of(w, w.nbytes)
    weights = {
        "kernel": packed,
        "second_packing": copies_of(w.with_transpose(), w.nbytes),
        "expand": packed,
        "dense": copies_of(jnp.asarray(dense), dense.nbytes),
    }
    results = []
    for n in rows:
        dy = jnp.asarray(rng.standard_normal((n, size), np.float32))
        result = {"size": size, "sparsity": sparsity, "rows": n}
        for name, (wall, busy) in medians(products, dy, weights, seconds).items():
            result[f"{name}_us"] = round(wall, 1)
            result[f"{name}_processor_us"] = round(busy, 1)
        results.append(result)
        print(result, flush=True)
    return results


def main(
    size: Annotated[str, typer.Option(help="Sizes of square weights")] = "2048,4096",
    rows: Annotated[str, typer.Option(help="Rows of dy, by commas")] = "1,8,64",
    sparsity: float = 0.8,
    seconds: Annotated[float, typer.Option(help="Time for each line")] = 1.0,
    save: Annotated[bool, typer.Option(help="Write the result file")] = True,
) -> None:
    """Times ways to the gradient with respect to x beside each other."""
    load = [os.getloadavg()[0]]
    results = []
    for s in map(int, size.split(",")):
        results += time_size(s, sparsity, [int(n) for n in rows.split(",")], seconds)
    load.append(os.getloadavg()[0])
    facts = {
        "simd": _native.cpu.simd(),
        "cores": os.cpu_count(),
        "load_average_before_and_after": load,
    }
    if save:
        print(report.save("cpu_gradient", {**facts, "results": results}))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    typer.run(main)
