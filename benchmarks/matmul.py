"""Times `sparse_matmul` beside the dense `jnp.dot` on a GPU.

    python benchmarks/matmul.py [--rows 8,16,32] [--sparsity 0.6] [--dtype float16] ...
    python benchmarks/matmul.py --rows 1,2,8 --tokens 8 --name matmul-tokens-8

Both are timed in the same process through the public op inside jit. A program is a
sequence of products, each with an x and a copy of the weight of its own (the copies
are more than 300 MB, so that they do not come from the L2 cache). The time is the
device's, from the profiler: a program's span divided by its products, the median of
several executions. Dense is the faster of the two memory orders of the weight.
`of_byte_limit` is what the weight, x and y take at the rate at which this GPU reads a
large array, by the time measured. Both have run for some time (--settle) before they
are timed, and are timed several times in turn (--rounds): with many rows a GPU is at
its limit of power and slows down, by 5% more or less within seconds. It is cool again
when dense is timed for the first time, having been compiled.

Prints a table and writes `benchmarks/results/matmul-DEVICE.json` and, where matplotlib
is installed, a plot of it beside it (PNG).
"""

import dataclasses
import itertools
import pathlib
import statistics
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import device_time
import jax
import jax.numpy as jnp
import report
import rich
import typer
from rich.table import Table

import flashjax as fj
from flashjax import matmul_impl
from flashjax.cli.bench_generate import read_bandwidth
from flashjax.models import opt

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
# Of other models; measured where --layers names them.
OTHERS = {
    "opt-175b.qkv": (36_864, 12_288),
    "opt-175b.attention": (12_288, 12_288),
    "opt-175b.fc1": (49_152, 12_288),
    "opt-175b.fc2": (12_288, 49_152),
    "llama-3-70b.q": (8192, 8192),
    "llama-3-70b.k": (1024, 8192),
    "llama-3-70b.up": (28_672, 8192),
    "llama-3-70b.down": (8192, 28_672),
    "llama-3-8b.q": (4096, 4096),
    "opt-1.3b.attention": (2048, 2048),
    "opt-1.3b.fc1": (8192, 2048),
}
PATTERNS = ("random", "rows", "columns", "demo")
COLD_BYTES = 300 << 20
LEAST_CALLS = 12  # products in a program, each with its own copy of the weight


def compile_products(product, n: int, k: int, dtype, copies: list):
    """Compiles `product(x, copy)` with an x (n, k) for every copy."""
    x = jax.ShapeDtypeStruct((n, k), dtype)

    @jax.jit
    def program(xs, copies):
        # Every product has an x and a copy of its own: XLA computes equal products once
        # and merges those that share a weight.
        return [product(x, copy) for x, copy in zip(xs, copies, strict=True)]

    return program.lower([x] * len(copies), copies).compile()


def time_products(program, xs: list, copies: list, settle: float) -> float:
    """Median device time of one product of what compile_products() gives.

    Args:
      program: of as many products as there are copies.
      xs: as many or more.
      copies: of the weight.
      settle: seconds that the program runs before it is timed.
    """
    count = len(copies)
    return device_time.microseconds(program, xs[:count], copies, settle=settle) / count


def cold_copies(weight, nbytes: int) -> list:
    count = max(LEAST_CALLS, COLD_BYTES // nbytes + 2)
    return [jax.tree.map(jnp.copy, weight) for _ in range(count)]


def sparse_product(kernel: str):
    """sparse_matmul, one of its CUDA kernels by name, or expanding the weight."""
    if kernel == "auto":
        return fj.sparse_matmul

    expands = kernel == "expand"

    def product(x, w):
        dtype = jnp.dtype(x.dtype)
        call = matmul_impl.Call(w.shape, w.dtype, dtype, None, dtype, "cuda")
        if expands:
            call = dataclasses.replace(call, kernel_rows=0)
        operands = matmul_impl.Operands(x, None, w.packed, None)
        return matmul_impl._cuda(call, operands, kernel="auto" if expands else kernel)

    return product


def shape_of(name: str) -> tuple[int, int]:
    """(out_features, in_features) of a layer."""
    return (SHAPES | OTHERS)[name]


def dense_weight(shape: tuple[int, int], dtype) -> jax.Array:
    m, k = shape
    key = jax.random.key(0)
    return jax.random.uniform(key, (k, m), jnp.float32, -1, 1).astype(dtype)


def prune(dense: jax.Array, sparsity: float, pattern: str = "random") -> jax.Array:
    """A (K, M) weight with a share of zeros."""
    kept = kept_elements(dense.shape, sparsity, pattern)
    return jnp.where(kept, dense, jnp.zeros((), dense.dtype))


def kept_elements(shape: tuple[int, int], sparsity: float, pattern: str) -> jax.Array:
    """Which elements of a (K, M) weight are not zero, of a share of zeros in all."""
    k, m = shape
    key = jax.random.key(1)
    if pattern == "demo":
        return demo_pattern(shape, sparsity)
    if pattern == "random":
        return jax.random.uniform(key, (k, m)) >= sparsity
    # A twentieth of the outputs (rows of the weight as papers write it) or inputs is
    # dense, the others have as many zeros more.
    axis = {"rows": 1, "columns": 0}[pattern]
    length = (k, m)[axis]
    is_dense = jnp.arange(length) * 20 // length == jnp.arange(length) % 20
    share = 1 - is_dense.mean()
    keep = jax.random.uniform(key, (k, m)) >= min(1.0, sparsity / float(share))
    return keep | jnp.expand_dims(is_dense, 1 - axis)


def demo_pattern(shape: tuple[int, int], sparsity: float) -> jax.Array:
    """Magnitude pruning of the demo model's first fc1, repeated to a (K, M) weight.

    It was trained dense, then pruned to 65% and fine-tuned: with fewer zeros than that
    some of the pruned weights are kept, at random.
    """
    k, m = shape
    path = pathlib.Path(__file__).parents[1] / "examples" / "demo-opt"
    model, _ = opt.from_pretrained(path, dtype=jnp.float16, sparse=False)
    weight = jnp.asarray(model.layers[0].fc1.kernel[...])
    size = jnp.abs(weight.astype(jnp.float32))
    noise = jax.random.uniform(jax.random.key(1), weight.shape, maxval=1e-12)
    order = jnp.where(size > 0, size, noise)
    keep = order > jnp.quantile(order, sparsity)
    repeats = (-(-k // weight.shape[0]), -(-m // weight.shape[1]))
    return jnp.tile(keep, repeats)[:k, :m]


def time_shape(
    name: str,
    sparsities,
    rows,
    dtype,
    kernel: str,
    tokens,
    pattern: str = "random",
    settle: float = device_time.SETTLE,
    rounds: int = 1,
) -> list[dict]:
    m, k = shape_of(name)
    dense = dense_weight((m, k), dtype)
    # (K, M), then (M, K).
    dense_copies = [
        (lambda x, w: x @ w, cold_copies(dense, dense.nbytes)),
        (lambda x, w: x @ w.T, cold_copies(dense.T.copy(), dense.nbytes)),
    ]
    sparse_copies = {}
    for sparsity in sparsities:
        w = fj.SparseMatrix.from_dense(prune(dense, sparsity, pattern), tokens=tokens)
        sparse_copies[sparsity] = cold_copies(w, w.nbytes)
    product = sparse_product(kernel)

    def compile_sparse(sparsity_and_n):
        sparsity, n = sparsity_and_n
        return compile_products(product, n, k, dtype, sparse_copies[sparsity])

    # Dense products are compiled one by one: XLA times what it chooses from.
    cells = list(itertools.product(sparsities, rows))
    with ThreadPoolExecutor() as pool:
        programs = dict(zip(cells, pool.map(compile_sparse, cells), strict=True))

    most = max(map(len, [*sparse_copies.values(), *(c for _, c in dense_copies)]))
    results = []
    for n in rows:
        xs = list(jax.random.normal(jax.random.key(n), (most, n, k), dtype))
        dense_programs = [
            (compile_products(dot, n, k, dtype, copies), copies)
            for dot, copies in dense_copies
        ]
        dense_us, sparse_us = [], {sparsity: [] for sparsity in sparsities}
        # With the same rows one soon after the other: a GPU is as hot, and as slow, for
        # one as for the other.
        for _ in range(rounds):
            dense_us.append(
                min(
                    time_products(program, xs, copies, settle)
                    for program, copies in dense_programs
                )
            )
            for sparsity, times in sparse_us.items():
                program, copies = programs[sparsity, n], sparse_copies[sparsity]
                times.append(time_products(program, xs, copies, settle))
        dense_median = statistics.median(dense_us)
        for sparsity, times in sparse_us.items():
            us = statistics.median(times)
            w = sparse_copies[sparsity][0]
            results.append(
                {
                    "layer": name,
                    "m": m,
                    "k": k,
                    "n": n,
                    "dtype": str(jnp.dtype(dtype)),
                    "kernel": kernel,
                    "tokens": tokens,
                    "layout": w.layout,
                    "sparsity": sparsity,
                    "pattern": pattern,
                    "bytes_per_element": round(w.nbytes / (m * k), 4),
                    "sparse_us": round(us, 2),
                    "dense_us": round(dense_median, 2),
                    "speedup": round(dense_median / us, 3),
                    "gb_per_s": round(w.nbytes / us / 1e3, 1),
                }
            )
    return results


def add_byte_limit(row: dict, read: float) -> None:
    """Says how much of the time reading the weight, x and writing y must take.

    Args:
      row: of time_shape(); gets `of_byte_limit`.
      read: bytes a second.
    """
    elements = row["m"] * row["k"] * row["bytes_per_element"]
    moved = elements + 2 * row["n"] * (row["m"] + row["k"])
    row["of_byte_limit"] = round(moved / read * 1e6 / row["sparse_us"], 3)


def print_table(results: list[dict]) -> None:
    table = Table(title="sparse_matmul beside jnp.dot")
    columns = ["layer", "M x K", "dtype", "N", "zeros", "pattern", "us", "GB/s"]
    for column in [*columns, "limit", "dense us", "x dense"]:
        table.add_column(column, justify="right", no_wrap=True)
    for r in results:
        table.add_row(
            r["layer"],
            f"{r['m']}x{r['k']}",
            r["dtype"],
            str(r["n"]),
            f"{r['sparsity']:.0%}",
            r["pattern"],
            f"{r['sparse_us']:.1f}",
            f"{r['gb_per_s']:.0f}",
            f"{r['of_byte_limit']:.0%}",
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
    rows: Annotated[
        str, typer.Option(help="N: rows of x.")
    ] = "1,2,8,16,32,64,128,256,512",
    dtype: Annotated[
        str, typer.Option(help="float16, bfloat16, or both, comma-separated.")
    ] = "float16",
    kernel: Annotated[
        str,
        typer.Option(
            help="auto (as sparse_matmul), mma, wgmma, or expand: the weight is "
            "expanded and a dense product follows."
        ),
    ] = "auto",
    tokens: Annotated[
        int, typer.Option(help="As in SparseMatrix.from_dense; 0: none.")
    ] = 0,
    pattern: Annotated[
        str,
        typer.Option(
            help="Of the zeros: random, rows or columns (a twentieth of the outputs or "
            "inputs is dense), demo (the demo model's); comma-separated."
        ),
    ] = "random",
    settle: Annotated[
        float, typer.Option(help="Seconds that a program runs before it is timed.")
    ] = device_time.SETTLE,
    rounds: Annotated[
        int,
        typer.Option(min=1, help="So many times dense and sparse in turn; medians."),
    ] = 3,
    name: Annotated[str, typer.Option(help="Stem of the result file.")] = "matmul",
) -> None:
    """Times sparse_matmul beside jnp.dot."""
    reason = fj.cuda_unavailable_reason()
    if reason:
        raise SystemExit(f"benchmarks/matmul.py needs a GPU: {reason}")
    if tokens and kernel != "auto":
        raise SystemExit(f"expected --kernel auto with --tokens, got {kernel}")
    known = [*SHAPES, *OTHERS]
    unknown = set(layers.split(",")) - set(known)
    if unknown:
        raise SystemExit(f"expected layers from {known}, got {sorted(unknown)}")
    patterns = pattern.split(",")
    if unknown := set(patterns) - set(PATTERNS):
        raise SystemExit(f"expected patterns from {PATTERNS}, got {sorted(unknown)}")
    results = []
    read = read_bandwidth()
    for layer, one_dtype, one_pattern in itertools.product(
        layers.split(","), dtype.split(","), patterns
    ):
        found = time_shape(
            layer,
            [float(s) for s in sparsity.split(",")],
            [int(n) for n in rows.split(",")],
            jnp.dtype(one_dtype),
            kernel,
            tokens or None,
            one_pattern,
            settle,
            rounds,
        )
        for row in found:
            add_byte_limit(row, read)
        results += found
        facts = {
            "read_gb_per_s": round(read / 1e9),
            "settle_s": settle,
            "rounds": rounds,
        }
        path = report.save(name, facts | {"results": results})
    print_table(results)
    print(f"written to {path}")
    try:
        import plot_speedup
    except ImportError:
        print("no plot: matplotlib is not installed")
    else:
        print(f"written to {plot_speedup.save_png(path)}")


if __name__ == "__main__":
    typer.run(main)
