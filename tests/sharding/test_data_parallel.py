"""Replicated weights, rows of x on several devices: no device waits for another."""

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from mesh_support import collectives, make_mesh

import flashjax as fj

SPECS = [P("data"), P(None, "data"), P("data", "model"), P(("data", "model"))]
KINDS = [AxisType.Auto, AxisType.Explicit]


@pytest.fixture(scope="module")
def operands():
    dense = op_cases.random_dense(96, 80, 0.6, "float16")
    x = op_cases.random_x((8, 4, 96), "float16")
    bias = op_cases.random_x((80,), "float32", seed=3)
    return x, fj.SparseMatrix.from_dense(dense), bias


def forward(x, w, bias):
    return fj.sparse_matmul(x, w, bias=bias)


def gradient(x, w, bias):
    def loss(x):
        return jnp.sum(forward(x, w, bias).astype(jnp.float32) ** 2)

    return jax.grad(loss)(x)


def over_a_batch(x, w, bias):
    return jax.vmap(forward, (0, None, None))(x, w, bias)


def check(function, operands, mesh, spec):
    x, *others = operands
    expected = jax.jit(function)(*operands)
    x = jax.device_put(x, NamedSharding(mesh, spec))
    others = jax.device_put(others, NamedSharding(mesh, P()))
    compiled = jax.jit(function).lower(x, *others).compile()
    y = compiled(x, *others)
    np.testing.assert_array_equal(y, expected)
    return compiled, y


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", [forward, gradient])
@pytest.mark.parametrize("spec", SPECS)
def test_rows_stay_where_they_are(operands, function, spec, kind):
    mesh = make_mesh((4, 2), ("data", "model"), kind)
    compiled, y = check(function, operands, mesh, spec)
    assert not collectives(compiled)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap(operands, kind):
    mesh = make_mesh((4,), ("data",), kind)
    compiled, _ = check(over_a_batch, operands, mesh, P(None, "data"))
    assert not collectives(compiled)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", [forward, gradient])
def test_under_set_mesh(operands, function, kind):
    mesh = make_mesh((4,), ("data",), kind)
    x, w, bias = operands
    expected = jax.jit(function)(x, w, bias)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        compiled = jax.jit(function).lower(x, w, bias).compile()
        np.testing.assert_array_equal(jax.jit(function)(x, w, bias), expected)
        # Nothing is sharded, and no array has a mesh.
        np.testing.assert_array_equal(jax.jit(function)(*operands), expected)
    assert not collectives(compiled)


@pytest.mark.parametrize("function", [forward, gradient])
def test_bfloat16_rows_by_the_reference(operands, function):
    x, _, bias = operands
    dense = op_cases.random_dense(96, 80, 0.6, "bfloat16")
    w = fj.SparseMatrix.from_dense(dense)
    mesh = make_mesh((4,), ("data",))

    def plain(x, w, bias):
        return fj.sparse_matmul(x, w, bias=bias, implementation="xla")

    compiled, _ = check(plain, (x.astype(jnp.bfloat16), w, bias), mesh, P("data"))
    assert not collectives(compiled)


def test_many_rows_and_rows_that_do_not_divide(operands):
    _, w, bias = operands
    mesh = make_mesh((4,), ("data",))
    x = op_cases.random_x((1024, 96), "float16")  # above the limit of the kernel
    compiled, _ = check(forward, (x, w, bias), mesh, P("data"))
    assert not collectives(compiled)

    def odd(x, w, bias):
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("data")))
        return forward(x[:6], w, bias)

    check(odd, (x[:8], w, bias), mesh, P("data"))


@pytest.mark.parametrize("kind", KINDS)
def test_features_that_are_sharded_are_gathered(operands, kind):
    mesh = make_mesh((4,), ("data",), kind)
    check(forward, operands, mesh, P(None, None, "data"))


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_over_one_of_two_axes(operands, check_vma):
    mesh = make_mesh((4, 2), ("data", "model"))
    x, w, bias = operands
    mapped = jax.shard_map(
        forward,
        mesh=mesh,
        in_specs=(P("data"), P(), P()),
        out_specs=P("data"),
        axis_names={"data"},
        check_vma=check_vma,
    )
    y = jax.jit(mapped)(x, w, bias)
    np.testing.assert_array_equal(y, jax.jit(forward)(x, w, bias))
