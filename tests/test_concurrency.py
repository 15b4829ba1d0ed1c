"""Programs side by side, and very many calls."""

import concurrent.futures
import functools
import gc
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import pytest

import flashjax as fj


def program(shape, seed, device):
    """A jitted program of its own, its operands on a device, and what it gives."""
    dense, w, x = op_cases.packed_and_x(shape, 0.7, 5, "float16", seed)

    @jax.jit
    def run(x, w):
        y, pull = jax.vjp(functools.partial(fj.sparse_matmul, w=w), x)
        return y, pull(y)[0], w.to_dense()[seed]

    operands = jax.device_put((x, w), device)
    results = jax.tree.map(np.asarray, run(*operands))
    op_cases.check_product(results[0], x, dense)
    return run, operands, results


# The same on the CPU and, with -m gpu, on GPUs: on JAX's default devices.
everywhere = pytest.mark.parametrize(
    "platform", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)]
)


@everywhere
@pytest.mark.parametrize("devices", [1, 2])
def test_two_programs_in_two_threads(devices, platform):
    if len(jax.devices()) < devices:
        pytest.skip(f"needs {devices} GPUs, found {len(jax.devices())}")
    programs = [
        program((700, 130), 1, jax.devices()[0]),
        program((513, 257), 2, jax.devices()[devices - 1]),
    ]

    def repeat(index):
        run, operands, expected = programs[index]
        for _ in range(100):
            for got, wanted in zip(run(*operands), expected, strict=True):
                np.testing.assert_array_equal(got, wanted)

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        list(threads.map(repeat, [0, 1, 0, 1], timeout=300))


@everywhere
def test_packing_in_many_threads(platform):
    matrices = [op_cases.random_dense(600, 90, 0.6, "bfloat16", i) for i in range(4)]

    def round_trip(i):
        w = fj.SparseMatrix.from_dense(matrices[i % 4], threads=2)
        np.testing.assert_array_equal(np.asarray(w.to_dense()), matrices[i % 4])

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        list(threads.map(round_trip, range(40), timeout=300))


def bytes_in_use() -> tuple[int, int]:
    """Of the host, and of the device where JAX counts them."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    on_device = (jax.devices()[0].memory_stats() or {}).get("bytes_in_use", 0)
    return pages * os.sysconf("SC_PAGE_SIZE"), on_device


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@everywhere
@pytest.mark.parametrize(
    "calls", [10_000, pytest.param(100_000, marks=pytest.mark.nightly)]
)
def test_memory_stays_flat(calls, platform):
    _, w, x = op_cases.packed_and_x((256, 256), 0.7, 4, "float16")
    x = jnp.asarray(x) / 16
    step = jax.jit(fj.sparse_matmul)
    first = np.asarray(step(x, w))

    def soak(count):
        for i in range(count):
            y = step(x, w)
            if i % 100 == 0:  # also what a program does now and then
                fj.sparse_matmul(y, w).block_until_ready()
                w.to_dense().block_until_ready()
                fj.SparseMatrix.from_dense(np.asarray(y))
        np.testing.assert_array_equal(y, first)

    soak(calls // 5)
    before = bytes_in_use()
    soak(calls)
    host, device = np.subtract(bytes_in_use(), before)
    # A kilobyte a call would be ten times as much.
    assert host < calls * 100 + (4 << 20)
    assert device <= 0
