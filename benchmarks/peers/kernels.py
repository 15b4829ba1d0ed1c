"""Times the kernels of Flash-LLM and SpInfer, and JAX's sparse arrays, beside ours.

    python benchmarks/peers/kernels.py --flash-llm PATH --spinfer PATH

The paths are those of the shared libraries that you built from their sources, for your
GPU (the `build` folder of either repository, with SMS=90 for Hopper); nothing of theirs
is here. A library that is not given is left out. Every figure is of one run: ours,
`jnp.dot` and theirs by the profiler, weights not in the L2 cache, as in matmul.py. Of
theirs it is the best of several split-K. `error` is the distance from the product in
float32 by its norm. JAX's BCOO and BCSR are timed last, in float32, in the first case.

Prints a table and writes `benchmarks/results/peers-DEVICE.json`.
"""

import ctypes
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import rich
import typer
from jax.experimental import sparse
from rich.table import Table

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import device_time
import matmul
import report

SPLIT_K = (1, 2, 3, 4, 6, 8)
STREAM = 0  # the legacy default stream

_pointer, _int = ctypes.c_void_p, ctypes.c_int


class Peer:
    """A library's kernel with a weight of its own format.

    Its functions are C++ ones: they are found by how their mangled names begin.
    """

    kernel: str  # the function that launches it
    arrays: int  # of a packed weight

    def __init__(self, library: pathlib.Path):
        self.library = ctypes.CDLL(str(library.resolve()))
        listed = subprocess.run(
            ["nm", "-D", "--defined-only", library],
            capture_output=True,
            text=True,
            check=True,
        )
        self.names = [line.split()[-1] for line in listed.stdout.splitlines()]
        # A stream, the dense weight, its arrays, x and y; sizes; workspace and split-K.
        pointers = (4 + self.arrays) * [_pointer]
        self.launch = self.function(self.kernel, *pointers, *3 * [_int], _pointer, _int)

    def function(self, name: str, *arguments: Any) -> Any:
        """One of the library's functions, with the types of its arguments."""
        stem = f"_Z{len(name)}{name}"
        found = [known for known in self.names if known.startswith(stem)]
        if len(found) != 1:
            raise SystemExit(
                f"expected one function {name} in {self.library._name}, got {found}"
            )
        function = self.library[found[0]]
        function.argtypes, function.restype = arguments, _int
        return function

    def product(self, packed, x, y, workspace, split_k: int) -> None:
        """Launches y = x W^T."""
        (n, k), (_, m) = x.shape, y.shape
        arrays = map(_address, [*packed, x, y])
        error = self.launch(
            STREAM, None, *arrays, m, n, k, _address(workspace), split_k
        )
        _check(error)


class FlashLLM(Peer):
    """Tiled-CSL; of weights whose shape is a multiple of 256 x 64."""

    kernel, arrays = "SpMM_SplitK_API", 2

    def pack(self, weight: np.ndarray) -> list[np.ndarray]:
        """Its arrays of a (M, K) float16 weight."""
        pack = self.function(
            "InitSparseMatrixA_API", _pointer, *3 * [_int], *2 * [_pointer]
        )
        (m, k), n = weight.shape, 8  # n is not used
        words, offsets = _pointer(), _pointer()
        count = pack(
            weight.ctypes.data, m, n, k, ctypes.byref(words), ctypes.byref(offsets)
        )
        tiles = _taken(offsets, np.int32, count)
        return [_taken(words, np.uint32, 4 * int(tiles[-1])), tiles]


class SpInfer(Peer):
    """A bitmap of 8 x 8 tiles; of weights whose shape is a multiple of 64 x 64."""

    kernel, arrays = "SpMM_SplitK_API_bitmap_v3", 5

    def pack(self, weight: np.ndarray) -> list[np.ndarray]:
        """Its arrays of a (M, K) float16 weight."""
        pack = self.function(
            "InitSparseMatrixA_bitmap", _pointer, *8 * [_int], *6 * [_pointer]
        )
        values, sizes, medians, tiles, bitmap = (_pointer() for _ in range(5))
        most = _int()
        results = map(ctypes.byref, (values, sizes, medians, tiles, bitmap, most))
        count = pack(weight.ctypes.data, *weight.shape, 8, 16, 64, 8, 64, 64, *results)
        ends = _taken(tiles, np.int32, count + 1)
        _taken(sizes, np.int32, 0)
        return [
            _taken(values, np.float16, int(ends[-1])),
            ends,
            _taken(medians, np.int32, 4 * count),
            _taken(bitmap, np.uint32, 2 * 64 * count),
            np.array([-(-most.value // 64) * 64], np.int32),
        ]


def _taken(pointer: Any, dtype: Any, count: int) -> np.ndarray:
    """A copy of an array that the library allocated, which is freed."""
    size = count * np.dtype(dtype).itemsize
    array = np.frombuffer(ctypes.string_at(pointer, size), dtype)
    ctypes.CDLL(None).free(pointer)
    return array


def _address(array: jax.Array) -> int:
    return array.unsafe_buffer_pointer()


def _check(error: int) -> None:
    if error:
        raise SystemExit(f"a peer's kernel failed with CUDA error {error}")


def time_peer(peer: Peer, weight: np.ndarray, rows: list[int]) -> dict[int, dict]:
    """Microseconds and error of a peer's product, by rows of x.

    Args:
      peer: the library.
      weight: (M, K) float16.
      rows: numbers of rows of x.
    """
    m, k = weight.shape
    packed = [jnp.asarray(array) for array in peer.pack(weight)]
    copies = matmul.cold_copies(packed, sum(array.nbytes for array in packed))
    driver = ctypes.CDLL("libcuda.so.1")
    found = {}
    for n in rows:
        key, shape = jax.random.key(n), (len(copies), n, k)
        xs = list(jax.random.normal(key, shape, jnp.float16))
        y = jnp.zeros((n, m), jnp.float16)
        workspace = jnp.zeros((max(SPLIT_K), n, m), jnp.float16)
        jax.block_until_ready((copies, xs, y, workspace))

        def program(split_k: int, xs=xs, y=y, workspace=workspace) -> None:
            for x, copy in zip(xs, copies, strict=True):
                peer.product(copy, x, y, workspace, split_k)
            _check(driver.cuCtxSynchronize())

        times = time_splits(program, len(copies))
        best = min(times, key=times.get)
        program(best)
        result = np.asarray(jnp.copy(y), np.float32)
        exact = np.asarray(xs[-1], np.float32) @ weight.T.astype(np.float32)
        error = np.linalg.norm(result - exact) / np.linalg.norm(exact)
        found[n] = {
            "us": round(times[best], 2),
            "split_k": best,
            "error": float(f"{error:.2g}"),
            "bytes_per_element": round(
                sum(array.nbytes for array in packed) / weight.size, 4
            ),
        }
    return found


def time_splits(program: Callable[[int], None], products: int) -> dict[int, float]:
    """Microseconds of a product by split-K, the median of several executions.

    All are profiled at once, which takes seconds to begin and to end. With a split a
    product is two kernels, the second one for the sum.
    """
    for split_k in SPLIT_K:
        program(split_k)
    with device_time.profile() as events:
        for split_k in SPLIT_K:
            for _ in range(device_time.EXECUTIONS):
                program(split_k)
    kernels = {split_k: products * (1 if split_k == 1 else 2) for split_k in SPLIT_K}
    expected = device_time.EXECUTIONS * sum(kernels.values())
    if len(events) != expected:
        raise RuntimeError(f"expected {expected} kernels, got {len(events)}")
    times, begin = {}, 0
    for split_k, count in kernels.items():
        spans = []
        for _ in range(device_time.EXECUTIONS):
            spans.append(device_time.span(events[begin : begin + count]))
            begin += count
        times[split_k] = statistics.median(spans) / products / 1e3
    return times


def time_jax(pruned: jax.Array, n: int) -> dict[str, float]:
    """Microseconds of JAX's own sparse arrays by the host's clock, by their name.

    One product each, in float32: in half precision XLA adds up one element at a time,
    which took 20 s on an H200.
    """
    k, _ = pruned.shape
    found = {}
    for name, kind in (("BCOO", sparse.BCOO), ("BCSR", sparse.BCSR)):
        # x @ W as (W^T x^T)^T: their products take the sparse array on the left.
        weight = kind.fromdense(pruned.T)
        x = jax.random.normal(jax.random.key(n), (k, n), pruned.dtype)
        program = jax.jit(lambda weight, x: weight @ x).lower(weight, x).compile()
        jax.block_until_ready(program(weight, x))
        began = time.perf_counter()
        jax.block_until_ready(program(weight, x))
        found[name] = round(1e6 * (time.perf_counter() - began), 1)
        print(f"{name}: {found[name]} us", flush=True)
    return found


def print_table(results: list[dict], others: dict[str, float]) -> None:
    names = [name for name in ("flash_llm", "spinfer") if f"{name}_us" in results[0]]
    table = Table(title="x dense, and distance from the exact product")
    for column in ("M x K", "zeros", "N", "dense us", "flashjax", *names):
        table.add_column(column, justify="right", no_wrap=True)
    for r in results:
        table.add_row(
            f"{r['m']}x{r['k']}",
            f"{r['sparsity']:.0%}",
            str(r["n"]),
            f"{r['dense_us']:.1f}",
            f"{r['speedup']:.2f}",
            *(
                f"{r['dense_us'] / r[f'{name}_us']:.2f} ({r[f'{name}_error']:.0e})"
                for name in names
            ),
        )
    rich.get_console().width = max(rich.get_console().width, 110)
    rich.print(table)
    if others:
        rich.print(others)


def main(
    flash_llm: Annotated[
        pathlib.Path | None, typer.Option(help="Flash-LLM's libSpMM_API.so.")
    ] = None,
    spinfer: Annotated[
        pathlib.Path | None, typer.Option(help="SpInfer's libSpMM_API.so.")
    ] = None,
    layers: Annotated[
        str, typer.Option(help="As in matmul.py.")
    ] = "opt-30b.attention,opt-30b.fc1",
    sparsity: Annotated[str, typer.Option()] = "0.5,0.6,0.8",
    rows: Annotated[str, typer.Option(help="8, 16, 32, 64, 128.")] = "8,16,32,64",
    with_jax: Annotated[
        bool, typer.Option("--jax/--no-jax", help="BCOO and BCSR, too; last.")
    ] = True,
) -> None:
    """Times peers' kernels beside sparse_matmul and jnp.dot."""
    peers: dict[str, Peer] = {}
    if flash_llm is not None:
        peers["flash_llm"] = FlashLLM(flash_llm)
    if spinfer is not None:
        peers["spinfer"] = SpInfer(spinfer)
    numbers = [int(n) for n in rows.split(",")]
    results: list[dict] = []
    others: dict[str, float] = {}
    for name in layers.split(","):
        for share in map(float, sparsity.split(",")):
            found = matmul.time_shape(name, [share], numbers, jnp.float16, "auto", None)
            dense = matmul.dense_weight(matmul.shape_of(name), jnp.float16)
            pruned = matmul.prune(dense, share)
            weight = np.ascontiguousarray(np.asarray(pruned).T)
            for peer_name, peer in peers.items():
                for row, times in zip(
                    found, time_peer(peer, weight, numbers).values(), strict=True
                ):
                    row |= {f"{peer_name}_{key}": value for key, value in times.items()}
                print(name, share, peer_name, "done", flush=True)
            results += found
            path = report.save("peers", {"results": results})
    if with_jax:
        first = results[0]
        dense = matmul.dense_weight((first["m"], first["k"]), jnp.float16)
        others = {key: first[key] for key in ("layer", "n", "sparsity")}
        others |= {key: first[key] for key in ("sparse_us", "dense_us")}
        pruned = matmul.prune(dense, first["sparsity"])
        others |= time_jax(pruned.astype(jnp.float32), first["n"])
        path = report.save("peers", {"results": results, "jax": others})
    print_table(results, others)
    print(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
