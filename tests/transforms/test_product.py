"""The product under the transformations of JAX."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import pytest
from op_cases import check_product, every_implementation, for_each

import flashjax as fj


@every_implementation
def test_jit_takes_the_matrix_as_an_argument(product, small):
    dense, w, x = small
    traces = []

    @jax.jit
    def f(x, w):
        traces.append(None)
        return product(x, w)

    check_product(f(x, w), x, dense)
    f(x + x, w)
    assert len(traces) == 1


@for_each(
    "dtypes",
    [
        ("float16", None),
        ("float16", "float16"),
        ("bfloat16", "float32"),
        ("float32", "bfloat16"),
        ("float32", "float32"),
    ],
    [("float16", "float32"), ("float32", None)],
)
def test_gradient(product, small, dtypes):
    dense, w, x = small
    x_dtype, bias_dtype = dtypes
    x = jnp.asarray(x).astype(x_dtype)
    bias = None if bias_dtype is None else jnp.linspace(-1, 1, 33, dtype=bias_dtype)
    weights = op_cases.random_x((4, 5, 33), "float32", seed=7)

    def loss(x, bias, f):
        y = f(x, bias).astype(jnp.float32)
        return jnp.sum(y * weights)

    def dense_product(x, bias):
        y = jnp.dot(
            x.astype(jnp.float32), dense.astype(jnp.float32), precision="highest"
        )
        return y if bias is None else y + bias.astype(jnp.float32)[None, None]

    gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    got = gradient(x, bias, lambda x, b: product(x, w, bias=b))
    expected = gradient(x, bias, dense_product)
    # dy is rounded to the dtype of y.
    tolerance = 1e-5 if x_dtype == "float32" else 1e-2
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=10 * tolerance)


@every_implementation
def test_gradient_inside_jit_remat_and_vmap(product, small):
    dense, w, x = small
    x = jnp.asarray(x, jnp.float32)
    w32 = dense.astype(np.float32)

    def loss(x):
        return jnp.sum(jnp.sin(product(x, w)))

    expected = np.cos(np.asarray(x) @ w32) @ w32.T
    transformed = [
        jax.grad(jax.checkpoint(loss)),
        jax.vmap(jax.grad(loss)),
        jax.grad(lambda x: jnp.sum(jax.vmap(loss)(x))),
    ]
    for f in (jax.grad(loss), *map(jax.jit, transformed)):
        np.testing.assert_allclose(f(x), expected, rtol=1e-4, atol=1e-4)


@every_implementation
def test_second_derivative(product):
    dense, w, _ = op_cases.packed_and_x((6, 5), 0.5, 1, "float16")
    x = jnp.linspace(-1, 1, 6)
    w32 = dense.astype(np.float32)

    def hessian(f):
        return jax.jit(jax.jacrev(jax.grad(lambda x: jnp.sum(f(x) ** 3))))(x)

    expected = hessian(lambda x: jnp.dot(x, w32))
    got = hessian(lambda x: product(x, w))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_weights_are_not_differentiable(small):
    _, w, x = small
    with pytest.raises(TypeError, match="uint32"):
        jax.grad(lambda w: jnp.sum(fj.sparse_matmul(x, w)))(w)


def _kernel_calls(f, *args):
    """Shapes of x in the custom calls that f is lowered to."""
    text = jax.jit(f).lower(*args).as_text()
    calls = re.findall(r"custom_call @(flashjax\w+).*: \(tensor<([\dx]+)x\w+>", text)
    return [(name, tuple(map(int, shape.split("x")))) for name, shape in calls]


@every_implementation
def test_vmap_over_x(product, small):
    dense, w, x = small
    f = jax.vmap(jax.vmap(lambda x: product(x, w)), in_axes=1, out_axes=1)
    y = f(x)
    np.testing.assert_array_equal(y, product(x, w))
    check_product(y, x, dense)


def test_vmap_over_x_is_one_kernel_call(small):
    _, w, x = small
    f = jax.vmap(jax.vmap(lambda x: fj.sparse_matmul(x, w, implementation="cpu")))
    assert _kernel_calls(f, x) == [("flashjax_lscd_matmul_cpu", (20, 70))]


@every_implementation
@pytest.mark.parametrize("x_axis", [0, None])
def test_vmap_over_bias(product, small, x_axis):
    dense, w, x = small
    bias = op_cases.random_x((4, 33), "float32", seed=3)
    f = jax.vmap(lambda x, b: product(x, w, bias=b), in_axes=(x_axis, 0))
    y = f(x if x_axis == 0 else x[0], bias)
    assert y.shape == (4, 5, 33)
    for i in range(4):
        check_product(y[i], x[i if x_axis == 0 else 0], dense, bias[i])


@every_implementation
@pytest.mark.parametrize("x_axis", [0, None])
def test_vmap_over_weights(product, x_axis):
    denses = [op_cases.random_dense(40, 24, 0.5, "float16", seed=s) for s in range(3)]
    stack = _stack(denses)
    x = op_cases.random_x((3, 2, 40), "float16")
    x = x if x_axis == 0 else x[0]

    def loss(x, w):
        return jnp.sum(product(x, w, preferred_element_type="float32"))

    @jax.jit
    def f(x, stack):
        y = jax.vmap(product, in_axes=(x_axis, 0))(x, stack)
        return y, jax.vmap(jax.grad(loss), in_axes=(x_axis, 0))(x, stack)

    y, dx = f(x, stack)
    for i, dense in enumerate(denses):
        xi = x[i] if x_axis == 0 else x
        check_product(y[i], xi, dense)
        expected = np.broadcast_to(dense.astype(np.float32).sum(1), (2, 40))
        np.testing.assert_allclose(dx[i], expected, rtol=1e-3, atol=1e-2)


def _stack(denses):
    """A stack of matrices, padded to the same number of segments."""
    packed = [fj.SparseMatrix.from_dense(d) for d in denses]
    segments = max(w.values.shape[0] for w in packed)

    def pad(leaf):
        if leaf.ndim == 3 and leaf.shape[1:] == (16, 32):
            return jnp.pad(leaf, ((0, segments - leaf.shape[0]), (0, 0), (0, 0)))
        return leaf

    return jax.tree.map(lambda *a: jnp.stack([pad(b) for b in a]), *packed)


@every_implementation
def test_scan_over_layers(product):
    denses = [op_cases.random_dense(40, 40, 0.5, "float16", seed=s) for s in range(3)]
    x = op_cases.random_x((2, 40), "float32")

    def layer(x, w):
        return jnp.tanh(product(x, w)), None

    y, _ = jax.lax.scan(layer, jnp.asarray(x), _stack(denses))
    for dense in denses:
        x = np.tanh(x @ dense.astype(np.float32))
    np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-5)


@every_implementation
def test_inside_control_flow(product, small):
    dense, w, x = small
    w32 = dense.astype(np.float32)
    x = jnp.asarray(x[0], jnp.float32)

    @jax.jit
    def f(x, w, steps):
        x = jax.lax.fori_loop(
            0, steps, lambda i, x: jnp.tanh(x.at[:, :33].add(product(x, w))), x
        )
        return jax.lax.cond(steps > 2, lambda x: product(x, w), lambda x: x[:, :33], x)

    expected = np.asarray(x)
    for _ in range(3):
        expected = expected.copy()
        expected[:, :33] += expected @ w32
        expected = np.tanh(expected)
    expected = expected @ w32
    np.testing.assert_allclose(f(x, w, 3), expected, rtol=1e-3, atol=1e-3)


def test_eval_shape(small):
    _, w, x = small
    abstract = jax.eval_shape(lambda w: w, w)
    y = jax.eval_shape(fj.sparse_matmul, x, abstract)
    assert (y.shape, y.dtype) == ((4, 5, 33), jnp.float16)


def test_abstract_operands_are_lowered(small):
    _, w, x = small
    spec = jax.ShapeDtypeStruct(x.shape, x.dtype)
    compiled = jax.jit(fj.sparse_matmul).lower(spec, jax.eval_shape(lambda w: w, w))
    assert compiled.compile()(x, w).shape == (4, 5, 33)


@pytest.mark.parametrize("implementation", ["xla", None])
def test_export_with_a_symbolic_batch(small, implementation):
    _, w, x = small
    x = x[0]
    (n,) = jax.export.symbolic_shape("n")
    spec = jax.ShapeDtypeStruct((n, 70), x.dtype)
    bias = jnp.linspace(-1, 1, 33)
    checks = [
        jax.export.DisabledSafetyCheck.custom_call(name)
        for name in ("flashjax_lscd_matmul_cpu", "flashjax_lscd_unpack_cpu")
    ]

    def f(x, w, bias):
        return fj.sparse_matmul(x, w, bias=bias, implementation=implementation)

    exported = jax.export.export(jax.jit(f), platforms=["cpu"], disabled_checks=checks)(
        spec, jax.eval_shape(lambda w: w, w), bias
    )
    assert str(exported.out_avals[0].shape) == "(n, 33)"
    for rows in (1, 5, 100):
        x = op_cases.random_x((rows, 70), "float16")
        got = jax.jit(exported.call)(x, w, bias)
        np.testing.assert_allclose(got, f(x, w, bias), rtol=2e-3, atol=2e-3)
