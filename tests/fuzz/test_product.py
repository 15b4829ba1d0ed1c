"""The product under many patterns, shapes, dtypes and memory orders.

`pytest tests/fuzz` has about a thousand cases, with `--hypothesis-profile=nightly` a
hundred thousand; `-m gpu --hypothesis-profile=gpu` has ten thousand on a GPU, in parts
for as many processes as there are cores (`-n auto`).
"""

import functools

import jax
import numpy as np
import op_cases
import pytest
from fuzz import cases
from hypothesis import strategies as st

import flashjax as fj

scales = st.sampled_from(cases.SCALES)


def kernels(test):
    """For each implementation, in parts."""
    return pytest.mark.parametrize("kernel", op_cases.KERNELS)(cases.in_parts(test))


def multiply(kernel, x, w, bias=None):
    implementation, platform = kernel
    with op_cases.on_platform(platform):
        return fj.sparse_matmul(x, w, bias=bias, implementation=implementation)


@kernels
def test_product(kernel, part):
    @cases.of_a_part
    @cases.given(
        cases.signatures(part), cases.patterns, scales, cases.orders, cases.seeds
    )
    def check(call, pattern, scale, order, seed):
        dense = cases.matrix(pattern, call.shape, call.w_dtype, scale, seed)
        x, bias = cases.operands(call, scale, seed)
        y = multiply(kernel, cases.in_every_order(x)[order], cases.packed(dense), bias)
        op_cases.check_product(y, x, dense, bias)

    check()


@kernels
def test_nan_and_infinity(kernel, part):
    """Each meets the zeros of the other operand as in a dense product."""

    @cases.of_a_part
    @cases.given(cases.signatures(part), cases.patterns, st.integers(0, 3), cases.seeds)
    def check(call, pattern, count, seed):
        dense = cases.matrix(pattern, call.shape, call.w_dtype, 1.0, seed)
        x, bias = cases.operands(call, 1.0, seed)
        dense = cases.put_specials(dense, count, seed)
        x = cases.put_specials(x, 3 - count, seed + 1)
        y = np.asarray(multiply(kernel, x, cases.packed(dense), bias))
        with np.errstate(invalid="ignore"):
            wanted = x.astype(np.float32) @ dense.astype(np.float32)
        for test in (np.isnan, np.isposinf, np.isneginf):
            np.testing.assert_array_equal(test(y), test(wanted))

    check()


@kernels
def test_calls_under_way(kernel, part):
    """Several at once, one after the other and back: none sees what another left."""
    calls = st.tuples(cases.signatures(part), cases.patterns, cases.seeds)

    @cases.of_a_part
    @cases.given(st.lists(calls, min_size=2, max_size=4))
    def check(stream):
        denses, operands = [], []
        for call, pattern, seed in stream:
            denses.append(cases.matrix(pattern, call.shape, call.w_dtype, 1.0, seed))
            x, bias = cases.operands(call, 1.0, seed)
            w = cases.packed(denses[-1])
            operands.append((cases.in_every_order(x)["device"], w, bias))
        there = [multiply(kernel, *o) for o in operands]
        back = [multiply(kernel, *o) for o in reversed(operands)]
        for y, again, dense, (x, _, bias) in zip(
            there, reversed(back), denses, operands, strict=True
        ):
            assert np.asarray(y).tobytes() == np.asarray(again).tobytes()
            op_cases.check_product(y, x, dense, bias)

    check()


@functools.partial(jax.jit, static_argnums=0)
def _cotangent(implementation, x, w, dy):
    def product(x):
        return fj.sparse_matmul(x, w, implementation=implementation)

    return jax.vjp(product, x)[1](dy)[0]


@kernels
def test_cotangent(kernel, part):
    implementation, platform = kernel

    @cases.of_a_part
    @cases.given(cases.signatures(part), cases.patterns, scales, cases.seeds)
    def check(call, pattern, scale, seed):
        dense = cases.matrix(pattern, call.shape, call.w_dtype, scale, seed)
        x, _ = cases.operands(call, scale, seed)
        dtype = call.w_dtype if call.x_dtype == call.w_dtype else "float32"
        dy = op_cases.random_x((call.rows, call.shape[1]), dtype, seed)
        with op_cases.on_platform(platform):
            dx = _cotangent(implementation, x, cases.packed(dense), dy)
        assert dx.dtype == x.dtype
        op_cases.check_product(dx, dy, dense.T)

    check()


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _in_place(implementation, x, w):
    return fj.sparse_matmul(x, w, implementation=implementation)


@kernels
def test_donated_and_reused_buffers(kernel, part):
    """x gives its memory to y, over and over; the weights stay as they are."""
    implementation, platform = kernel
    sizes = st.sampled_from([1, 16, 97, 256])

    @cases.of_a_part
    @cases.given(sizes, st.sampled_from([1, 8, 9]), cases.patterns, cases.seeds)
    def check(size, rows, pattern, seed):
        dense = cases.matrix(pattern, (size, size), "float16", size**-0.5, seed)
        w = cases.packed(dense)
        x = op_cases.random_x((rows, size), "float16", seed)
        expected, y = x, jax.numpy.array(x)
        for _ in range(3):
            expected = np.asarray(multiply(kernel, expected, w))
            with op_cases.on_platform(platform):
                given_away, y = y, _in_place(implementation, y, w)
            assert given_away.is_deleted()
            assert np.asarray(y).tobytes() == expected.tobytes()
        op_cases.check_product(multiply(kernel, x, w), x, dense)

    check()
