"""Every transformation gives what it gives for the dense product."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.test_util import check_grads

import flashjax as fj


def assert_close(got, expected, tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def loss(f):
    return lambda x, b: jnp.sum(jnp.sin(f(x, b)))


def curved(f):
    return lambda x, b: jnp.sum(f(x, b) ** 3)


def rows(g):
    """Of g(x (K,), bias): for the first row of x."""
    return lambda x, b: g(x[0, 0], b)


def jvp(f):
    return lambda x, b: jax.jvp(f, (x, b), (jnp.cos(x), jnp.cos(b)))


def linearize(f):
    def g(x, b):
        y, tangent = jax.linearize(f, x, b)
        return y, tangent(jnp.cos(x), jnp.cos(b)), tangent(x, b)

    return g


def linear_transpose(f):
    def g(x, b):
        zero = jnp.zeros_like(b)
        return jax.linear_transpose(lambda x: f(x, zero), x)(jnp.cos(f(x, b)))

    return g


def hessian_product(f):
    """Forward over reverse."""

    def g(x, b):
        return jax.jvp(lambda x: jax.grad(curved(f))(x, b), (x,), (jnp.cos(x),))

    return g


def scan(f):
    """Three steps; the result is put back into x."""

    def g(x, b):
        def step(x, _):
            y = f(x, b)
            return jnp.tanh(x.at[..., : y.shape[-1]].add(y)), jnp.sum(y)

        return jax.lax.scan(step, x, None, length=3)

    return g


def scan_sum(f):
    return lambda x, b: jnp.sum(scan(f)(x, b)[0])


def while_loop(f):
    def g(x, b):
        def body(state):
            i, x = state
            return i + 1, jnp.tanh(x.at[..., : b.shape[0]].add(f(x, b)))

        return jax.lax.while_loop(lambda state: state[0] < 3, body, (0, x))[1]

    return g


def cond(f):
    return lambda x, b: jax.lax.cond(x[0, 0, 0] > 0, f, lambda x, b: -f(x, b), x, b)


def grad(g):
    return jax.grad(g, (0, 1))


def policy_remat(f):
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(f, policy=policy)


def save_named(f):
    def g(x, b):
        y = checkpoint_name(f(x, b), "y")
        return jnp.sum(jnp.sin(y))

    policy = jax.checkpoint_policies.save_only_these_names("y")
    return jax.checkpoint(g, policy=policy)


def over_x(g):
    return jax.vmap(g, in_axes=(0, None))


def over_both(g):
    def mapped(x, b):
        return jax.vmap(g, in_axes=(1, 0), out_axes=-1)(x, jnp.stack([b, b * 2, -b]))

    return mapped


TRANSFORMS = {
    "plain": lambda f: f,
    "grad": lambda f: grad(loss(f)),
    "value_and_grad": lambda f: jax.value_and_grad(loss(f), (0, 1)),
    "jvp": jvp,
    "linearize": linearize,
    "linear_transpose": linear_transpose,
    "jacfwd": lambda f: rows(jax.jacfwd(f, (0, 1))),
    "jacrev": lambda f: rows(jax.jacrev(f, (0, 1))),
    "hessian": lambda f: rows(jax.hessian(curved(f))),
    "jacrev of jacrev": lambda f: rows(jax.jacrev(jax.jacrev(curved(f)))),
    "hessian product": hessian_product,
    "remat": lambda f: grad(jax.checkpoint(loss(f))),
    "remat with a policy": lambda f: grad(policy_remat(loss(f))),
    "remat that saves": lambda f: grad(save_named(f)),
    "vmap": over_x,
    "vmap of both": over_both,
    "vmap of grad": lambda f: over_x(grad(loss(f))),
    "vmap of both of grad": lambda f: over_both(grad(loss(f))),
    "grad of vmap": lambda f: grad(lambda x, b: jnp.sum(over_x(loss(f))(x, b))),
    "jvp of vmap": lambda f: jvp(over_x(f)),
    "jvp of vmap of both": lambda f: jvp(over_both(f)),
    "vmap of jvp": lambda f: over_x(jvp(f)),
    "vmap of remat": lambda f: over_x(grad(jax.checkpoint(loss(f)))),
    "grad of vmap of remat": lambda f: grad(
        lambda x, b: jnp.sum(over_x(jax.checkpoint(loss(f)))(x, b))
    ),
    "scan": scan,
    "grad of scan": lambda f: grad(scan_sum(f)),
    "grad of scan of remat": lambda f: grad(scan_sum(jax.checkpoint(f))),
    "jvp of scan": lambda f: jvp(scan(f)),
    "vmap of grad of scan": lambda f: over_x(grad(scan_sum(f))),
    "while_loop": while_loop,
    "jvp of while_loop": lambda f: jvp(while_loop(f)),
    "vmap of while_loop": lambda f: over_x(while_loop(f)),
    "cond": cond,
    "grad of cond": lambda f: grad(loss(cond(f))),
    "custom_vjp around": lambda f: grad(loss(clipped(f))),
}


def clipped(f):
    @jax.custom_vjp
    def g(x, b):
        return f(x, b)

    def forward(x, b):
        y, pullback = jax.vjp(f, x, b)
        return y, pullback

    g.defvjp(forward, lambda pullback, dy: pullback(jnp.clip(dy, -0.5, 0.5)))
    return g


@pytest.mark.parametrize("name", TRANSFORMS)
def test_like_the_dense_product(product, name, w, x, bias, dense_product):
    transform = TRANSFORMS[name]
    got = jax.jit(lambda x, b, w: transform(lambda x, b: product(x, w, bias=b))(x, b))
    expected = jax.jit(transform(dense_product))
    assert_close(got(x, bias, w), expected(x, bias), 1e-3)


@pytest.mark.parametrize("name", ["grad", "jvp", "vmap of grad", "grad of scan"])
def test_without_jit(name, w, x, bias, dense_product):
    transform = TRANSFORMS[name]
    f = transform(lambda x, b: fj.sparse_matmul(x, w, bias=b))
    assert_close(f(x, bias), transform(dense_product)(x, bias), 1e-3)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_lowers_to_cuda_kernels(cuda_module, name, w, bias):
    del cuda_module
    transform = TRANSFORMS[name]
    x = jax.ShapeDtypeStruct((4, 3, w.shape[0]), jnp.float16)

    def f(x, b, w):
        product = functools.partial(fj.sparse_matmul, preferred_element_type="float16")
        return transform(lambda x, b: product(x, w, bias=b).astype(x.dtype))(x, b)

    bias = bias.astype(jnp.float16)
    traced = jax.jit(f).trace(x, bias, w)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "custom_call @flashjax_lscd_matmul_cuda" in text or name in BACKWARD_ALONE
    assert "_cpu" not in text


# Dead code elimination leaves no forward product.
BACKWARD_ALONE = ("linear_transpose", "jacrev")


@pytest.mark.parametrize("dtype", op_cases.HALVES)
@pytest.mark.parametrize("w_dtype", op_cases.HALVES)
def test_tangents_and_cotangents_keep_their_dtypes(product, dtype, w_dtype):
    dense = op_cases.random_dense(40, 24, 0.6, w_dtype)
    w = fj.SparseMatrix.from_dense(dense)
    x = jnp.asarray(op_cases.random_x((3, 40), dtype))
    bias = jnp.ones(24, jnp.float32)

    @jax.jit
    def f(x, bias):
        g = functools.partial(product, preferred_element_type=jnp.float32)
        y, dy = jax.jvp(lambda x, b: g(x, w, bias=b), (x, bias), (x, bias))
        return y, dy, *jax.grad(lambda x, b: jnp.sum(g(x, w, bias=b)), (0, 1))(x, bias)

    y, dy, dx, dbias = f(x, bias)
    assert (y.dtype, dy.dtype) == (jnp.float32, jnp.float32)
    assert (dx.dtype, dbias.dtype) == (x.dtype, jnp.float32)
    np.testing.assert_array_equal(y, dy)  # linear in both together
    op_cases.check_product(dy, x, dense, bias)


def test_weights_have_zero_derivatives(w, x):
    def f(w):
        return jnp.sum(fj.sparse_matmul(x, w))

    gradient = jax.grad(f, allow_int=True)(w)
    assert all(leaf.dtype == jax.dtypes.float0 for leaf in jax.tree.leaves(gradient))
    with pytest.raises(TypeError, match="uint32"):
        jax.grad(f)(w)


def test_numerical_derivatives(product, w, x, bias):
    check_grads(
        lambda x, b: product(x, w, bias=b), (x[0], bias), order=2, atol=0.1, rtol=0.1
    )
