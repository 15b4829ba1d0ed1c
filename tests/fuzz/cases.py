"""Matrices and calls for the fuzz tests.

Shapes and dtypes come from a list, so that a test compiles seldom; what is in the
matrices is drawn anew for every case.
"""

import dataclasses
import functools
import itertools
import math
import random
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import pytest
from hypothesis import settings
from hypothesis import strategies as st

import flashjax as fj
from flashjax import gather, layouts, packing, reference

# (K, M): nothing, ones, primes, a tile and an entry and one less and one more.
SHAPES = [
    (0, 0),
    (0, 5),
    (5, 0),
    (1, 1),
    (1, 40),
    (2, 16),
    (13, 7),
    (63, 17),
    (64, 16),
    (65, 15),
    (256, 48),
    (257, 33),
    (509, 31),
    (1025, 16),
    (1031, 97),
]
ROWS = [0, 1, 2, 3, 7, 8, 9, 17, 40, 129]
# Beside them where there are thousands of cases.
PRIMES = [p for p in range(2, 2100) if all(p % d for d in range(2, int(p**0.5) + 1))]
MORE_ROWS = [5, 33, 64, 257, 1031]
FLOATS = (*op_cases.HALVES, "float32")
# No sum of products overflows; the last makes subnormals in float16.
SCALES = [1.0, 2.0**5, 2.0**-9, 2.0**-20]
SPECIALS = [np.nan, np.inf, -np.inf]

# Thousands of cases come in parts, which processes take side by side. Each has calls of
# its own, so that none is compiled in two of them.
CASES = settings.default.max_examples
PARTS = 8 if CASES > 1000 else 1
in_parts = pytest.mark.parametrize("part", range(PARTS))
of_a_part = settings(max_examples=CASES // PARTS)
few = settings(max_examples=CASES // PARTS // 8)


def given(*strategies):
    """hypothesis.given, which counts: `given.cases` is how many were tested."""

    def decorate(test):
        @functools.wraps(test)
        def counted(*arguments, **named):
            given.cases += 1
            test(*arguments, **named)

        return hypothesis.given(*strategies)(counted)

    return decorate


given.cases = 0


@dataclasses.dataclass(frozen=True)
class Signature:
    """What a call is compiled for: x (*lead, K) times w (K, M), and how."""

    shape: tuple[int, int]
    lead: tuple[int, ...]
    w_dtype: str
    x_dtype: str
    bias_dtype: str | None
    out_dtype: str | None
    activation: str | None
    is_stacked: bool  # w is the second one of a stack

    @property
    def rows(self) -> int:
        return math.prod(self.lead)

    @property
    def is_empty(self) -> bool:
        return 0 in (*self.shape, self.rows)

    @property
    def reaches_kernel(self) -> bool:
        """Whether the CUDA kernels multiply, and no expanded matrix."""
        return not self.is_empty and self.x_dtype == self.w_dtype

    def options(self, bias: np.ndarray | None) -> dict[str, Any]:
        """Those of sparse_matmul."""
        return {
            "bias": bias,
            "activation": self.activation,
            "preferred_element_type": self.out_dtype,
            "layer": 1 if self.is_stacked else None,
        }


def _shapes_and_rows():
    if PARTS == 1:
        return SHAPES, ROWS
    rng = random.Random(1)
    more = [
        (rng.choice(PRIMES), rng.choice(PRIMES[:100])) for _ in range(3 * len(SHAPES))
    ]
    return SHAPES + more, ROWS + MORE_ROWS


def _lead(rows: int, rng: random.Random) -> tuple[int, ...]:
    """A shape of so many rows."""
    if rows == 0:
        return rng.choice([(0,), (3, 0), (0, 4)])
    parts = [n for n in range(2, rows) if rows % n == 0]
    choices: list[tuple[int, ...]] = [(rows,), (rows,), (1, rows), (rows, 1)]
    if rows == 1:
        choices.append(())
    if parts:
        n = rng.choice(parts)
        choices += [(n, rows // n), (n, 1, rows // n)]
    return rng.choice(choices)


def every_signature() -> list[Signature]:
    """All of a profile: each shape and number of rows often, and few of nothing."""
    rng = random.Random(0)
    shapes, rows = _shapes_and_rows()
    some = [[s for s in shapes if 0 not in s], [n for n in rows if n]]
    for values in some:
        rng.shuffle(values)
    turns = [itertools.cycle(values) for values in some]
    signatures = []
    for i in range(CASES // 6):
        shape, count = map(next, turns)
        if i % 20 == 7:
            shape = rng.choice([s for s in shapes if 0 in s])
        elif i % 20 == 17:
            count = 0
        w_dtype = op_cases.HALVES[i % 2]
        x_dtype = w_dtype if i % 3 else rng.choice(FLOATS)
        signatures.append(
            Signature(
                shape,
                _lead(count, rng),
                w_dtype,
                x_dtype,
                bias_dtype=rng.choice([None, "float32", x_dtype]),
                out_dtype=rng.choice([None, None, "float32"]),
                activation=rng.choice([None, None, "relu"]),
                is_stacked=rng.random() < 0.2,
            )
        )
    return signatures


@functools.cache
def signatures(part: int) -> st.SearchStrategy[Signature]:
    """A part's: in all one for every six cases of a test."""
    return st.sampled_from(every_signature()[part::PARTS])


def _uniform(k, m, rng):
    return rng.random((k, m)) < rng.choice([0.0, 0.02, 0.3, 0.5, 0.9, 1.0])


def _uneven(k, m, rng):
    power = rng.choice([0.3, 1.0, 8.0])
    density = rng.random((k, 1)) ** power * rng.random((1, m)) ** power
    return rng.random((k, m)) < density


def _runs(k, m, rng):
    """Dense and empty runs of an output's weights, of random lengths."""
    return np.cumsum(rng.random((k, m)) < 1 / rng.integers(2, 100), axis=0) % 2 == 1


def _tiles(k, m, rng):
    """Tiles of a strip and a step that are dense, empty or half full."""
    density = rng.choice([0.0, 0.5, 1.0], (k // 64 + 1, m // 16 + 1))
    return rng.random((k, m)) < np.kron(density, np.ones((64, 16)))[:k, :m]


_RANDOM = {"uniform": _uniform, "uneven": _uneven, "runs": _runs, "tiles": _tiles}

patterns = st.sampled_from([*_RANDOM, *op_cases.PATTERNS])
seeds = st.integers(0, 2**32 - 1)


def mask(pattern: str, k: int, m: int, rng: np.random.Generator) -> np.ndarray:
    """What is not zero in a (K, M) matrix."""
    if pattern in _RANDOM or k * m == 0:
        return _RANDOM.get(pattern, _uniform)(k, m, rng)
    keep = op_cases.PATTERNS[pattern](k, np.arange(k)[:, None], np.arange(m)[None])
    return np.broadcast_to(keep, (k, m))


def matrix(pattern: str, shape, dtype: str, scale: float, seed: int) -> np.ndarray:
    """A dense (K, M) matrix, with zeros of both signs."""
    rng = np.random.default_rng(seed)
    dense = rng.standard_normal(shape) * scale * mask(pattern, *shape, rng)
    return dense.astype(jnp.dtype(dtype))


def operands(call: Signature, scale: float, seed: int):
    """x (*lead, K) and a bias (M,) or None."""
    rng = np.random.default_rng(seed + 1)
    x = rng.standard_normal((*call.lead, call.shape[0]))
    x = x.astype(jnp.dtype(call.x_dtype))
    if call.bias_dtype is None:
        return x, None
    bias = rng.standard_normal(call.shape[1]) * scale
    return x, bias.astype(jnp.dtype(call.bias_dtype))


def put_specials(array: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Replaces some elements by NaN and infinities."""
    rng = np.random.default_rng(seed + 2)
    array = array.copy()
    if array.size:
        places = rng.integers(0, array.size, count)
        array.reshape(-1)[places] = rng.choice(SPECIALS, count).astype(array.dtype)
    return array


def packed(dense: np.ndarray, is_exact: bool = False) -> fj.SparseMatrix:
    """Packs a matrix, with as many segments as if it had no zeros.

    A shape then has one size of `values`, whatever the pattern, and one compilation. If
    it is exact, nothing follows the values, as it usually is.
    """
    w = fj.SparseMatrix.from_dense(dense)
    if is_exact:
        return w
    shapes = reference.leaf_shapes(dense.shape)
    strips, groups = shapes["bitmap"][:2]
    return _padded(w, 4 * strips * groups, ("values",))


def _padded(w: fj.SparseMatrix, size: int, names: tuple[str, ...]) -> fj.SparseMatrix:
    leaves = {name: np.asarray(getattr(w, name)) for name in names}
    return dataclasses.replace(
        w,
        **{
            name: jnp.asarray(np.pad(leaf, ((0, size - len(leaf)), (0, 0), (0, 0))))
            for name, leaf in leaves.items()
        },
    )


def packed_for(call: Signature, dense: np.ndarray, is_exact: bool) -> fj.SparseMatrix:
    """The same, as the second one of a stack if the call wants one."""
    w = packed(dense, is_exact)
    if not call.is_stacked:
        return w
    return fj.SparseMatrix.stack([packed(dense[::-1, ::-1]), w])


def packed_for_few_tokens(dense: np.ndarray, layout: str) -> fj.SparseMatrix:
    """In the gather layout, or with closer streams, whether or not it is worth while.

    What cannot have the gather layout gets closer streams.
    """
    leaves = gather.pack(dense) if layout == "gather" and dense.size else None
    if leaves is not None:
        w = op_cases.packed_matrix(leaves, dense, layouts.GATHER)
        chunks = 1 << max(0, len(w.values) - 1).bit_length()  # few compilations
        return _padded(w, chunks, ("bitmap", "values"))
    leaves = packing._pack_on_host(dense, 0, for_few_tokens=True)
    return op_cases.packed_matrix(leaves, dense, layouts.DEFAULT)


def in_every_order(x: np.ndarray) -> dict[str, np.ndarray | jax.Array]:
    """The same array with other strides, and on the device."""
    wide = np.zeros([2 * n for n in x.shape], x.dtype)
    places = (slice(1, None, 2),) * x.ndim
    wide[places] = x
    back = (slice(None, None, -1),) * x.ndim
    return {
        "contiguous": x,
        "fortran": np.asfortranarray(x),
        "strided": wide[places],
        "reversed": x[back].copy()[back],
        "device": jnp.asarray(x),
    }


orders = st.sampled_from(["contiguous", "fortran", "strided", "reversed", "device"])

# What makes x inside a program, where XLA chooses its layout, of an array that is x
# after what stands beside it: (x of the array, the array of x).
VIEWS = {
    "transposed": (jnp.transpose, np.transpose),
    "reversed": (lambda a: a[..., ::-1], lambda x: x[..., ::-1]),
    "every other": (lambda a: a[..., ::2], lambda x: np.repeat(x, 2, axis=-1)),
    "a slice": (
        lambda a: a[..., 3:],
        lambda x: np.pad(x, [(0, 0)] * (x.ndim - 1) + [(3, 0)]),
    ),
}
views = st.sampled_from(list(VIEWS))
