import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from mesh_support import collectives, make_mesh

import flashjax as fj

DIMS = ["out", "in"]
KINDS = [AxisType.Auto, AxisType.Explicit]
DTYPES = ["float16", "bfloat16"]
MESHES = {"1d": ((4,), ("model",)), "2d": ((2, 4), ("data", "model"))}


def operands(dtype="float16", k=96, m=80):
    dense = op_cases.random_dense(k, m, 0.7, dtype)
    x = op_cases.random_x((2, 3, k), dtype)
    return dense, x, op_cases.random_x((m,), "float32", seed=3)


def multiply(x, w, bias):
    return fj.sparse_matmul(x, w, bias=bias, preferred_element_type=jnp.float32)


def gradients(x, w, bias):
    return jax.grad(lambda *args: jnp.sum(multiply(args[0], w, args[1]) ** 2), (0, 1))(
        x, bias
    )


def over_a_batch(x, w, bias):
    return jax.vmap(multiply, (0, None, None))(x, w, bias)


def in_a_loop(x, w, bias):
    def step(total, _):
        return total + multiply(x, w, bias), None

    start = jnp.zeros((*x.shape[:-1], w.shape[1]), jnp.float32)
    return jax.lax.scan(step, start, None, length=2)[0]


def check(function, x, w, bias, dense):
    expected = jax.jit(function)(x, fj.SparseMatrix.from_dense(dense), bias)
    compiled = jax.jit(function).lower(x, w, bias).compile()
    got = compiled(x, w, bias)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=4e-3, atol=4e-3 * np.abs(b).max())
    return compiled


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_holds_the_matrix(dim, dtype):
    dense, _, _ = operands(dtype)
    whole = fj.SparseMatrix.from_dense(dense)
    w = fj.ShardedSparseMatrix.from_dense(dense, make_mesh(), "model", dim=dim)
    np.testing.assert_array_equal(w.to_dense(), dense)
    assert (w.shape, w.dtype, w.ndim, w.size) == (dense.shape, dense.dtype, 2, 7680)
    assert (w.nnz, w.count, w.sparsity) == (whole.nnz, 4, whole.sparsity)
    assert w.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(w))
    for leaf in jax.tree.leaves(w):
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {1}
    assert f"dim='{dim}', axis='model', count=4, nnz={whole.nnz}" in repr(w)
    again = whole.shard(make_mesh(), "model", dim=dim)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(w), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("function", "mesh"),
    [(multiply, "1d"), (over_a_batch, "1d"), (gradients, "1d"), (gradients, "2d")],
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", DIMS)
def test_under_jit(function, dim, kind, mesh):
    dense, x, bias = operands()
    mesh = make_mesh(*MESHES[mesh], kind)
    w = fj.ShardedSparseMatrix.from_dense(dense, mesh, "model", dim=dim)
    found = collectives(check(function, x, w, bias, dense))
    if function is gradients:
        assert found == ["all-reduce"]
    else:
        assert found == ([] if dim == "out" else ["all-reduce"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_dtypes_scan_and_many_rows(dim, dtype):
    dense, x, bias = operands(dtype, k=64, m=24)  # shards smaller than a strip
    w = fj.ShardedSparseMatrix.from_dense(dense, make_mesh(), "model", dim=dim)
    check(in_a_loop, x, w, bias, dense)
    check(multiply, op_cases.random_x((300, 64), dtype), w, None, dense)
    np.testing.assert_allclose(
        np.asarray(x @ w, np.float32), x.astype(np.float32) @ dense, rtol=0.02, atol=0.1
    )


@pytest.mark.parametrize("dim", DIMS)
def test_under_set_mesh_with_sharded_rows(dim):
    dense, x, bias = operands()
    mesh = make_mesh((2, 4), ("data", "model"), AxisType.Explicit)
    w = fj.ShardedSparseMatrix.from_dense(dense, mesh, "model", dim=dim)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, jax.NamedSharding(mesh, P("data")))
        y = jax.jit(multiply)(x, w, bias)
        spec = P("data", None, "model" if dim == "out" else None)
        assert jax.typeof(y).sharding.spec == spec
    expected = x.astype(np.float32) @ dense.astype(np.float32) + bias[None, None]
    np.testing.assert_allclose(y, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("dim", ["out", "in"])
def test_is_made_under_set_mesh(dim, kind):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(kind,))
    w = fj.SparseMatrix.from_dense(np.eye(32, dtype=np.float16))
    with jax.set_mesh(mesh):
        made = fj.ShardedSparseMatrix.from_dense(w.to_dense(), mesh, "model", dim=dim)
        for matrix in (made, w.shard(mesh, "model", dim=dim)):
            np.testing.assert_array_equal(matrix.to_dense(), np.eye(32))


def test_copies_and_pickle():
    mesh = make_mesh((2,), ("model",))
    w = fj.SparseMatrix.from_dense(np.eye(32, dtype=np.float16))
    sharded = w.shard(mesh, "model", dim="out")
    for again in (copy.copy(sharded), copy.deepcopy(sharded)):
        np.testing.assert_array_equal(again.to_dense(), np.eye(32))
    with pytest.raises(TypeError, match="ShardedSparseMatrix: expected something with"):
        pickle.dumps(sharded)


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(check_vma):
    """Two layers, column- then row-parallel: one all-reduce."""
    first, x, first_bias = operands()
    second, _, second_bias = operands(k=80, m=48)
    mesh = make_mesh()
    v = fj.ShardedSparseMatrix.from_dense(first, mesh, "model", dim="out")
    w = fj.ShardedSparseMatrix.from_dense(second, mesh, "model", dim="in")

    def layers(x, v, w, first_bias, second_bias):
        hidden = jax.nn.relu(fj.sparse_matmul(x, v, bias=first_bias))
        return fj.sparse_matmul(hidden, w, bias=second_bias)

    mapped = jax.shard_map(
        layers,
        mesh=mesh,
        in_specs=(P(), P("model"), P("model"), P("model"), P()),
        out_specs=P(),
        check_vma=check_vma,
    )
    args = x, v, w, first_bias, second_bias
    compiled = jax.jit(mapped).lower(*args).compile()
    assert collectives(compiled) == ["all-reduce"]
    assert collectives(jax.jit(layers).lower(*args).compile()) == ["all-reduce"]
    a, b = fj.SparseMatrix.from_dense(first), fj.SparseMatrix.from_dense(second)
    expected = np.asarray(layers(x, a, b, first_bias, second_bias), np.float32)
    got = np.asarray(compiled(*args), np.float32)
    np.testing.assert_allclose(got, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dim", DIMS)
def test_in_a_layer(dim):
    dense, x, bias = operands()
    w = fj.ShardedSparseMatrix.from_dense(dense, make_mesh(), "model", dim=dim)
    layer = fj.SparseDense.from_matrix(w, jnp.asarray(bias, jnp.float16))
    graph, state = nnx.split(layer)
    y = jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, x)
    whole = fj.SparseDense.from_matrix(
        fj.SparseMatrix.from_dense(dense), jnp.asarray(bias, jnp.float16)
    )
    np.testing.assert_allclose(
        y.astype(np.float32), whole(x).astype(np.float32), rtol=2e-3, atol=2e-3
    )


@pytest.mark.parametrize(
    ("shape", "axis", "dim", "message"),
    [
        ((8, 10), "model", "out", "out_features .* 4 equal shards, got 10"),
        ((10, 8), "model", "in", "in_features .* 4 equal shards, got 10"),
        ((8, 8), "data", "in", r"one of the mesh's axes \('model',\), got 'data'"),
        ((8, 8), "model", "rows", "'out' or 'in', got 'rows'"),
        ((8,), "model", "in", r"got shape \(8,\)"),
    ],
)
def test_wrong_shapes(shape, axis, dim, message):
    with pytest.raises(ValueError, match=message):
        fj.ShardedSparseMatrix.from_dense(
            np.zeros(shape, np.float16), make_mesh(), axis, dim=dim
        )


def test_wrong_operands():
    dense, x, bias = operands()
    mesh = make_mesh()
    with pytest.raises(ValueError, match=r"a jax\.sharding\.Mesh, got 'four'"):
        fj.ShardedSparseMatrix.from_dense(dense, "four", "model", dim="in")
    with pytest.raises(ValueError, match="float16 or bfloat16, got float32"):
        fj.ShardedSparseMatrix.from_dense(
            dense.astype(np.float32), mesh, "model", dim="in"
        )
    with pytest.raises(TypeError, match="numpy or JAX array, got list"):
        fj.ShardedSparseMatrix.from_dense([[1.0]], mesh, "model", dim="in")
    w = fj.ShardedSparseMatrix.from_dense(dense, mesh, "model", dim="in")
    with pytest.raises(ValueError, match=r"x of shape \(..., 96\)"):
        fj.sparse_matmul(x[..., :24], w)
    with pytest.raises(ValueError, match=r"bias of shape \(80,\)"):
        fj.sparse_matmul(x, w, bias=bias[:20])
    with pytest.raises(ValueError, match="bias of a float dtype, got int32"):
        fj.sparse_matmul(x, w, bias=bias.astype(np.int32))
    with pytest.raises(TypeError, match="got list"):
        fj.sparse_matmul([1.0], w)
    with pytest.raises(ValueError, match=r"bitmap.*4 shards as"):
        fj.sparse_matmul(x, jax.tree.map(lambda leaf: leaf[:2], w))
    whole = jax.shard_map(
        lambda x, w: fj.sparse_matmul(x, w),
        mesh=mesh,
        in_specs=(P(None, None, "model"), P()),
        out_specs=P(),
    )
    with pytest.raises(ValueError, match=r"pass it to shard_map with P\('model'\)"):
        whole(x, w)


@pytest.mark.parametrize("axes", [{"model": 2}, {"other": 4}, {"model": 8}])
def test_another_mesh(axes):
    dense, x, _ = operands()
    w = fj.ShardedSparseMatrix.from_dense(dense, make_mesh(), "model", dim="in")
    (name,), count = axes, tuple(axes.values())
    other = make_mesh(count, (name,))
    message = rf"mesh in use, {{'{name}': {count[0]}}}, got one for .* {{'model': 4}}"
    with jax.set_mesh(other), pytest.raises(ValueError, match=message):
        jax.jit(fj.sparse_matmul)(x, w)
    if name == "model":
        mapped = jax.shard_map(
            fj.sparse_matmul,
            mesh=other,
            in_specs=(P(None, None, name), P()),
            out_specs=P(),
        )
        with pytest.raises(ValueError, match=message):
            jax.jit(mapped)(x, w)


def test_x_on_other_devices():
    dense, x, _ = operands()
    w = fj.ShardedSparseMatrix.from_dense(dense, make_mesh(), "model", dim="in")
    elsewhere = jax.device_put(x, jax.devices()[-1])
    with pytest.raises(ValueError, match=r"x .*device ids.* w\.bitmap .*device ids"):
        fj.sparse_matmul(elsewhere, w)


def test_repr_of_what_cannot_be_read():
    dense, x, _ = operands()
    w = fj.ShardedSparseMatrix.from_dense(dense, make_mesh(), "model", dim="out")
    for matrix in op_cases.unreadable(w, x, "values"):
        assert repr(matrix).startswith("ShardedSparseMatrix(shape=(96, 80), dtype=")
