"""The second packing, and the gradient with respect to x at the kernel's speed."""

import copy
import dataclasses
import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import pytest

import flashjax as fj


@pytest.fixture(scope="module")
def both(w):
    return w.with_transpose()


def gradient(product, w, x):
    return jax.jit(jax.grad(lambda x, w: jnp.sum(jnp.sin(product(x, w)))))(x, w)


@pytest.mark.parametrize("shape", [(70, 33), (1, 40), (300, 131), (0, 5), (5, 0)])
@pytest.mark.parametrize("dtype", op_cases.HALVES)
def test_is_the_transpose(shape, dtype):
    dense = op_cases.random_dense(*shape, 0.7, dtype)
    w = fj.SparseMatrix.from_dense(dense)
    for t in (w.with_transpose().transposed, w.T, w.with_transpose().T):
        assert (t.shape, t.dtype) == (shape[::-1], dense.dtype)
        np.testing.assert_array_equal(t.to_dense(), dense.T)
    np.testing.assert_array_equal(w.with_transpose().T.T.to_dense(), dense)


def test_shares_the_arrays(w, both):
    assert both.values is w.values
    assert both.with_transpose() is both
    assert both.T.transposed.values is w.values
    assert both.nbytes == w.nbytes + w.T.nbytes
    assert "with its transpose" in repr(both)
    assert w.transposed is None
    assert len(jax.tree.leaves(w)) == 4


def test_same_device(dense):
    device = jax.local_devices(backend="cpu")[-1]
    w = fj.SparseMatrix.from_dense(jax.device_put(dense, device)).with_transpose()
    assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(w))


@pytest.mark.parametrize("rows", [1, 7, 300])
def test_gradient(product, dense, both, rows):
    x = jnp.asarray(op_cases.random_x((rows, dense.shape[0]), "float32"))
    w32 = dense.astype(np.float32)
    expected = np.cos(np.asarray(x) @ w32) @ w32.T
    got = gradient(product, both, x)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)
    assert got.shape == x.shape


def test_other_transformations(product, dense, both, x):
    def f(x, w):
        return jnp.sum(product(x, w) ** 3)

    def expected(x):
        return jnp.sum(jnp.dot(x, dense.astype(jnp.float32), precision="highest") ** 3)

    vector = x[0, 0]
    np.testing.assert_allclose(
        jax.jit(jax.hessian(f))(vector, both),
        jax.hessian(expected)(vector),
        rtol=1e-3,
        atol=1e-3,
    )
    mapped = jax.jit(jax.vmap(jax.grad(f), in_axes=(0, None)))(x, both)
    np.testing.assert_allclose(
        mapped, jax.vmap(jax.grad(expected))(x), rtol=1e-3, atol=1e-3
    )
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), both)
    mapped = jax.jit(jax.vmap(jax.grad(f)))(x[:2], stack)
    np.testing.assert_allclose(
        mapped, jax.vmap(jax.grad(expected))(x[:2]), rtol=1e-3, atol=1e-3
    )


def test_cpu_gradient_uses_a_kernel_and_no_dense_matrix(w, both, x):
    def targets(w):
        f = jax.grad(lambda x, w: jnp.sum(jnp.sin(fj.sparse_matmul(x, w))))
        return jax.jit(f).lower(x, w).as_text()

    assert "@flashjax_lscd_matmul_transposed_cpu" in targets(w)
    for text in map(targets, (w, both)):
        assert "unpack" not in text
    assert targets(both).count("custom_call @flashjax_lscd_matmul_cpu") == 2


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies_keep_it(both, dense, duplicate):
    again = duplicate(both)
    assert jax.tree.structure(again) == jax.tree.structure(both)
    np.testing.assert_array_equal(again.transposed.to_dense(), dense.T)


def test_checkpoints_leave_it_out(both, dense):
    state = flax.serialization.to_state_dict(both)
    again = flax.serialization.from_state_dict(both, state)
    np.testing.assert_array_equal(again.to_dense(), dense)


def test_a_traced_matrix_is_refused(w):
    for f in (lambda w: w.with_transpose(), lambda w: w.T):
        with pytest.raises(TypeError, match=r"with_transpose\(\) outside of jit"):
            jax.jit(f)(w)
    np.testing.assert_array_equal(
        jax.jit(lambda w: w.T.to_dense())(w.with_transpose()), w.to_dense().T
    )


@pytest.mark.parametrize("wrong", [np.ones((2, 2)), "text"])
def test_what_is_no_transpose_is_refused(w, x, wrong):
    broken = dataclasses.replace(w, transposed=wrong)
    with pytest.raises(ValueError, match=r"transpose of a SparseMatrix of shape"):
        fj.sparse_matmul(x, broken)
    with pytest.raises(ValueError, match=r"transpose of a SparseMatrix of shape"):
        fj.sparse_matmul(x, dataclasses.replace(w, transposed=w))
