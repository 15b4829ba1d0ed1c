"""The product inside shard_map, and of operands that are on several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from mesh_support import make_mesh
from op_cases import check_product

import flashjax as fj


@pytest.mark.parametrize(
    ("implementation", "check_vma"), [("cpu", True), ("xla", True), (None, False)]
)
def test_shard_map_over_rows(small, implementation, check_vma):
    dense, w, x = small
    bias = jnp.linspace(-1, 1, 33)
    x = jnp.asarray(x, jnp.float32)

    def f(x, bias):
        return fj.sparse_matmul(x, w, bias=bias, implementation=implementation)

    mapped = jax.shard_map(
        f,
        mesh=make_mesh(names=("data",)),
        in_specs=(P("data"), P()),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    check_product(jax.jit(mapped)(x, bias), x, dense, bias)

    def gradient(f):
        return jax.jit(jax.grad(lambda *args: jnp.sum(f(*args) ** 2), (0, 1)))

    got, expected = gradient(mapped)(x, bias), gradient(f)(x, bias)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["xla", None])
def test_shard_map_result_varies_like_x(small, implementation):
    _, w, x = small

    def f(x):
        def step(x, _):
            y = fj.sparse_matmul(x, w, implementation=implementation)
            return jnp.pad(y, ((0, 0), (0, 0), (0, 37))), None

        return jax.lax.scan(step, x, None, length=2)[0]

    mesh = make_mesh(names=("data",))
    in_spec, out_spec = P("data"), P("data")
    jax.eval_shape(jax.shard_map(f, mesh=mesh, in_specs=in_spec, out_specs=out_spec), x)
    with pytest.raises(ValueError, match="out_specs"):
        jax.eval_shape(jax.shard_map(f, mesh=mesh, in_specs=in_spec, out_specs=P()), x)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("data"), P(None, "data"), P(None, None, "data")])
def test_sharded_operands_under_jit(axis_type, spec):
    dense = op_cases.random_dense(72, 32, 0.6, "float16")
    w = fj.SparseMatrix.from_dense(dense)
    x = op_cases.random_x((4, 8, 72), "float16")
    bias = op_cases.random_x((32,), "float32", seed=3)
    mesh = make_mesh(names=("data",), kind=axis_type)

    @jax.jit
    def f(x, w, bias):
        y, vjp = jax.vjp(lambda x, bias: fj.sparse_matmul(x, w, bias=bias), x, bias)
        return y, *vjp(jnp.ones_like(y))

    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, spec))
        sharded_bias = jax.device_put(bias, NamedSharding(mesh, P("data")))
        y, dx, dbias = f(sharded, w, sharded_bias)
        if axis_type == AxisType.Explicit:
            rows = [*spec, None, None][:2]
            assert jax.typeof(y).sharding.spec == P(*rows, None)
            assert jax.typeof(dx).sharding == jax.typeof(sharded).sharding
            assert jax.typeof(dbias).sharding == jax.typeof(sharded_bias).sharding
    check_product(y, x, dense, bias)
    expected = np.broadcast_to(dense.astype(np.float32).sum(1), x.shape)
    np.testing.assert_allclose(dx.astype(np.float32), expected, rtol=1e-2, atol=1e-2)
    np.testing.assert_array_equal(dbias, np.full(32, 32))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_weights(small, axis_type):
    dense, w, x = small
    mesh = make_mesh(names=("data",), kind=axis_type)

    def split_last(leaf):
        even = leaf.shape[-1] % 4 == 0
        spec = P(*[None] * (leaf.ndim - 1), "data" if even else None)
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        w = jax.tree.map(split_last, w)
        check_product(fj.sparse_matmul(x, w), x, dense)
        np.testing.assert_array_equal(w.to_dense(), dense)
