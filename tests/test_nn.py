"""SparseDense in NNX, and the forms in which it is stored."""

import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from flashjax import (
    SparseMatrix,
    TrainableMatrix,
    checkpoint,
    prune,
    sparse_matmul,
)
from flashjax import linen as fj_linen
from flashjax.nn import SparseDense, SparseWeight, sparsify

from .nn_support import HALVES, assert_close, random


def pruned_linear(inputs, outputs, param_dtype, sparsity=0.7, **kwargs):
    linear = nnx.Linear(
        inputs, outputs, param_dtype=param_dtype, rngs=nnx.Rngs(0), **kwargs
    )
    linear.kernel.set_value(prune.magnitude(linear.kernel[...], sparsity))
    if linear.bias is not None:
        linear.bias.set_value(random((outputs,), param_dtype, 1))
    return linear


# --- SparseDense --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("use_bias", [True, False])
def test_random_layer(dtype, use_bias):
    layer = SparseDense(
        100,
        37,
        use_bias=use_bias,
        param_dtype=dtype,
        sparsity=0.75,
        bias_init=nnx.initializers.ones,
        rngs=nnx.Rngs(0),
    )
    matrix = layer.kernel[...]
    assert isinstance(layer.kernel, SparseWeight)
    assert (matrix.shape, matrix.dtype) == ((100, 37), dtype)
    assert matrix.sparsity == pytest.approx(0.75, abs=0.01)
    assert (layer.bias is not None) == use_bias == layer.use_bias
    x = random((2, 3, 100), dtype)
    y = layer(x)
    assert y.dtype == dtype
    dense = np.asarray(matrix.to_dense(), np.float32)
    assert_close(y, np.asarray(x, np.float32) @ dense + use_bias, dtype)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(None, "float16"), ("bfloat16", "bfloat16"), ("float32", "float16")],
)
def test_parameters_have_the_dtype_where_they_can(dtype, expected):
    layer = SparseDense(8, 4, dtype=dtype, rngs=nnx.Rngs(0))
    assert layer.kernel.get_value().dtype == layer.bias.dtype == expected
    twin = fj_linen.SparseDense(features=4, dtype=dtype)
    variables = twin.init(jax.random.key(0), random((2, 8), expected))
    assert variables["params"]["bias"].dtype == expected
    assert variables["sparse"]["kernel"].dtype == expected


def test_same_rngs_as_linear():
    sparse = SparseDense(64, 32, sparsity=0.0, rngs=nnx.Rngs(3))
    dense = nnx.Linear(64, 32, rngs=nnx.Rngs(3))
    expected = dense.kernel[...].astype(jnp.float16)
    assert jnp.array_equal(sparse.kernel[...].to_dense(), expected)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1)])
def test_tiny_layers(shape):
    layer = SparseDense(*shape, rngs=nnx.Rngs(0))
    assert layer(jnp.ones((2, shape[0]), jnp.float16)).shape == (2, shape[1])


@pytest.mark.parametrize("kernel_dtype", [*HALVES, jnp.float32])
@pytest.mark.parametrize("use_bias", [True, False])
def test_from_linear(kernel_dtype, use_bias):
    linear = pruned_linear(48, 20, kernel_dtype, use_bias=use_bias)
    layer = SparseDense.from_linear(linear)
    half = jnp.float16 if kernel_dtype == jnp.float32 else kernel_dtype
    expected_kernel = linear.kernel[...].astype(half)
    assert jnp.array_equal(layer.kernel[...].to_dense(), expected_kernel)
    if use_bias:
        assert layer.bias.dtype == kernel_dtype
        assert layer.bias is not linear.bias
    x = random((5, 48), kernel_dtype)
    y = layer(x)
    assert y.dtype == linear(x).dtype
    assert_close(y, linear(x), half)


@pytest.mark.parametrize("dtype", [*HALVES, jnp.float32, None])
@pytest.mark.parametrize("x_dtype", [*HALVES, jnp.float32])
@pytest.mark.parametrize("kernel_dtype", HALVES)
def test_dtypes_are_those_of_linear(dtype, x_dtype, kernel_dtype):
    linear = pruned_linear(48, 20, kernel_dtype, dtype=dtype)
    layer = SparseDense.from_linear(linear)
    x = random((5, 48), x_dtype)
    with jax.numpy_dtype_promotion("standard"):
        expected = linear(x)
    y = layer(x)
    assert y.dtype == expected.dtype
    assert_close(y, expected, jnp.bfloat16)


def test_bias_takes_part_in_promotion():
    matrix = SparseMatrix.from_dense(random((8, 4), jnp.float16))
    layer = SparseDense.from_matrix(matrix, jnp.ones((4,), jnp.float32))
    assert layer(jnp.ones((2, 8), jnp.float16)).dtype == jnp.float32


def test_integer_inputs():
    layer = SparseDense(8, 4, rngs=nnx.Rngs(0))
    y = layer(jnp.ones((2, 8), jnp.int32))
    assert y.dtype == jnp.float16
    assert jnp.array_equal(y, layer(jnp.ones((2, 8), jnp.float16)))


def test_preferred_element_type():
    linear = pruned_linear(
        48, 20, jnp.float16, use_bias=False, preferred_element_type=jnp.float32
    )
    assert SparseDense.from_linear(linear)(random((5, 48), jnp.float16)).dtype == (
        jnp.float32
    )


@pytest.mark.parametrize("implementation", ["cpu", "xla", None])
def test_implementation(implementation):
    linear = pruned_linear(48, 20, jnp.float16)
    layer = SparseDense.from_linear(linear, implementation=implementation)
    x = random((5, 48), jnp.float16)
    assert_close(nnx.jit(lambda m, x: m(x))(layer, x), linear(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"param_dtype": jnp.float32}, "float16 or bfloat16, got float32"),
        ({"sparsity": 1.5}, "from 0 to 1, got 1.5"),
        ({"sparsity": float("nan")}, "from 0 to 1, got nan"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparseDense(4, 4, **arguments, rngs=nnx.Rngs(0))


def test_matrices_are_checked():
    matrix = SparseMatrix.from_dense(np.eye(8, dtype=np.float16))
    with pytest.raises(TypeError, match="kernel: expected a SparseMatrix, got ndarray"):
        SparseDense.from_matrix(np.eye(8))
    with pytest.raises(ValueError, match="kernel: expected one SparseMatrix, got a st"):
        SparseDense.from_matrix(SparseMatrix.stack([matrix, matrix]))
    with pytest.raises(ValueError, match="bias: expected a floating dtype, got int32"):
        SparseDense.from_matrix(matrix, np.ones(8, np.int32))
    for make in (
        lambda: SparseDense.from_matrix(matrix, implementation="fast"),
        lambda: sparsify(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), implementation="fast"),
    ):
        with pytest.raises(ValueError, match="expected implementation to be one of"):
            make()


@pytest.mark.parametrize("dtype", [None, "float64"])
def test_float64(dtype, x64):
    """Computed in float32, as all products are."""
    linear = nnx.Linear(8, 8, dtype=dtype, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 8))
    with jax.numpy_dtype_promotion("standard"):
        y, expected = SparseDense.from_linear(linear)(x), linear(x)
    assert y.dtype == expected.dtype == jnp.float64
    np.testing.assert_allclose(y, expected, rtol=1e-2, atol=1e-2)


def test_no_rngs():
    with pytest.raises(ValueError, match=r"expected rngs to be nnx\.Rngs, got None"):
        SparseDense(4, 4, rngs=None)


def test_negative_size():
    with pytest.raises(ValueError, match="at least 0, got"):
        SparseDense(4, -4, rngs=nnx.Rngs(0))


def test_wrong_bias_and_inputs():
    matrix = SparseMatrix.from_dense(random((8, 4), jnp.float16))
    with pytest.raises(ValueError, match=r"expected shape \(4,\).*got \(8,\)"):
        SparseDense.from_matrix(matrix, jnp.ones((8,), jnp.float16))
    with pytest.raises(ValueError, match=r"\(\.\.\., 8\).*got \(2, 4\)"):
        SparseDense.from_matrix(matrix)(jnp.ones((2, 4), jnp.float16))


@pytest.mark.parametrize("transform", [nnx.eval_shape, nnx.jit])
def test_creation_cannot_be_transformed(transform):
    with pytest.raises(ValueError, match=r"outside.*from_matrix"):
        transform(lambda: SparseDense(4, 4, rngs=nnx.Rngs(0)))()


def test_split_merge_jit_grad():
    layer = SparseDense.from_linear(pruned_linear(48, 20, jnp.float16))
    x = random((5, 48), jnp.float16)
    expected = layer(x)
    graph, state = nnx.split(layer)
    hash(graph)
    assert jnp.array_equal(nnx.merge(graph, state)(x), expected)
    _, params, rest = nnx.split(layer, nnx.Param, ...)
    assert list(nnx.to_flat_state(params).paths) == [("bias",)]
    assert isinstance(rest["kernel"], SparseWeight)

    def loss(layer, x):
        return jnp.sum(layer(x).astype(jnp.float32) ** 2)

    gradient = nnx.jit(nnx.grad(loss))(layer, x)
    assert list(gradient) == ["bias"]
    assert_close(gradient["bias"][...], 2 * expected.astype(jnp.float32).sum(axis=0))
    dx = jax.grad(lambda x: loss(layer, x))(x)
    dense = np.asarray(layer.kernel[...].to_dense(), np.float32)
    assert_close(dx, 2 * np.asarray(expected, np.float32) @ dense.T, jnp.bfloat16)


def test_optimizer_trains_the_bias():
    layer = SparseDense.from_linear(pruned_linear(48, 20, jnp.float16))
    before = layer.kernel[...]
    optimizer = nnx.Optimizer(layer, optax.sgd(0.1), wrt=nnx.Param)
    x = random((5, 48), jnp.float16)

    def loss(layer):
        return jnp.mean(layer(x).astype(jnp.float32) ** 2)

    first = loss(layer)
    for _ in range(3):
        optimizer.update(layer, nnx.grad(loss)(layer))
    assert loss(layer) < first
    assert jnp.array_equal(layer.kernel[...].values, before.values)


def test_tree_and_scan_and_vmap():
    layer = SparseDense.from_linear(pruned_linear(20, 20, jnp.float16))
    state = nnx.state(layer)
    copied = jax.tree.map(lambda leaf: leaf + np.asarray(0, leaf.dtype), state)
    assert jax.tree.structure(copied) == jax.tree.structure(state)
    x = random((3, 5, 20), jnp.float16)
    assert_close(jax.vmap(layer)(x), layer(x))
    carry, _ = jax.lax.scan(lambda x, _: (layer(x), None), x, length=2)
    assert_close(carry, layer(layer(x)), jnp.bfloat16)


@pytest.mark.parametrize("wrap", [lambda matrix: matrix, nnx.Param, nnx.data])
def test_matrix_in_a_module_of_ones_own(wrap):
    class Own(nnx.Module):
        def __init__(self):
            self.w = wrap(SparseMatrix.from_dense(random((8, 4), jnp.float16)))

    graph, state = nnx.split(Own())
    assert len(jax.tree.leaves(state)) == 4
    assert "SparseMatrix" in repr(nnx.merge(graph, state))


@pytest.mark.parametrize("wrap", [nnx.Param, SparseWeight])
def test_a_variable_stands_for_its_matrix(wrap):
    w = SparseMatrix.from_dense(random((8, 4), jnp.float16))
    x = random((2, 8), jnp.float16)
    bias = jnp.arange(4, dtype=jnp.float32)
    np.testing.assert_array_equal(
        sparse_matmul(x, wrap(w), bias=nnx.Param(bias)), sparse_matmul(x, w, bias=bias)
    )


def test_flax_knows_the_matrix_from_the_start():
    code = """
from flax import nnx
import flashjax as fj
assert nnx.is_data(fj.SparseMatrix.__new__(fj.SparseMatrix))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_repr_shows_no_arrays():
    layer = SparseDense(64, 32, rngs=nnx.Rngs(0))
    text = repr(layer)
    assert "SparseMatrix(shape=(64, 32)" in text
    assert len(text) < 1000


def test_display(capsys):
    nnx.display(SparseDense(64, 32, rngs=nnx.Rngs(0)))
    assert "SparseMatrix" in capsys.readouterr().out


def test_infinities_and_nan_survive():
    linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    kernel = jnp.asarray([[np.inf, 0], [-np.inf, np.nan]], jnp.float32)
    linear.kernel.set_value(kernel)
    dense = SparseDense.from_linear(linear).kernel[...].to_dense()
    np.testing.assert_array_equal(np.asarray(dense, np.float32), kernel)


def test_largest_values_round_down():
    linear = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    linear.kernel.set_value(jnp.full((1, 1), 65519.0))
    dense = SparseDense.from_linear(linear).kernel[...].to_dense()
    assert dense.item() == 65504


def test_linear_with_its_own_product():
    linear = nnx.Linear(
        4, 4, dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k), rngs=nnx.Rngs(0)
    )
    with pytest.raises(
        ValueError, match=r"expected an nnx\.Linear with the default dot"
    ):
        sparsify(nnx.List([linear]))
    with pytest.raises(ValueError, match=r"expected an nnx\.Linear, got LayerNorm"):
        SparseDense.from_linear(nnx.LayerNorm(4, rngs=nnx.Rngs(0)))


# --- Stores -------------------------------------------------------------------------


def same_matrix(a, b):
    return (a.shape, a.dtype) == (b.shape, b.dtype) and all(
        np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("dtype", HALVES)
def test_canonical_arrays(dtype):
    matrix = SparseDense(70, 33, param_dtype=dtype, rngs=nnx.Rngs(0)).kernel[...]
    arrays = checkpoint.to_arrays(matrix)
    assert all(isinstance(array, np.ndarray) for array in arrays.values())
    assert arrays["shape"].tolist() == [33, 70]
    assert same_matrix(checkpoint.from_arrays(arrays), matrix)
    tree = {"a": [matrix, np.ones(2)], "b": None}
    exported = checkpoint.export_tree(tree)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(exported))
    imported = checkpoint.import_tree(exported)
    assert jax.tree.structure(imported) == jax.tree.structure(tree)
    assert same_matrix(imported["a"][0], matrix)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flashjax_sparse": np.int32(2)}, "version: expected 1, got 2"),
        ({"shape": np.array([1, 2, 3])}, "shape: expected"),
        ({"shape": np.array([-33, 70])}, "shape: expected"),
        ({"shape": np.array([70, 33, 0])}, "shape: expected"),
        ({"values": np.zeros(3, np.float32)}, "float16 or bfloat16, got float32"),
        ({"bitmap": np.zeros(3, np.uint8)}, "bitmap shape"),
        ({"extra": np.zeros(3)}, "arrays: expected"),
    ],
)
def test_canonical_arrays_are_checked(change, message):
    matrix = SparseDense(70, 33, rngs=nnx.Rngs(0)).kernel[...]
    arrays = checkpoint.to_arrays(matrix) | change
    with pytest.raises(checkpoint.CheckpointError, match=message):
        checkpoint.from_arrays(arrays)


@pytest.mark.filterwarnings("default")  # of orbax itself
@pytest.mark.parametrize("canonical", [True, False])
def test_orbax(tmp_path, canonical):
    orbax = pytest.importorskip("orbax.checkpoint")
    layer = SparseDense(70, 33, rngs=nnx.Rngs(0))
    state = nnx.to_pure_dict(nnx.state(layer))
    with orbax.StandardCheckpointer() as checkpointer:
        if canonical:
            checkpointer.save(tmp_path / "x", checkpoint.export_tree(state))
            checkpointer.wait_until_finished()
            restored = checkpoint.import_tree(checkpointer.restore(tmp_path / "x"))
        else:
            checkpointer.save(tmp_path / "x", state)
            checkpointer.wait_until_finished()
            abstract = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding),
                state,
            )
            restored = checkpointer.restore(tmp_path / "x", abstract)
    assert same_matrix(restored["kernel"], state["kernel"])
    other = SparseDense(70, 33, rngs=nnx.Rngs(1))
    nnx.update(other, restored)
    x = random((2, 70), jnp.float16)
    assert jnp.array_equal(other(x), layer(x))


def test_what_has_no_canonical_arrays():
    w = SparseMatrix.from_dense(np.eye(32, dtype=np.float16))
    trained = TrainableMatrix.from_sparse(w)
    for wrong in (trained, trained.positions):
        with pytest.raises(
            TypeError, match=r"export_tree: a\.0: .* got (Tr|SparsePos).*freeze\(\)"
        ):
            checkpoint.export_tree({"a": [wrong]})
    with pytest.raises(ValueError, match=r"export_tree: a\.0: .* got a stack"):
        checkpoint.export_tree({"a": [SparseMatrix.stack([w, w])]})


def test_pickle():
    matrix = SparseDense(70, 33, rngs=nnx.Rngs(0)).kernel[...]
    assert same_matrix(pickle.loads(pickle.dumps(matrix)), matrix)
