"""The product under many patterns, shapes, dtypes and memory orders.

`pytest tests/fuzz` has more than a thousand cases, with `--hypothesis-profile=nightly`
a hundred thousand; `-m gpu --hypothesis-profile=gpu` has more than ten thousand on a
GPU, in parts for as many processes as there are cores (`-n auto`).
"""

import dataclasses
import functools

import jax
import numpy as np
import op_cases
import pytest
from fuzz import cases
from hypothesis import strategies as st

import flashjax as fj

scales = st.sampled_from(cases.SCALES)
mostly_padded = st.sampled_from([False] * 7 + [True])


def kernels(test):
    """For each implementation, in parts."""
    return pytest.mark.parametrize("kernel", op_cases.KERNELS)(cases.in_parts(test))


def multiply(kernel, x, w, **options):
    implementation, platform = kernel
    with op_cases.on_platform(platform):
        return fj.sparse_matmul(x, w, implementation=implementation, **options)


def test_the_calls():
    """Every shape and number of rows is there, and most calls reach the kernels."""
    every = cases.every_signature()
    shapes, rows = cases._shapes_and_rows()
    some = [call for call in every if not call.is_empty]
    assert {c.shape for c in some} == {shape for shape in shapes if 0 not in shape}
    assert {c.rows for c in some} == {n for n in rows if n}
    assert any(0 in c.shape for c in every)
    assert any(c.rows == 0 for c in every)
    assert sum(c.reaches_kernel for c in every) > 0.55 * len(every)
    assert {len(c.lead) for c in some} >= {1, 2, 3}
    assert {c.activation for c in some} == {None, "relu"}
    assert {c.is_stacked for c in some} == {False, True}


@kernels
def test_product(kernel, part):
    @cases.of_a_part
    @cases.given(
        cases.signatures(part),
        cases.patterns,
        scales,
        cases.orders,
        mostly_padded,
        cases.seeds,
    )
    def check(call, pattern, scale, order, is_exact, seed):
        dense = cases.matrix(pattern, call.shape, call.w_dtype, scale, seed)
        x, bias = cases.operands(call, scale, seed)
        w = cases.packed_for(call, dense, is_exact)
        y = multiply(kernel, cases.in_every_order(x)[order], w, **call.options(bias))
        op_cases.check_product(y, x, dense, bias, call.activation)

    check()


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _product_of_view(implementation, view, call, array, w, bias):
    x = cases.VIEWS[view][0](array)
    options = call.options(bias)
    return fj.sparse_matmul(x, w, implementation=implementation, **options)


@kernels
def test_view_inside_a_program(kernel, part):
    implementation, platform = kernel

    @cases.of_a_part
    @cases.given(cases.signatures(part), cases.patterns, cases.views, cases.seeds)
    def check(call, pattern, view, seed):
        dense = cases.matrix(pattern, call.shape, call.w_dtype, 1.0, seed)
        x, bias = cases.operands(call, 1.0, seed)
        w = cases.packed_for(call, dense, is_exact=False)
        array = np.ascontiguousarray(cases.VIEWS[view][1](x))
        with op_cases.on_platform(platform):
            y = _product_of_view(implementation, view, call, array, w, bias)
        op_cases.check_product(y, x, dense, bias, call.activation)

    check()


@pytest.mark.gpu
@cases.in_parts
@pytest.mark.parametrize("name", ["mma", "wgmma"])
def test_kernel_by_name(name, part):
    """Whichever the launcher would choose."""
    op_cases.skip_without(name)

    @cases.of_a_part
    @cases.given(cases.signatures(part), cases.patterns, mostly_padded, cases.seeds)
    def check(call, pattern, is_exact, seed):
        call = dataclasses.replace(call, x_dtype=call.w_dtype)
        dense = cases.matrix(pattern, call.shape, call.w_dtype, 1.0, seed)
        x, bias = cases.operands(call, 1.0, seed)
        w = cases.packed(dense, is_exact)
        y = op_cases.kernel_product(name, x, w, bias)
        op_cases.check_product(y, x, dense, bias)

    check()


@pytest.mark.parametrize("layout", ["close", "gather"])
@kernels
def test_packed_for_few_tokens(kernel, part, layout):
    """The values; and that what is not finite in x reaches where its weights are."""
    # The last is more than the gather kernel takes. No CPU has one: there it is slow.
    rows = st.sampled_from([1, 3, 8, 9])
    often = cases.of_a_part if kernel[1] == "gpu" or layout == "close" else cases.few

    @often
    @cases.given(
        cases.signatures(part), rows, cases.patterns, st.integers(0, 2), cases.seeds
    )
    def check(call, rows, pattern, specials, seed):
        lead, dtype = (rows,), call.w_dtype
        call = dataclasses.replace(call, lead=lead, x_dtype=dtype, is_stacked=False)
        dense = cases.matrix(pattern, call.shape, dtype, 1.0, seed)
        x, bias = cases.operands(call, 1.0, seed)
        w = cases.packed_for_few_tokens(dense, layout)
        y = multiply(kernel, x, w, **call.options(bias))
        op_cases.check_product(y, x, dense, bias, call.activation)
        x = cases.put_specials(x, specials, seed)
        call = dataclasses.replace(call, activation=None)
        got = ~np.isfinite(np.asarray(multiply(kernel, x, w, **call.options(bias))))
        wrong = ~np.isfinite(x)
        least = wrong.astype(np.float32) @ (dense != 0).astype(np.float32) > 0
        most = wrong.any(axis=-1, keepdims=True)
        assert np.all(got >= least)
        assert np.all(got <= most)

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
        w = cases.packed_for(call, dense, is_exact=False)
        y = np.asarray(multiply(kernel, x, w, **call.options(bias)))
        with np.errstate(invalid="ignore"):
            wanted = x.astype(np.float32) @ dense.astype(np.float32)
        if call.activation == "relu":
            wanted = np.maximum(wanted, 0)
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
            w = cases.packed_for(call, denses[-1], is_exact=False)
            operands.append((cases.in_every_order(x)["device"], w, call.options(bias)))
        there = [multiply(kernel, x, w, **more) for x, w, more in operands]
        back = [multiply(kernel, x, w, **more) for x, w, more in reversed(operands)]
        for y, again, dense, (x, _, more) in zip(
            there, reversed(back), denses, operands, strict=True
        ):
            assert np.asarray(y).tobytes() == np.asarray(again).tobytes()
            op_cases.check_product(y, x, dense, more["bias"], more["activation"])

    check()


@functools.partial(jax.jit, static_argnums=0)
def _cotangent(implementation, x, w, dy):
    def product(x):
        return fj.sparse_matmul(x, w, implementation=implementation)

    return jax.vjp(product, x)[1](dy)[0]


@kernels
def test_cotangent(kernel, part):
    """From the matrix or, by a kernel, from its transpose if that is packed, too."""
    implementation, platform = kernel

    @cases.of_a_part
    @cases.given(
        cases.signatures(part), cases.patterns, scales, st.booleans(), cases.seeds
    )
    def check(call, pattern, scale, with_transpose, seed):
        dense = cases.matrix(pattern, call.shape, call.w_dtype, scale, seed)
        x, _ = cases.operands(call, scale, seed)
        dtype = call.w_dtype if call.x_dtype == call.w_dtype else "float32"
        dy = op_cases.random_x((*call.lead, call.shape[1]), dtype, seed)
        w = cases.packed(dense)
        if with_transpose:
            w = dataclasses.replace(w, transposed=cases.packed(dense.T))
        with op_cases.on_platform(platform):
            dx = _cotangent(implementation, x, w, dy)
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
    dtypes = st.sampled_from(op_cases.HALVES)

    @cases.of_a_part
    @cases.given(
        sizes, st.sampled_from([1, 8, 9, 65]), dtypes, cases.patterns, cases.seeds
    )
    def check(size, rows, dtype, pattern, seed):
        dense = cases.matrix(pattern, (size, size), dtype, size**-0.5, seed)
        w = cases.packed(dense)
        x = op_cases.random_x((rows, size), dtype, seed)
        expected, y = x, jax.numpy.array(x)
        for _ in range(3):
            expected = np.asarray(multiply(kernel, expected, w))
            with op_cases.on_platform(platform):
                given_away, y = y, _in_place(implementation, y, w)
            assert given_away.is_deleted()
            assert np.asarray(y).tobytes() == expected.tobytes()
        op_cases.check_product(multiply(kernel, x, w), x, dense)

    check()
