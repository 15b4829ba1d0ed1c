"""Times a matrix' kernel on the user's device beside what else computes its product."""

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flashjax import _native, layouts, matmul_impl, tuned_rows
from flashjax.matmul_checks import make_call
from flashjax.matrix import PackedMatrix, is_readable
from flashjax.sparse_matrix import SparseMatrix

_ROWS = {
    "cuda": (1, 8, 32, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096),
    "cpu": (1, 4, 16, 32, 64, 128, 192, 256, 512),
}
_MOST_ROWS = 1 << 20
# The copies of a matrix that a program goes through are more than a GPU's L2 cache.
_COLD_BYTES = 160 << 20
_MOST_COPIES = 48
# A GPU gets programs of about so long, unless x and results take more bytes than that,
# and some of them in a row, so that it never waits for the host; a CPU would compute
# them side by side.
_PROGRAM_SECONDS, _MOST_PRODUCTS, _MOST_BYTES = 2e-3, 64, 256 << 20
_PROGRAMS = {"cuda": 4, "cpu": 1}
_RUNS, _SECONDS = 5, 0.03
# Expanding takes memory for a dense matrix: it has to be faster by more than timings
# differ.
_MARGIN = 1.03


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds of a product with some rows of x, each the median of several runs.

    Attributes:
      rows: N.
      kernel: of the sparse kernel.
      expand: of expanding the weight and multiplying by the dense matrix.
      dense: of `x @ dense`, where the weight is dense all the time.
    """

    rows: int
    kernel: float
    expand: float
    dense: float


@dataclasses.dataclass(frozen=True)
class TunedMatrix:
    """What `autotune` found for one matrix.

    Attributes:
      shape: (in_features, out_features).
      dtype: of the weight and of x.
      sparsity: share of zeros.
      device: where.
      kernel_rows: rows of x up to which the kernel is to be used.
      timings: by rows of x.
    """

    shape: tuple[int, int]
    dtype: np.dtype
    sparsity: float
    device: str
    kernel_rows: int
    timings: tuple[Timing, ...]

    def __str__(self) -> str:
        k, m = self.shape
        limited = self.kernel_rows < matmul_impl.KERNEL_ROWS["cuda"]
        rows = f"up to {self.kernel_rows} rows of x" if limited else "always"
        lines = [
            f"{k} x {m}, {self.dtype.name}, {self.sparsity:.0%} zeros, {self.device}: "
            f"the kernel {rows}",
            "rows of x     kernel     expand      dense   x dense",
        ]
        for t in self.timings:
            speedup = t.dense / min(t.kernel, t.expand)
            lines.append(
                f"{t.rows:9} {t.kernel:7.1f} us {t.expand:7.1f} us {t.dense:7.1f} us "
                f"{speedup:9.2f}"
            )
        return "\n".join(lines)


def autotune(
    weights: Any,
    rows: Iterable[int] | None = None,
    *,
    save: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[TunedMatrix]:
    """Finds on this device up to how many rows of x the sparse kernels are worth it.

    With many rows the kernels, which expand a weight anew for every 344 rows at most,
    may lose to expanding it once, to a temporary dense matrix. Where, depends on the
    device, the shape and the zeros; without this FlashJAX takes what is usual: on an
    H200 the kernel always. What is found counts for every matrix of that shape, dtype
    and number of zeros (within 5% of the elements) on such a device, here and in later
    processes of this version of FlashJAX; functions jitted before are compiled again
    when they are called next (those compiled by `.lower().compile()` are not). The two
    ways round differently: a result may differ in its last bit from one before, where
    it takes the other one.

    It also tells whether sparse pays at all for a layer: beside the times of both ways
    are those of the dense product. It takes a minute or so for a shape on a GPU, most
    of it for XLA to choose its kernels for the dense products, and the device should do
    nothing else meanwhile.

    Args:
      weights: a SparseMatrix, several, or an NNX model with sparse layers; in the
        default layout, on one device. Of those that are alike one is timed.
      rows: numbers of rows of x to time, in any order; None takes some up to 4096 on a
        GPU and up to 512 on a CPU. Between two of them the kernel is used up to the
        lower one; below the first and above the last what is usual stays, unless
        that contradicts what was found.
      save: keep what is found for each matrix as soon as it is timed, in the JSON file
        that `$FLASHJAX_TUNING` names (empty: in none, and it does not count) or
        `flashjax/tuning.json` in `$XDG_CACHE_HOME`, `~/.cache` without it. False only
        measures.
      progress: called with how many products have been timed, and of how many.

    Returns:
      What was found, by matrix; printed, each is a table.

    Raises:
      ValueError: no matrix, or no or bad numbers of rows; a matrix has no elements, is
        a stack or in the layout for few tokens; they are on several devices; or the
        file is none of this function's.
      TypeError: something is no SparseMatrix, or traced, or the call is.
      NotImplementedError: there is no kernel for the device.
      OSError: the file cannot be written.
    """
    if isinstance(jnp.zeros(()) + 0, jax.core.Tracer):
        raise TypeError(
            "autotune: expected a call outside of jit, where things are computed, got "
            "one while JAX traces"
        )
    matrices = _matrices(weights)
    device = _device(matrices)
    platform = _platform(device)
    numbers = _numbers(_ROWS[platform] if rows is None else rows)
    kind = tuned_rows.kind_of(device)
    if save:
        tuned_rows.add(kind, [])  # before minutes of timing: can it be written?
    chosen: list[tuple[SparseMatrix, tuned_rows.TunedRows]] = []
    for w in matrices:
        stored = matmul_impl.stored_share(w.shape, w.packed)
        new = tuned_rows.describe(w.shape, w.dtype, w.layout, stored)
        if not any(known.is_for(new) for _, known in chosen):
            chosen.append((w, new))
    found = []
    for index, (w, entry) in enumerate(chosen):

        def report(done: int, before: int = index * len(numbers)) -> None:
            if progress is not None:
                progress(before + done, len(chosen) * len(numbers))

        with jax.default_device(device), jax.disable_jit(False):
            timings = _time(w, platform, numbers, report)
        usual = matmul_impl.usual_kernel_rows(platform)
        kernel_rows = _kernel_rows(timings, usual)
        if save:
            tuned_rows.add(kind, [dataclasses.replace(entry, kernel_rows=kernel_rows)])
            jax.clear_caches()  # of programs that follow what was known before
        found.append(
            TunedMatrix(w.shape, w.dtype, w.sparsity, kind, kernel_rows, timings)
        )
    return found


def _kernel_rows(timings: tuple[Timing, ...], usual: int) -> int:
    """Up to where the kernel is used so that the products slow down the least.

    By the sum of what each takes beside the faster way, so that one time that is off
    decides nothing; what was not measured is as usual.
    """

    def slowdown(most: int) -> float:
        times = [(t.rows, t.kernel, _MARGIN * t.expand) for t in timings]
        return sum(
            (kernel if rows <= most else expand) / min(kernel, expand)
            for rows, kernel, expand in times
        )

    first, last = timings[0].rows, timings[-1].rows
    best = min([last, *(t.rows for t in reversed(timings)), 0], key=slowdown)
    if best == last:
        return max(last, usual)
    return best if best else min(first - 1, usual)


def _matrices(weights: Any) -> list[SparseMatrix]:
    from flashjax.nn import sparse_matrices  # which imports Flax

    def of_one(item: Any) -> list[Any] | None:
        return [item] if isinstance(item, PackedMatrix) else sparse_matrices(item)

    found = of_one(weights)
    if found is None:
        several = weights.values() if isinstance(weights, Mapping) else weights
        items = list(several) if isinstance(several, Iterable) else [several]
        parts = [(item, of_one(item)) for item in items]
        found = [w for item, of in parts for w in ([item] if of is None else of)]
    matrices = [_check_matrix(w) for w in found]
    if not matrices:
        raise ValueError("autotune: expected at least one sparse matrix, got none")
    return matrices


def _check_matrix(w: Any) -> SparseMatrix:
    if not isinstance(w, SparseMatrix):
        raise TypeError(
            "autotune: expected a SparseMatrix, several, or an NNX model with sparse "
            f"layers, got {type(w).__name__}"
        )
    w.check_leaves("autotune")
    if not all(map(is_readable, w.packed)):
        raise TypeError(
            "autotune: expected a matrix whose arrays can be read, got traced ones, "
            "deleted ones or shapes alone"
        )
    if w.layout != layouts.DEFAULT:
        raise ValueError(
            f"autotune: expected matrices in the layout {layouts.DEFAULT!r}, which has "
            f"kernels for any number of rows, got {w.layout!r}"
        )
    if not w.size:
        raise ValueError(f"autotune: expected a matrix with elements, got {w.shape}")
    return jax.tree.map(jnp.asarray, w)  # arrays of numpy go where a product would


def _device(matrices: list[SparseMatrix]) -> jax.Device:
    devices = {device for w in matrices for device in w.bitmap.devices()}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"autotune: expected matrices on one device, got {names}")
    return devices.pop()


def _platform(device: jax.Device) -> str:
    platform = {"gpu": "cuda", "cpu": "cpu"}.get(device.platform)
    if platform is None:
        raise NotImplementedError(f"autotune: there are no kernels for {device}")
    if platform == "cuda" and not _native.cuda_available():
        raise NotImplementedError(
            f"autotune: no kernel runs here: {_native.cuda_unavailable_reason()}"
        )
    return platform


def _numbers(rows: Iterable[int]) -> list[int]:
    try:
        numbers = list(rows)
    except TypeError:
        raise ValueError(
            f"autotune: expected several numbers of rows, got {rows!r}"
        ) from None
    for n in numbers:
        is_whole = isinstance(n, int | np.integer) and not isinstance(n, bool)
        if not is_whole or not 1 <= n <= _MOST_ROWS:
            raise ValueError(
                f"autotune: expected numbers of rows from 1 to {_MOST_ROWS}, got {n!r}"
            )
    if not numbers:
        raise ValueError("autotune: expected at least one number of rows, got none")
    return sorted({int(n) for n in numbers})


def _time(
    w: SparseMatrix, platform: str, rows: list[int], report: Callable[[int], None]
) -> tuple[Timing, ...]:
    dense = w.to_dense()

    def product(kernel_rows: int) -> Callable[[Any, Any], jax.Array]:
        def multiply(x, packed):
            call = make_call(x, w, None, platform, None)
            call = dataclasses.replace(call, kernel_rows=kernel_rows)
            operands = matmul_impl.Operands(x, None, packed, None)
            return matmul_impl.compute(call, operands)

        return multiply

    timings = []
    for done, n in enumerate(rows, 1):
        timings.append(
            Timing(
                n,
                kernel=_microseconds(product(n), n, w, w.packed),
                expand=_microseconds(product(0), n, w, w.packed),
                dense=_microseconds(jnp.matmul, n, w, dense),
            )
        )
        report(done)
    return tuple(timings)


def _microseconds(
    product: Callable[[Any, Any], jax.Array], n: int, w: SparseMatrix, weight: Any
) -> float:
    """Of `product(x, weight)`, in a program of several, each with the next copy of it.

    A copy was not in the cache when its turn comes, as in a model of many layers.
    """
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(weight))
    count = min(max(2, math.ceil(_COLD_BYTES / max(1, nbytes))), _MOST_COPIES)
    copies = [jax.tree.map(jnp.copy, weight) for _ in range(count)]
    programs = _PROGRAMS[_platform(_device([w]))]
    seconds = _seconds(product, n, w, copies, count, programs)
    if programs > 1 and seconds * count < _PROGRAM_SECONDS:
        most = max(count, _MOST_BYTES // (n * sum(w.shape) * w.dtype.itemsize))
        count = min(math.ceil(_PROGRAM_SECONDS / seconds), _MOST_PRODUCTS, most)
        seconds = _seconds(product, n, w, copies, count, programs)
    return 1e6 * seconds


def _seconds(
    product: Callable[[Any, Any], jax.Array],
    n: int,
    w: SparseMatrix,
    copies: list[Any],
    count: int,
    programs: int,
) -> float:
    """Of one of `count` products, in so many programs that are begun in a row."""
    keys = jax.random.split(jax.random.key(n), count)
    xs = [jax.random.normal(key, (n, w.shape[0]), w.dtype) for key in keys]

    @jax.jit
    def program(xs, copies):
        # One after the other, or XLA makes one product of those with the same copy.
        results: list[jax.Array] = []
        for x, copy in zip(xs, itertools.cycle(copies)):
            if results:
                x, results[-1] = jax.lax.optimization_barrier((x, results[-1]))
            results.append(product(x, copy))
        return results

    jax.block_until_ready(program(xs, copies))
    times: list[float] = []
    while len(times) < _RUNS or sum(times) < _SECONDS:
        began = time.perf_counter()
        for _ in range(programs):
            results = program(xs, copies)
        jax.block_until_ready(results)
        times.append(time.perf_counter() - began)
    return statistics.median(times) / (programs * count)
