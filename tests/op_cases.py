"""Matrices, implementations and error bounds shared by the CPU and the GPU suites."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import flashjax as fj
from flashjax import gather, layouts, matmul_impl

HALVES = ("float16", "bfloat16")

# (implementation, platform); the same test bodies run for each.
KERNELS = [
    pytest.param(("cpu", "cpu"), id="cpu"),
    pytest.param(("cuda", "gpu"), id="cuda", marks=pytest.mark.gpu),
]
PLAIN = [
    pytest.param(("xla", "cpu"), id="xla"),
    pytest.param(("xla", "gpu"), id="xla-gpu", marks=pytest.mark.gpu),
]
IMPLEMENTATIONS = [*KERNELS, *PLAIN]
DEFAULTS = [
    pytest.param((None, "cpu"), id="cpu"),
    pytest.param((None, "gpu"), id="gpu", marks=pytest.mark.gpu),
]

# (K, M): ones, primes, less and more than a tile, several chains of strips.
SHAPES = [
    (1, 1),
    (1, 40),
    (13, 7),
    (64, 16),
    (257, 33),
    (300, 131),
    (1031, 97),
    (2048, 1040),
]

ROWS = [0, 1, 2, 3, 7, 8, 16, 17, 33, 64, 100, 128, 129, 257]

every_implementation = pytest.mark.parametrize(
    "product", IMPLEMENTATIONS, indirect=True
)


def for_each(name: str, kernels: list, plain: list):
    """Parametrizes a test by an implementation and a value of `name`.

    Plain JAX takes longer to compile and has fewer cases of its own: it gets fewer.
    """
    params = [
        pytest.param(*i.values, value, marks=i.marks, id=f"{value}-{i.id}")
        for implementations, values in ((KERNELS, kernels), (PLAIN, plain))
        for value in values
        for i in implementations
    ]
    return pytest.mark.parametrize(("product", name), params, indirect=["product"])


def on_platform(platform: str):
    """Makes a device of the platform the default one."""
    if platform == "cpu":
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    return contextlib.nullcontext()


def unreadable(w, x, leaf):
    """A gradient with respect to w, and w with the array `leaf` donated."""

    def loss(w):
        return jnp.sum(fj.sparse_matmul(x, w), dtype=jnp.float32)

    donated = jax.tree.map(jnp.copy, w)
    getattr(donated, leaf).delete()
    return jax.grad(loss, allow_int=True)(w), donated


@contextlib.contextmanager
def multiplying(implementation: str | None, platform: str):
    """sparse_matmul with an implementation, on the platform that it runs on."""
    with on_platform(platform):
        yield functools.partial(fj.sparse_matmul, implementation=implementation)


def random_dense(k: int, m: int, sparsity: float, dtype: str, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    dense = rng.standard_normal((k, m), np.float32)
    # No zeros but those that are asked for.
    dense = np.copysign(np.maximum(np.abs(dense), 1e-3), dense)
    dense[rng.random((k, m)) < sparsity] = 0
    return dense.astype(jnp.dtype(dtype))


def _zero_tile_next_to_dense(k, row, column):
    return (row // 64 + column // 16) % 2 == 0


def _one_dense_input(k, row, column):
    return row == k // 2


def _one_dense_output(k, row, column):
    return column == 5


def _banded(k, row, column):
    return abs(row - 2 * column) < 9


def _alternating(k, row, column):
    return (row + column) % 2 == 0


def _alternating_pairs(k, row, column):
    return (row // 2 + column) % 2 == 0


def _one_lane(k, row, column):
    # All that the fragments of one lane of a warp hold: the most uneven streams.
    return (column % 8 == 3) & (row % 8 < 2)


def _dense_then_empty(k, row, column):
    return row < k // 3


def _corners(k, row, column):
    return ((row == 0) | (row == k - 1)) & ((column == 0) | (column == column.max()))


PATTERNS = {
    function.__name__[1:]: function
    for function in (
        _zero_tile_next_to_dense,
        _one_dense_input,
        _one_dense_output,
        _banded,
        _alternating,
        _alternating_pairs,
        _one_lane,
        _dense_then_empty,
        _corners,
    )
}


def pattern_dense(name: str, k: int, m: int, dtype: str) -> np.ndarray:
    dense = random_dense(k, m, 0.0, dtype)
    keep = PATTERNS[name](k, np.arange(k)[:, None], np.arange(m)[None])
    return np.where(keep, dense, np.zeros_like(dense))


@st.composite
def masks(draw):
    """What is not zero in a (K, M) matrix; the density of rows and columns differs."""
    k, m = draw(st.integers(0, 300)), draw(st.integers(0, 70))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    power = draw(st.sampled_from([0.0, 0.3, 1.0, 8.0]))
    density = rng.random((k, 1)) ** power * rng.random((1, m)) ** power
    return rng.random((k, m)) < density


def random_x(shape: tuple[int, ...], dtype: str, seed=1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnames=("dtype", "activation"))
def _dense_half_product(x, dense, bias, dtype, activation):
    y = jnp.dot(x.astype(dtype), dense, preferred_element_type=dtype)
    y = y if bias is None else y + bias.astype(dtype)[None]
    return jax.nn.relu(y) if activation == "relu" else y


def check_product(y, x, dense, bias=None, activation=None):
    """Compares with float64, by the rounding of y and float32 accumulation.

    And by the project's measure: the largest error is at most twice that of the dense
    product in half precision on the same device (unless y is of the other half type).
    """
    got = np.asarray(y).astype(np.float64)
    x64, w64 = np.asarray(x).astype(np.float64), dense.astype(np.float64)
    expected = x64 @ w64
    magnitude = np.abs(x64) @ np.abs(w64)
    if bias is not None:
        bias64 = np.asarray(bias).astype(np.float64)
        expected, magnitude = expected + bias64, magnitude + np.abs(bias64)
    if activation == "relu":
        expected = np.maximum(expected, 0)
    assert got.shape == expected.shape
    error = np.abs(got - expected)
    info = jnp.finfo(y.dtype)
    accumulation = 4 * (dense.shape[0] + 2) * 2.0**-24 * magnitude
    rounding = 0.5 * float(info.eps) * (np.abs(expected) + accumulation)
    np.testing.assert_array_less(
        error, accumulation + rounding + float(info.smallest_subnormal)
    )
    if not expected.size or not dense.size or y.dtype not in (dense.dtype, np.float32):
        return
    rows = x.reshape(-1, dense.shape[0])
    half = _dense_half_product(rows, dense, bias, jnp.dtype(dense.dtype), activation)
    half_error = np.abs(np.asarray(half).reshape(got.shape) - expected).max()
    assert error.max() <= 2 * half_error + float(jnp.finfo(jnp.float32).eps)


def kernel_product(kernel, x, w, bias=None):
    """The product by one of the CUDA kernels of the default layout, by name."""
    x_dtype = np.dtype(x.dtype)
    call = matmul_impl.Call(
        shape=w.shape,
        dtype=w.dtype,
        x_dtype=x_dtype,
        bias_dtype=None if bias is None else np.dtype(bias.dtype),
        out_dtype=x_dtype,
        implementation="cuda",
    )
    operands = matmul_impl.Operands(jnp.asarray(x), bias, w.packed, None)
    return _kernel_product(kernel, call, operands)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _kernel_product(kernel, call, operands):
    return matmul_impl._cuda(call, operands, kernel=kernel)


def skip_without(kernel):
    """Skips a test of a CUDA kernel where the GPU is none for it."""
    capability = float(jax.devices()[0].compute_capability)
    if kernel != "mma" and int(capability) != 9:
        pytest.skip(f"the wgmma kernel needs a Hopper GPU, this one is sm {capability}")


def packed_and_x(shape, sparsity, rows, dtype, seed=0):
    """A dense matrix, the same packed, and x (rows, K)."""
    dense = random_dense(*shape, sparsity, dtype, seed)
    return dense, fj.SparseMatrix.from_dense(dense), random_x((rows, shape[0]), dtype)


def gather_matrix(dense: np.ndarray) -> fj.SparseMatrix:
    """Packed whether or not it is worth while here."""
    return packed_matrix(gather.pack(dense), dense, layouts.GATHER)


def packed_matrix(leaves, dense: np.ndarray, layout: str) -> fj.SparseMatrix:
    """What a packer has made of a matrix."""
    leaves = jax.device_put(leaves)
    return fj.SparseMatrix(*leaves, shape=dense.shape, dtype=dense.dtype, layout=layout)
