"""The CPU kernel and native unpacking, through their FFI targets."""

import concurrent.futures
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashjax import _native

HALVES = (np.float16, jnp.bfloat16)
FLOATS = (*HALVES, np.float32)
SHAPES = [(1, 1), (7, 3), (64, 16), (256, 48), (257, 33), (1021, 67), (2048, 130)]
ROWS = [*range(1, 10), 17, 40]


def random_weights(k, m, sparsity, dtype, seed=0):
    rng = np.random.default_rng(seed)
    dense = rng.standard_normal((k, m)).astype(dtype)
    dense[rng.random((k, m)) < sparsity] = 0
    return dense


def random_x(n, k, dtype, seed=1):
    return np.random.default_rng(seed).standard_normal((n, k)).astype(dtype)


def pack(dense):
    return _native.cpu.pack(dense.view(np.uint16))[:3]


def weight_dtype(dense):
    return int(dense.dtype == jnp.bfloat16)


@functools.cache
def compiled(target, shape, dtype, kind):
    """One compilation for all instruction sets and patterns of a shape."""
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(shape, dtype))
    return jax.jit(functools.partial(call, weight_dtype=kind))


def matmul(x, dense, bias=None, dtype=np.float32, packed=None):
    """x @ dense + bias by the kernel."""
    bias = np.zeros(0, np.float32) if bias is None else bias
    packed = pack(dense) if packed is None else packed
    shape = (x.shape[0], dense.shape[1])
    target = "flashjax_lscd_matmul_cpu"
    call = compiled(target, shape, np.dtype(dtype), weight_dtype(dense))
    return np.asarray(call(x, *packed, bias))


def unpack(dense, dtype):
    target = "flashjax_lscd_unpack_cpu"
    call = compiled(target, dense.shape, np.dtype(dtype), weight_dtype(dense))
    return np.asarray(call(*pack(dense)))


def check(y, x, dense, bias=None):
    """The error must be that of a float32 sum: relative to the sum of magnitudes."""
    x, dense = x.astype(np.float64), dense.astype(np.float64)
    wanted, size = x @ dense, np.abs(x) @ np.abs(dense)
    if bias is not None:
        wanted, size = wanted + bias, size + np.abs(bias)
    epsilon = 2.0**-24 * (4 + x.shape[1] / 16)
    if y.dtype != np.float32:
        epsilon = epsilon + float(jnp.finfo(y.dtype).eps) / 2
    error = np.abs(y.astype(np.float64) - wanted)
    assert np.all(error <= epsilon * size + 1e-7), (error / size).max()


@pytest.mark.parametrize("dtype", HALVES, ids=("float16", "bfloat16"))
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_matmul_shapes(simd, shape, sparsity, dtype):
    dense = random_weights(*shape, sparsity, dtype)
    packed = pack(dense)
    bias = random_x(1, shape[1], np.float32)[0]
    for n in (1, 3, 8):
        x = random_x(n, shape[0], np.float32)
        check(matmul(x, dense, bias, packed=packed), x, dense, bias)


@pytest.mark.parametrize("n", ROWS)
def test_matmul_rows(simd, n):
    """A row's result does not depend on the rows beside it."""
    dense = random_weights(700, 100, 0.7, np.float16)
    packed = pack(dense)
    x = random_x(n, 700, np.float32)
    y = matmul(x, dense, packed=packed)
    check(y, x, dense)
    one_by_one = [matmul(x[i : i + 1], dense, packed=packed) for i in range(n)]
    np.testing.assert_array_equal(y, np.concatenate(one_by_one))


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("y_dtype", FLOATS)
@pytest.mark.parametrize("w_dtype", HALVES)
def test_matmul_dtypes(simd, w_dtype, x_dtype, y_dtype):
    dense = random_weights(300, 70, 0.6, w_dtype)
    x = random_x(5, 300, x_dtype)
    y = matmul(x, dense, dtype=y_dtype)
    check(y, x, dense)
    rounded = matmul(x.astype(np.float32), dense).astype(y_dtype)
    assert y.tobytes() == rounded.tobytes()


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
def test_matmul_empty_weights(simd, shape):
    dense = np.zeros(shape, np.float16)
    bias = np.arange(shape[1], dtype=np.float32)
    y = matmul(np.ones((3, shape[0]), np.float32), dense, bias)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, (3, shape[1])))


def test_matmul_no_rows(simd):
    dense = random_weights(100, 20, 0.5, np.float16)
    assert matmul(np.zeros((0, 100), np.float32), dense).shape == (0, 20)


@pytest.mark.parametrize("pattern", ["row", "column", "steps", "strips"])
@pytest.mark.parametrize("dtype", HALVES)
def test_matmul_patterns(simd, pattern, dtype):
    k, m = 2500, 150
    dense = random_weights(k, m, 0.0, dtype)
    rows, columns = np.arange(k)[:, None], np.arange(m)[None, :]
    keep = {
        "row": rows == 1000,
        "column": columns == 70,
        "steps": rows // 64 % 2 == 0,
        "strips": (columns // 16 + rows // 256) % 2 == 0,
    }[pattern]
    dense = np.where(keep, dense, np.zeros((), dtype))
    x = random_x(4, k, np.float32)
    check(matmul(x, dense), x, dense)


@pytest.mark.parametrize("special", [np.inf, -np.inf, np.nan])
def test_matmul_nonfinite_x_meets_the_zeros(simd, special):
    """Infinity times a zero is NaN, stored or not, as in a dense product."""
    dense = random_weights(200, 40, 0.8, np.float16)
    x = random_x(3, 200, np.float32)
    x[1, 77] = special
    y = matmul(x, dense)
    with np.errstate(invalid="ignore"):
        wanted = x @ dense.astype(np.float32)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(wanted))
    np.testing.assert_array_equal(np.isinf(y), np.isinf(wanted))
    assert np.isfinite(y[[0, 2]]).all()


def test_matmul_nonfinite_beyond_k_does_not_leak(simd):
    """Padding in K multiplies zeros, whatever stands behind x in memory."""
    dense = random_weights(65, 20, 0.5, np.float16)
    x = np.full((2, 65), 1.0, np.float16)
    assert np.isfinite(matmul(x, dense)).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_matmul_nonfinite_weights(simd, dtype):
    dense = random_weights(200, 40, 0.8, dtype)
    dense[10, 3], dense[11, 20], dense[12, 39] = np.inf, -np.inf, np.nan
    y = matmul(np.ones((2, 200), np.float32), dense)
    assert np.all(y[:, 3] == np.inf)
    assert np.all(y[:, 20] == -np.inf)
    assert np.all(np.isnan(y[:, 39]))
    assert np.isfinite(y).sum() == y.size - 6


def test_matmul_every_float16(simd):
    """Subnormal halves count, and every result rounds as NumPy's does."""
    bits = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    bits = bits[np.isfinite(bits)]
    dense = np.zeros((1, bits.size), np.float16)
    dense[0] = bits
    x = np.array([[1.0], [3.0e-5], [1.0009766]], np.float32)
    y = matmul(x, dense)
    exact = x * bits.astype(np.float32)
    tiny = np.abs(exact) < np.finfo(np.float32).tiny
    np.testing.assert_array_equal(np.where(tiny, 0, y), np.where(tiny, 0, exact))
    with np.errstate(over="ignore"):
        for dtype in HALVES:
            rounded = matmul(x, dense, dtype=dtype)
            wanted = y.astype(dtype)
            np.testing.assert_array_equal(rounded, wanted)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), *SHAPES])
def test_unpack(simd, shape, dtype):
    dense = random_weights(*shape, 0.6, dtype)
    same = unpack(dense, dtype)
    assert same.tobytes() == dense.tobytes()
    np.testing.assert_array_equal(unpack(dense, np.float32), dense.astype(np.float32))


def test_repeated_calls_give_the_same_bytes(simd):
    dense = random_weights(3000, 700, 0.7, np.float16)
    packed, x = pack(dense), random_x(6, 3000, np.float32)
    first = matmul(x, dense, packed=packed).tobytes()
    for _ in range(5):
        assert matmul(x, dense, packed=packed).tobytes() == first


_ONE_THREAD = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import numpy as np, jax, flashjax._native
a = np.load(sys.argv[1])
packed = a["bitmap"], a["entries"], a["values"]
result = jax.ShapeDtypeStruct((len(a["x"]), int(a["m"])), np.float32)
call = jax.ffi.ffi_call("flashjax_lscd_matmul_cpu", result)
y = call(a["x"], *packed, np.zeros(0, np.float32), weight_dtype=0)
np.save(sys.argv[2], y)
"""


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="needs Linux to limit the threads"
)
def test_threads_give_the_same_bytes(tmp_path):
    """XLA's pool with one thread and with as many as the machine has cores."""
    dense = random_weights(3000, 700, 0.7, np.float16)
    bitmap, entries, values = pack(dense)
    x = random_x(6, 3000, np.float32)
    given, made = tmp_path / "given.npz", tmp_path / "made.npy"
    np.savez(given, bitmap=bitmap, entries=entries, values=values, x=x, m=700)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", _ONE_THREAD, str(given), str(made)]
    subprocess.run(command, check=True, env=environment)
    assert np.load(made).tobytes() == matmul(x, dense).tobytes()


def test_many_calls_at_once_finish():
    """More calls than XLA's pool has threads, without a deadlock."""
    dense = random_weights(2048, 512, 0.7, np.float16)
    packed = [
        [jax.device_put(a, device) for a in pack(dense)] for device in jax.devices()
    ]
    x = random_x(4, 2048, np.float32)
    wanted = matmul(x, dense)

    def run(i):
        return matmul(x, dense, packed=packed[i % len(packed)])

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        for y in threads.map(run, range(64), timeout=120):
            np.testing.assert_array_equal(y, wanted)


def _call(name, result, *args, **attributes):
    shape, dtype = result
    call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(shape, dtype))
    return jax.block_until_ready(call(*args, **attributes))


def _bad_calls():
    dense = random_weights(300, 40, 0.5, np.float16)
    b, e, v = pack(dense)
    x, none = np.ones((2, 300), np.float32), np.zeros(0, np.float32)
    y = ((2, 40), np.float32)
    return {
        "x: expected dtype float16 or bfloat16 or float32, got int32": (
            y,
            (x.astype(np.int32), b, e, v, none),
            0,
        ),
        r"x: expected shape \(any, any\), got \(300\)": (y, (x[0], b, e, v, none), 0),
        r"result: expected shape \(2, any\), got \(3, 40\)": (
            ((3, 40), np.float32),
            (x, b, e, v, none),
            0,
        ),
        "result: expected dtype .*, got int32": (
            ((2, 40), np.int32),
            (x, b, e, v, none),
            0,
        ),
        r"bitmap: expected shape \(3, 1, 32, 4\), got \(3, 2, 32, 4\)": (
            y,
            (x[:, :200], b, e, v, none),
            0,
        ),
        "bitmap: expected dtype uint32, got int32": (
            y,
            (x, b.view(np.int32), e, v, none),
            0,
        ),
        r"entries: expected shape \(3, 1, 18\), got \(2, 1, 18\)": (
            y,
            (x, b, e[:2], v, none),
            0,
        ),
        r"values: expected shape \(any, 16, 32\)": (y, (x, b, e, v[:, :8], none), 0),
        r"bias: expected shape \(40\), got \(39\)": (
            y,
            (x, b, e, v, np.zeros(39, np.float32)),
            0,
        ),
        "bias: expected dtype float32, got float16": (
            y,
            (x, b, e, v, none.astype(np.float16)),
            0,
        ),
        r"weight_dtype: expected 0 \(float16\) or 1 \(bfloat16\), got 2": (
            y,
            (x, b, e, v, none),
            2,
        ),
    }


@pytest.mark.parametrize("message", _bad_calls())
def test_matmul_refuses(message):
    result, args, kind = _bad_calls()[message]
    with pytest.raises(
        jax.errors.JaxRuntimeError, match="flashjax_lscd_matmul_cpu: " + message
    ):
        _call("flashjax_lscd_matmul_cpu", result, *args, weight_dtype=kind)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (((300, 41), np.float32), None),
        (((300, 49), np.float32), r"bitmap: expected shape \(4, 2, 32, 4\)"),
        (((300,), np.float32), r"result: expected shape \(any, any\), got \(300\)"),
        (
            ((300, 40), jnp.bfloat16),
            "result: expected dtype float16 or float32, got bfloat16",
        ),
    ],
)
def test_unpack_refuses(result, message):
    packed = pack(random_weights(300, 40, 0.5, np.float16))
    target = "flashjax_lscd_unpack_cpu"
    if message is None:  # within the same strips: more columns are zeros
        _call(target, result, *packed, weight_dtype=0)
        return
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"{target}: {message}"):
        _call(target, result, *packed, weight_dtype=0)
