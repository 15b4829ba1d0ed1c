"""An activation as part of the product: the values, the derivatives and the layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flashjax as fj
from flashjax import linen as fj_linen
from flashjax.trainable_matrix import TrainableMatrix

from . import op_cases
from .mesh_support import make_mesh
from .op_cases import every_implementation, for_each


def cases(shape=(300, 131), rows=5, dtype="float16"):
    """w, x and a bias with which half of the outputs are negative."""
    _, w, x = op_cases.packed_and_x(shape, 0.7, rows, dtype)
    return w, x, op_cases.random_x((shape[1],), "float32", seed=3)


def check(got, product):
    """As when the activation follows the product, which XLA may compute otherwise."""
    expected = np.asarray(jax.nn.relu(product))
    assert got.dtype == expected.dtype
    got, eps = np.asarray(got, np.float32), float(jnp.finfo(got.dtype).eps)
    largest = np.abs(expected).max(initial=0).astype(np.float32)
    np.testing.assert_allclose(
        got, expected.astype(np.float32), rtol=2 * eps, atol=4 * eps * largest
    )
    assert got.size < 100 or 0.2 < np.count_nonzero(got == 0) / got.size < 0.8


# Every kernel's tile, several tiles of columns, and more rows than the kernels take.
@for_each("rows", [0, 1, 2, 8, 16, 33, 65, 130, 600, 2100], [3])
def test_values(product, rows):
    w, x, bias = cases((300, 136), rows)
    check(product(x, w, bias=bias, activation="relu"), product(x, w, bias=bias))


# Odd numbers of outputs and float32 results are stored in other ways.
@for_each("dtype", op_cases.HALVES, ["bfloat16"])
@pytest.mark.parametrize("rows", [3, 300])
def test_ways_to_store(product, rows, dtype):
    w, x, bias = cases((300, 131), rows, dtype)
    for options in ({"bias": bias, "preferred_element_type": "float32"}, {}):
        check(product(x, w, activation="relu", **options), product(x, w, **options))


@every_implementation
def test_packed_for_few_tokens(product):
    dense = op_cases.random_dense(700, 290, 0.9, "float16")
    w, x = op_cases.gather_matrix(dense), op_cases.random_x((3, 700), "float16")
    for preferred in (None, "float32"):
        options = {
            "bias": np.ones(290, np.float16),
            "preferred_element_type": preferred,
        }
        check(product(x, w, activation="relu", **options), product(x, w, **options))


@every_implementation
def test_tiles_that_are_shared(product):
    w, x, bias = cases((9000, 40), 3)
    check(product(x, w, bias=bias, activation="relu"), product(x, w, bias=bias))


@every_implementation
def test_one_of_a_stack(product):
    w, x, bias = cases()
    stack = fj.SparseMatrix.stack([w, w])
    biases = np.stack([bias, -bias])
    for layer in (0, 1):
        options = {"bias": biases, "layer": layer}
        got = product(x, stack, activation="relu", **options)
        check(got, product(x, stack, **options))


@every_implementation
def test_nan_stays(product):
    w, x, _ = cases()
    x = x.copy()
    x[1, 7] = np.nan
    y = np.asarray(product(x, w, activation="relu"))
    assert np.isnan(y[1]).any()
    assert not np.isnan(y[0]).any()


@every_implementation
def test_derivatives(product):
    w, x, bias = cases()
    x = jnp.asarray(x, jnp.float32)

    def inside(x, bias):
        return product(x, w, bias=bias, activation="relu")

    def after(x, bias):
        return jax.nn.relu(product(x, w, bias=bias))

    def gradients(f):
        return jax.grad(lambda *args: jnp.sum(jnp.sin(f(*args))), (0, 1))(x, bias)

    def second(f):
        def inner(x):
            return jnp.sum(f(x, bias) ** 3)

        return jax.jvp(jax.grad(inner), (x,), (jnp.cos(x),))

    def forward(f):
        return jax.jvp(f, (x, bias), (jnp.cos(x), jnp.cos(bias)))

    for derivative in (gradients, forward, second):
        got, expected = derivative(inside), derivative(after)
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@every_implementation
def test_batches(product):
    w, x, bias = cases()
    xs, biases = np.stack([x, -x, 2 * x]), np.stack([bias, -bias, 2 * bias])

    def f(x, bias, activation=None):
        return product(x, w, bias=bias, activation=activation)

    for axes in ((0, None), (None, 0), (0, 0)):
        operands = [
            (a, b)[axis == 0]
            for (a, b), axis in zip(((x, xs), (bias, biases)), axes, strict=True)
        ]
        got = jax.vmap(lambda x, b: f(x, b, "relu"), axes)(*operands)
        check(got, jax.vmap(f, axes)(*operands))


def test_is_not_transposed():
    w, x, _ = cases()

    def f(x):
        return fj.sparse_matmul(x, w, activation="relu")

    with pytest.raises(NotImplementedError, match=r"activation='relu'.*not linear"):
        jax.linear_transpose(f, x)(f(x))


def test_trainable_values():
    w, x, bias = cases()
    t = TrainableMatrix.from_sparse(w)

    def loss(values, after):
        activation = None if after else "relu"
        y = fj.sparse_matmul(x, t.replace(values), bias=bias, activation=activation)
        return jnp.sum((jax.nn.relu(y) if after else y).astype(jnp.float32) ** 2)

    for derivative in (loss, jax.grad(loss)):
        got, expected = (derivative(t.values, after) for after in (False, True))
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", ["out", "in"])
def test_sharded(dim):
    dense = op_cases.random_dense(64, 48, 0.6, "float16")
    w = fj.ShardedSparseMatrix.from_dense(
        dense, make_mesh(names=("model",)), "model", dim=dim
    )
    x = op_cases.random_x((5, 64), "float16")
    bias = op_cases.random_x((48,), "float32", seed=3)
    check(
        fj.sparse_matmul(x, w, bias=bias, activation="relu"),
        fj.sparse_matmul(x, w, bias=bias),
    )
    with pytest.raises(ValueError, match="'gelu'"):
        fj.sparse_matmul(x, w, activation="gelu")


def test_layers():
    layer = fj.SparseDense(100, 64, sparsity=0.5, rngs=nnx.Rngs(0))
    x = op_cases.random_x((3, 100), "float16")
    check(layer(x, activation="relu"), layer(x))
    trainable = fj.trainable(layer)
    check(trainable(x, activation="relu"), trainable(x))
    module = fj_linen.SparseDense(64)
    variables = module.init(jax.random.key(0), x)
    got = module.apply(variables, x, activation="relu")
    check(got, module.apply(variables, x))


@pytest.mark.parametrize("activation", ["gelu", "", True, jax.nn.relu])
def test_unknown(activation):
    w, x, _ = cases()
    with pytest.raises(ValueError, match=r"activation to be one of \('relu',\)"):
        fj.sparse_matmul(x, w, activation=activation)
