"""Matrices and calls for the fuzz tests.

Shapes and dtypes come from a list, so that a test compiles seldom; what is in the
matrices is drawn anew for every case.
"""

import dataclasses
import functools
import itertools
import random

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import pytest
from hypothesis import settings
from hypothesis import strategies as st

import flashjax as fj
from flashjax import reference

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
    """What a call is compiled for: x (rows, K) times w (K, M), and a bias or none."""

    shape: tuple[int, int]
    rows: int
    w_dtype: str
    x_dtype: str
    has_bias: bool


def _shapes_and_rows():
    if PARTS == 1:
        return SHAPES, ROWS
    rng = random.Random(1)
    more = [
        (rng.choice(PRIMES), rng.choice(PRIMES[:100])) for _ in range(3 * len(SHAPES))
    ]
    return SHAPES + more, ROWS + MORE_ROWS


@functools.cache
def signatures(part: int) -> st.SearchStrategy[Signature]:
    """A part's: in all one for every six cases of a test."""
    every = [
        Signature(*values)
        for values in itertools.product(
            *_shapes_and_rows(), op_cases.HALVES, FLOATS, (False, True)
        )
    ]
    random.Random(0).shuffle(every)
    return st.sampled_from(every[: CASES // 6][part::PARTS])


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
    """x (rows, K) and a bias (M,) or None."""
    rng = np.random.default_rng(seed + 1)
    x = rng.standard_normal((call.rows, call.shape[0])).astype(jnp.dtype(call.x_dtype))
    if not call.has_bias:
        return x, None
    return x, (rng.standard_normal(call.shape[1]) * scale).astype(np.float32)


def put_specials(array: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Replaces some elements by NaN and infinities."""
    rng = np.random.default_rng(seed + 2)
    array = array.copy()
    if array.size:
        places = rng.integers(0, array.size, count)
        array.reshape(-1)[places] = rng.choice(SPECIALS, count).astype(array.dtype)
    return array


def packed(dense: np.ndarray) -> fj.SparseMatrix:
    """Packs a matrix, with as many segments as if it had no zeros.

    A shape then has one size of `values`, whatever the pattern, and one compilation.
    """
    w = fj.SparseMatrix.from_dense(dense)
    shapes = reference.leaf_shapes(dense.shape)
    strips, groups = shapes["bitmap"][:2]
    missing = 4 * strips * groups - len(w.values)
    values = np.pad(np.asarray(w.values), ((0, missing), (0, 0), (0, 0)))
    return dataclasses.replace(w, values=jnp.asarray(values))


def in_every_order(x: np.ndarray) -> dict[str, np.ndarray | jax.Array]:
    """The same array with other strides, and on the device."""
    wide = np.zeros((2 * x.shape[0], 3 * x.shape[1]), x.dtype)
    wide[1::2, ::3] = x
    return {
        "contiguous": x,
        "fortran": np.asfortranarray(x),
        "strided": wide[1::2, ::3],
        "reversed": x[::-1, ::-1].copy()[::-1, ::-1],
        "device": jnp.asarray(x),
    }


orders = st.sampled_from(["contiguous", "fortran", "strided", "reversed", "device"])
