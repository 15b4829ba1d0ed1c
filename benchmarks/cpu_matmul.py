"""Times the CPU kernel beside XLA's dense float32 `jnp.dot`.

    python benchmarks/cpu_matmul.py [--rows 1,8] [--sparsity 0.8] [--dtype float16] ...

Kernel, expansion (to a float32 matrix, then a dense product: what `sparse_matmul` does
for many rows) and dense product take turns of 16 calls in one process, each going
round through copies of its weights that together exceed the caches. The table has
medians of the wall time, and of the processor time of all threads, on which other
programs have less influence.

Prints a table and writes `benchmarks/results/cpu_matmul-DEVICE.json`.
"""

import os
import statistics
import time
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import report
import rich
import typer
from rich.table import Table

import flashjax as fj
from flashjax import _native, packing

# (in_features, out_features)
SHAPES = {
    "opt-350m.fc1": (1024, 4096),
    "opt-350m.fc2": (4096, 1024),
    "opt-6.7b.attention": (4096, 4096),
    "opt-30b.attention": (7168, 7168),
}
COLD_BYTES = 128 << 20
# A single call would be timed in the wake of another product's page faults.
CALLS_A_TURN = 16


def copies_of(tree, nbytes: int) -> list:
    count = max(2, -(-COLD_BYTES // nbytes))
    return [jax.tree.map(jnp.copy, tree) for _ in range(count)]


def medians(products: dict, x, weights: dict, seconds: float) -> dict[str, tuple]:
    """Median microseconds (wall, processor) of each `product(x, weight)`, in turns."""
    wall = {name: [] for name in products}
    busy = {name: [] for name in products}
    for name, product in products.items():
        jax.block_until_ready(product(x, weights[name][0]))
    start, turns = time.perf_counter(), 0
    while turns < 3 or (time.perf_counter() - start < seconds and turns < 200):
        for name, product in products.items():
            for i in range(CALLS_A_TURN):
                weight = weights[name][i % len(weights[name])]
                begin, begin_busy = time.perf_counter(), time.process_time()
                jax.block_until_ready(product(x, weight))
                wall[name].append(time.perf_counter() - begin)
                busy[name].append(time.process_time() - begin_busy)
        turns += 1
    return {
        name: (statistics.median(wall[name]) * 1e6, statistics.median(busy[name]) * 1e6)
        for name in products
    }


def time_shape(
    name: str, sparsities, rows, dtype, seconds: float, results: list[dict]
) -> None:
    k, m = SHAPES[name]
    rng = np.random.default_rng(0)
    values = rng.standard_normal((k, m), np.float32)
    places = rng.random((k, m), np.float32)
    dense_weights = copies_of(jnp.asarray(values), 4 * k * m)
    for sparsity in sparsities:
        pruned = np.where(places < sparsity, 0, values).astype(dtype)
        w = fj.SparseMatrix.from_dense(pruned)
        packed = copies_of(w.packed, w.nbytes)

        @jax.jit
        def kernel(x, packed):
            result = jax.ShapeDtypeStruct((x.shape[0], m), np.float32)
            call = jax.ffi.ffi_call("flashjax_lscd_matmul_cpu", result)
            none = jnp.zeros(0, jnp.float32)
            kind = packing.WEIGHT_DTYPES[np.dtype(dtype)]
            return call(x, *packed, none, weight_dtype=kind)

        @jax.jit
        def expand(x, packed):
            dense = packing.unpack_cpu(packed, (k, m), np.dtype(dtype), jnp.float32)
            return jnp.dot(x, dense)

        products = {"kernel": kernel, "expand": expand, "dense": jax.jit(jnp.dot)}
        weights = {"kernel": packed, "expand": packed, "dense": dense_weights}
        for n in rows:
            x = jnp.asarray(rng.standard_normal((n, k), np.float32))
            us = medians(products, x, weights, seconds)
            (wall, busy), (dense_wall, dense_busy) = us["kernel"], us["dense"]
            results.append(
                {
                    "shape": name,
                    "in": k,
                    "out": m,
                    "dtype": np.dtype(dtype).name,
                    "sparsity": sparsity,
                    "rows": n,
                    "us": round(wall, 1),
                    "gb_per_s": round(w.nbytes / wall / 1e3, 2),
                    "x_dense": round(dense_wall / wall, 2),
                    "x_dense_processor": round(dense_busy / busy, 2),
                    "expand_us": round(us["expand"][0], 1),
                    "dense_us": round(dense_wall, 1),
                    "bytes_per_element": round(w.nbytes / (k * m), 3),
                }
            )


def print_table(results: list[dict]) -> None:
    dtype = results[0]["dtype"]
    table = Table(title=f"Medians of one product, weights {dtype}, x float32")
    table.add_column("shape")
    for header in (
        "sparsity",
        "rows",
        "us",
        "GB/s",
        "x dense",
        "x dense, processor",
        "us expanded",
        "us dense",
    ):
        table.add_column(header, justify="right")
    for r in results:
        table.add_row(
            f"{r['in']}x{r['out']}",
            f"{r['sparsity']:.0%}",
            str(r["rows"]),
            f"{r['us']:.0f}",
            f"{r['gb_per_s']:.1f}",
            f"{r['x_dense']:.2f}",
            f"{r['x_dense_processor']:.2f}",
            f"{r['expand_us']:.0f}",
            f"{r['dense_us']:.0f}",
        )
    rich.print(table)


def main(
    shape: Annotated[str, typer.Option(help="Names of SHAPES, by commas")] = ",".join(
        SHAPES
    ),
    rows: Annotated[str, typer.Option(help="Rows of x, by commas")] = "1,4,8,32",
    sparsity: Annotated[str, typer.Option(help="By commas")] = "0.5,0.6,0.8",
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16")] = "float16",
    seconds: Annotated[float, typer.Option(help="Time for each line")] = 1.0,
    save: Annotated[bool, typer.Option(help="Write the result file")] = True,
) -> None:
    """Times the CPU kernel beside XLA's dense float32 product."""
    results: list[dict] = []
    load = [os.getloadavg()[0]]
    for name in shape.split(","):
        time_shape(
            name,
            [float(s) for s in sparsity.split(",")],
            [int(n) for n in rows.split(",")],
            jnp.dtype(dtype),
            seconds,
            results,
        )
    print_table(results)
    if save:
        # More than the cores at the end: other programs ran beside the benchmark.
        load.append(os.getloadavg()[0])
        facts = {
            "simd": _native.cpu.simd(),
            "cores": os.cpu_count(),
            "load_average_before_and_after": load,
        }
        print(report.save("cpu_matmul", {**facts, "results": results}))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    typer.run(main)
