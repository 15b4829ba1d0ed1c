"""The layers of a stack, in loops over them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import pytest
from flax import nnx

import flashjax as fj
from flashjax import matmul

L, K = 3, 72


@pytest.fixture(scope="module")
def denses():
    # Unlike numbers of segments, which the stack pads.
    sparsities = (0.3, 0.9, 0.6)
    return [
        op_cases.random_dense(K, K, s, "float16", seed=i) * np.float16(0.2)
        for i, s in enumerate(sparsities)
    ]


@pytest.fixture(scope="module")
def stack(denses):
    return fj.SparseMatrix.stack([fj.SparseMatrix.from_dense(d) for d in denses])


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(op_cases.random_x((4, K), "float32"))


def network(product, x, biases, sliced=True):
    """A scan over the layers; biases that are not sliced are given as a stack."""

    def step(x, layer):
        bias = biases[layer] if sliced else biases
        return jnp.tanh(product(x, bias=bias, layer=layer)), None

    return jax.lax.scan(step, x, jnp.arange(L))[0]


def dense_network(denses, x, biases):
    for dense, bias in zip(denses, biases, strict=True):
        y = jnp.dot(x, dense.astype(jnp.float32), precision="highest")
        x = jnp.tanh(y + bias.reshape((1,) * (y.ndim - 1) + bias.shape))
    return x


@pytest.fixture(scope="module")
def biases():
    return jnp.asarray(op_cases.random_x((L, K), "float32", seed=3))


def test_round_trip(denses, stack):
    assert stack.shape == (K, K)
    for w, dense in zip(stack.unstack(), denses, strict=True):
        np.testing.assert_array_equal(w.to_dense(), dense)
        assert w.nnz == np.count_nonzero(dense)


@pytest.mark.parametrize("rows", [0, 4, 300])
def test_every_layer(product, denses, stack, rows):
    x = op_cases.random_x((rows, K), "float16")
    f = jax.jit(lambda x, w, i: product(x, w, layer=i))
    for i, dense in enumerate(denses):
        op_cases.check_product(f(x, stack, i), x, dense)
        np.testing.assert_array_equal(product(x, stack, layer=i), f(x, stack, i))


def test_an_index_out_of_range_is_clamped(product, stack, x):
    f = jax.jit(lambda i: product(x, stack, layer=i))
    np.testing.assert_array_equal(f(-7), f(0))
    np.testing.assert_array_equal(f(L + 4), f(L - 1))


TRANSFORMS = {
    "plain": lambda f: f,
    "grad": lambda f: jax.grad(lambda *a: jnp.sum(f(*a) ** 2), (0, 1)),
    "grad of remat": lambda f: jax.grad(
        lambda *a: jnp.sum(jax.checkpoint(f)(*a) ** 2), (0, 1)
    ),
    "jvp": lambda f: lambda x, b: jax.jvp(f, (x, b), (x, b)),
    "vmap": lambda f: jax.vmap(f, in_axes=(0, None)),
    "vmap of grad": lambda f: jax.vmap(
        jax.grad(lambda *a: jnp.sum(f(*a) ** 2)), in_axes=(0, None)
    ),
}


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("with_transpose", [False, True])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_scan(product, denses, stack, x, biases, name, with_transpose, sliced):
    if with_transpose:
        stack = fj.SparseMatrix.stack([w.with_transpose() for w in stack.unstack()])

    @jax.jit
    def got(x, stack, biases):
        def f(x, biases):
            return network(functools.partial(product, w=stack), x, biases, sliced)

        return TRANSFORMS[name](f)(x, biases)

    expected = jax.jit(TRANSFORMS[name](functools.partial(dense_network, denses)))
    for a, b in zip(
        jax.tree.leaves(got(x, stack, biases)),
        jax.tree.leaves(expected(x, biases)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_vmap_over_the_index_and_over_stacks(denses, stack, x):
    y = jax.vmap(lambda i: fj.sparse_matmul(x, stack, layer=i))(jnp.arange(L))
    for i, dense in enumerate(denses):
        op_cases.check_product(y[i], x, dense)
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), stack)
    y = jax.vmap(lambda w: fj.sparse_matmul(x, w, layer=0))(two)
    op_cases.check_product(y[1], x, denses[-1])


def test_stacked_biases(product, denses, stack, x, biases):
    f = jax.jit(lambda x, biases, i: product(x, stack, bias=biases, layer=i))
    for index, layer in [(0, 0), (1, 1), (2, 2), (9, 2)]:
        op_cases.check_product(f(x, biases, index), x, denses[layer], biases[layer])
        half = biases.astype(jnp.bfloat16)
        op_cases.check_product(f(x, half, index), x, denses[layer], half[layer])
    y = jax.vmap(f, (None, 1, None))(x, jnp.stack([biases, -biases], 1), 1)
    op_cases.check_product(y[1], x, denses[1], -biases[1])
    y = jax.vmap(f, (None, None, 0))(x, biases, jnp.arange(L))
    op_cases.check_product(y[2], x, denses[2], biases[2])
    transpose = jax.linear_transpose(lambda b: f(x * 0, b, 1), biases)
    (transposed,) = transpose(f(x, biases, 1))
    assert not transposed[0].any()
    assert transposed[1].any()
    with pytest.raises(ValueError, match=r"bias of shape \(72,\) or \(3, 72\)"):
        fj.sparse_matmul(x, stack, bias=biases[:2], layer=0)
    with pytest.raises(ValueError, match=r"bias of shape \(72,\) for"):
        fj.sparse_matmul(x, stack.unstack()[0], bias=biases)


def _packed_moves(f, *args):
    """Instructions that make a packed array out of another one."""
    text = jax.jit(f).lower(*args).compile().as_text()
    makes = re.findall(r"= u32\[\d+(?:,\d+){2,}\]\S* ([\w-]+)\(", text)
    return [op for op in makes if op not in ("parameter", "get-tuple-element")]


@pytest.mark.parametrize("rows", [4, 300])
def test_no_layer_is_copied_in_the_loop(stack, biases, rows):
    x = jnp.zeros((rows, K), jnp.float32)

    def f(x, stack, biases):
        return network(functools.partial(fj.sparse_matmul, w=stack), x, biases)

    def gradient(x, stack, biases):
        return jax.grad(lambda x: jnp.sum(f(x, stack, biases)))(x)

    def sliced(x, stack):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, stack)[0]

    assert _packed_moves(f, x, stack, biases) == []
    assert _packed_moves(gradient, x, stack, biases) == []
    assert _packed_moves(sliced, x, stack) != []  # what is looked for is found


@pytest.mark.parametrize("rows", [4, 65])
def test_cuda_takes_the_stack_and_the_index(cuda_module, stack, rows, monkeypatch):
    del cuda_module
    monkeypatch.setitem(matmul.KERNEL_ROWS, "cuda", 64)
    f = jax.jit(lambda x, w, i: fj.sparse_matmul(x, w, layer=i))
    traced = f.trace(jnp.zeros((rows, K), jnp.float16), stack, 1)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    target = "matmul" if rows == 4 else "unpack"
    assert f"custom_call @flashjax_lscd_{target}_cuda" in text
    assert "dynamic_slice" not in text


# --- A model ----------------------------------------------------------------------


def test_recipe_for_nnx_layers(denses, stack, x, biases):
    """Layers are stacked once; the loop body makes its layer from the stack."""
    pairs = zip(stack.unstack(), biases, strict=True)
    layers = [fj.SparseDense.from_matrix(w, b) for w, b in pairs]

    kernels = fj.SparseMatrix.stack([layer.kernel.get_value() for layer in layers])
    stacked_biases = jnp.stack([layer.bias[...] for layer in layers])

    @jax.jit
    def f(x, kernels, biases):
        def step(x, i):
            y = fj.sparse_matmul(x, kernels, bias=biases, layer=i)
            return jnp.tanh(y), None

        return jax.lax.scan(step, x, jnp.arange(L))[0]

    expected = x
    for layer in layers:
        expected = jnp.tanh(layer(expected))
    y = f(x, kernels, stacked_biases)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_nnx_scan_slices_a_stacked_layer(denses, stack, x, biases):
    """Right, but it copies each layer's packed weights."""
    layer = fj.SparseDense.from_matrix(stack.unstack()[0], biases[0])
    graph, state = nnx.split(layer)
    state["kernel"].set_value(stack)
    state["bias"].set_value(biases)
    layers = nnx.merge(graph, state)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def f(x, layer):
        return jnp.tanh(layer(x))

    expected = dense_network(denses, x, biases)
    np.testing.assert_allclose(f(x, layers), expected, rtol=1e-4, atol=1e-4)


# --- Bad input --------------------------------------------------------------------


@pytest.mark.parametrize("layer", [-1, L, np.int64(7)])
def test_concrete_index_out_of_range(stack, x, layer):
    with pytest.raises(ValueError, match=f"from 0 to 2 of a stack of 3, got {layer}"):
        fj.sparse_matmul(x, stack, layer=layer)


@pytest.mark.parametrize("layer", [1.0, True, "1", jnp.ones(2, int), jnp.float32(1)])
def test_index_of_a_wrong_type(stack, x, layer):
    with pytest.raises(TypeError, match=r"layer to be (an|one) integer, got"):
        fj.sparse_matmul(x, stack, layer=layer)


def test_one_matrix_has_no_layers(stack, x):
    with pytest.raises(ValueError, match="expected a stack of SparseMatrix for a lay"):
        fj.sparse_matmul(x, stack.unstack()[0], layer=0)
    with pytest.raises(ValueError, match="with layer=i"):
        fj.sparse_matmul(x, stack)


def test_matrices_that_do_not_stack(denses, stack):
    w = stack.unstack()[0]
    other = fj.SparseMatrix.from_dense(denses[0][:8])
    with pytest.raises(ValueError, match="at least one matrix"):
        fj.SparseMatrix.stack([])
    with pytest.raises(TypeError, match="got ndarray at 1"):
        fj.SparseMatrix.stack([w, denses[0]])
    for wrong in (other, w.with_transpose()):
        with pytest.raises(ValueError, match=r"one shape and dtype.*, at 1, Sparse"):
            fj.SparseMatrix.stack([w, wrong])
    with pytest.raises(ValueError, match="got a stack"):
        fj.SparseMatrix.stack([stack])
