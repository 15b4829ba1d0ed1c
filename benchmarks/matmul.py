"""Times `sparse_matmul` beside the dense `jnp.dot` on a GPU.

    python benchmarks/matmul.py [--rows 8,16,32] [--sparsity 0.6] [--dtype float16] ...

Both are timed in the same process through the public op inside jit. A program is a
sequence of products with different x that go round through copies of the weight (more
than 300 MB, so that they do not come from the L2 cache); many programs are queued
before the host waits, so the time is the device's. The median of several repetitions
is taken. Dense is the faster of the two memory orders of the weight.

Prints a table and writes `benchmarks/results/matmul-DEVICE.json`.
"""

import statistics
import time
from typing import Annotated

import jax
import jax.numpy as jnp
import report
import rich
import typer
from rich.table import Table

import flashjax as fj

# (out_features, in_features) of linear layers, by the model that has them.
SHAPES = {
    "opt-30b.attention": (7168, 7168),
    "opt-30b.qkv": (21504, 7168),
    "opt-30b.fc1": (28672, 7168),
    "opt-30b.fc2": (7168, 28672),
    "opt-66b.attention": (9216, 9216),
    "opt-66b.fc1": (36864, 9216),
    "opt-66b.fc2": (9216, 36864),
}
COLD_BYTES = 300 << 20
CALLS = 24  # products in a program
REPETITIONS = 7


def microseconds(product, xs: list, copies: list) -> float:
    """Median device time of `product(x, copy)`, over copies used in turn."""

    @jax.jit
    def program(xs, copies):
        # Every product has an x of its own: equal ones would be computed once.
        return [product(x, copies[i % len(copies)]) for i, x in enumerate(xs)]

    jax.block_until_ready(program(xs, copies))
    queued = 4
    times = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        results = [program(xs, copies) for _ in range(queued)]
        jax.block_until_ready(results)
        times.append((time.perf_counter() - start) / (queued * CALLS))
    return statistics.median(times) * 1e6


def cold_copies(weight, nbytes: int) -> list:
    count = COLD_BYTES // nbytes + 2
    return [jax.tree.map(jnp.copy, weight) for _ in range(count)]


def bandwidth() -> float:
    """Bytes a second that a large device copy reads and writes."""
    data = jnp.zeros((1 << 30,), jnp.uint8)
    copy = jax.jit(lambda a: a + jnp.uint8(1))
    jax.block_until_ready(copy(data))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready([copy(data) for _ in range(4)])
        times.append((time.perf_counter() - start) / 4)
    return 2 * data.nbytes / statistics.median(times)


def time_shape(name: str, sparsities, rows, dtype, peak: float) -> list[dict]:
    m, k = SHAPES[name]
    results = []
    key = jax.random.key(0)
    dense = jax.random.uniform(key, (k, m), jnp.float32, -1, 1).astype(dtype)
    xs = {
        n: list(jax.random.normal(jax.random.key(n), (CALLS, n, k), dtype))
        for n in rows
    }

    dense_us = {}
    orders = {"(K, M)": lambda x, w: x @ w, "(M, K)": lambda x, w: x @ w.T}
    for order, dot in orders.items():
        weight = dense if order == "(K, M)" else dense.T.copy()
        copies = cold_copies(weight, dense.nbytes)
        for n, x in xs.items():
            us = microseconds(dot, x, copies)
            dense_us[n] = min(us, dense_us.get(n, us))
        del copies, weight

    for sparsity in sparsities:
        keep = jax.random.uniform(jax.random.key(1), dense.shape) >= sparsity
        w = fj.SparseMatrix.from_dense(jnp.where(keep, dense, jnp.zeros((), dtype)))
        copies = cold_copies(w, w.nbytes)
        least = (2 * (1 - sparsity) + 0.125) * m * k / peak * 1e6
        for n, x in xs.items():
            us = microseconds(fj.sparse_matmul, x, copies)
            results.append(
                {
                    "layer": name,
                    "m": m,
                    "k": k,
                    "n": n,
                    "dtype": str(jnp.dtype(dtype)),
                    "sparsity": sparsity,
                    "bytes_per_element": round(w.nbytes / (m * k), 4),
                    "sparse_us": round(us, 2),
                    "dense_us": round(dense_us[n], 2),
                    "speedup": round(dense_us[n] / us, 3),
                    "gb_per_s": round(w.nbytes / us / 1e3, 1),
                    "share_of_byte_limit": round(least / us, 3),
                }
            )
        del copies
    return results


def print_table(results: list[dict]) -> None:
    table = Table(title="sparse_matmul beside jnp.dot")
    columns = ["layer", "M x K", "dtype", "N", "sparsity", "us", "GB/s"]
    for column in [*columns, "of byte limit", "dense us", "x dense"]:
        table.add_column(column, justify="right", no_wrap=True)
    for r in results:
        table.add_row(
            r["layer"],
            f"{r['m']}x{r['k']}",
            r["dtype"],
            str(r["n"]),
            f"{r['sparsity']:.0%}",
            f"{r['sparse_us']:.1f}",
            f"{r['gb_per_s']:.0f}",
            f"{r['share_of_byte_limit']:.0%}",
            f"{r['dense_us']:.1f}",
            f"{r['speedup']:.2f}",
        )
    rich.get_console().width = max(rich.get_console().width, 120)
    rich.print(table)


def main(
    layers: Annotated[str, typer.Option(help="Names, comma-separated.")] = ",".join(
        SHAPES
    ),
    sparsity: Annotated[str, typer.Option()] = "0.5,0.6,0.7,0.8,0.9",
    rows: Annotated[str, typer.Option(help="N: rows of x.")] = "1,8,16,32,64,128",
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16.")] = "float16",
    name: Annotated[str, typer.Option(help="Stem of the result file.")] = "matmul",
) -> None:
    """Times sparse_matmul beside jnp.dot."""
    reason = fj.cuda_unavailable_reason()
    if reason:
        raise SystemExit(f"benchmarks/matmul.py needs a GPU: {reason}")
    unknown = set(layers.split(",")) - set(SHAPES)
    if unknown:
        raise SystemExit(f"expected layers from {list(SHAPES)}, got {sorted(unknown)}")
    peak = bandwidth()
    results = []
    for layer in layers.split(","):
        results += time_shape(
            layer,
            [float(s) for s in sparsity.split(",")],
            [int(n) for n in rows.split(",")],
            jnp.dtype(dtype),
            peak,
        )
    print_table(results)
    path = report.save(name, {"copy_bytes_per_second": peak, "results": results})
    print(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
