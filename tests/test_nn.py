"""SparseDense in NNX and Linen, and sparsify."""

import pickle
import subprocess
import sys
from typing import NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from flashjax import SparseMatrix, checkpoint, prune, sparse_matmul
from flashjax import linen as fj_linen
from flashjax.nn import (
    SparseDense,
    SparseWeight,
    parameter_bytes,
    sparse_layers,
    sparsify,
)

HALVES = [jnp.float16, jnp.bfloat16]


def random(shape, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def pruned_linear(inputs, outputs, param_dtype, sparsity=0.7, **kwargs):
    linear = nnx.Linear(
        inputs, outputs, param_dtype=param_dtype, rngs=nnx.Rngs(0), **kwargs
    )
    linear.kernel.set_value(prune.magnitude(linear.kernel[...], sparsity))
    if linear.bias is not None:
        linear.bias.set_value(random((outputs,), param_dtype, 1))
    return linear


def assert_close(y, expected, dtype=jnp.float16):
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    assert y.shape == expected.shape
    np.testing.assert_allclose(
        np.asarray(y, np.float32),
        np.asarray(expected, np.float32),
        rtol=tolerance,
        atol=tolerance * 8,
    )


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


def test_pickle():
    matrix = SparseDense(70, 33, rngs=nnx.Rngs(0)).kernel[...]
    assert same_matrix(pickle.loads(pickle.dumps(matrix)), matrix)


# --- Linen --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("use_bias", [True, False])
def test_linen(dtype, use_bias):
    layer = fj_linen.SparseDense(features=37, use_bias=use_bias, param_dtype=dtype)
    x = random((2, 100), dtype)
    variables = layer.init(jax.random.key(0), x)
    matrix = variables["sparse"]["kernel"]
    assert matrix.shape == (100, 37)
    assert matrix.sparsity == pytest.approx(0.8, abs=0.01)
    assert set(variables) == ({"params", "sparse"} if use_bias else {"sparse"})
    y = jax.jit(layer.apply)(variables, x)
    assert y.dtype == dtype
    dense = np.asarray(matrix.to_dense(), np.float32)
    assert_close(y, np.asarray(x, np.float32) @ dense, dtype)


def test_linen_from_dense():
    dense = linen.Dense(20)
    x = random((5, 48), jnp.float32)
    params = dense.init(jax.random.key(0), x)["params"]
    variables = fj_linen.SparseDense.params_from_dense(
        params["kernel"], params["bias"] + 1
    )
    layer = fj_linen.SparseDense(features=20)
    params["bias"] = params["bias"] + 1
    assert_close(layer.apply(variables, x), dense.apply({"params": params}, x))
    variables = layer.params_from_dense(params["kernel"])
    assert variables["params"] == {}


def test_linen_in_a_model():
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = fj_linen.SparseDense(features=16)(x)
            return fj_linen.SparseDense(features=8, name="head")(jax.nn.relu(x))

    model = Model()
    x = random((5, 48), jnp.float16)
    variables = model.init(jax.random.key(0), x)
    assert set(variables["sparse"]) == {"SparseDense_0", "head"}

    def loss(params):
        y = model.apply(variables | {"params": params}, x)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    gradient = jax.grad(loss)(variables["params"])
    assert gradient["head"]["bias"].shape == (8,)

    stored = flax.serialization.to_bytes(variables)
    other = model.init(jax.random.key(1), x)
    restored = flax.serialization.from_bytes(other, stored)
    assert jnp.array_equal(model.apply(restored, x), model.apply(variables, x))


def test_linen_init_cannot_be_transformed():
    layer = fj_linen.SparseDense(features=8)
    with pytest.raises(ValueError, match=r"outside.*params_from_dense"):
        jax.jit(layer.init)(jax.random.key(0), jnp.ones((2, 4), jnp.float16))


def test_linen_wrong_inputs():
    layer = fj_linen.SparseDense(features=8)
    variables = layer.init(jax.random.key(0), jnp.ones((2, 4), jnp.float16))
    with pytest.raises(ValueError, match=r"got \(2, 5\)"):
        layer.apply(variables, jnp.ones((2, 5), jnp.float16))


# --- sparsify -----------------------------------------------------------------------


class Block(nnx.Module):
    def __init__(self, rngs):
        self.fc1 = nnx.Linear(16, 24, rngs=rngs)
        self.fc2 = nnx.Linear(24, 16, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.fc2(jax.nn.relu(self.fc1(x)))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(10, 16, rngs=rngs)
        self.layers = nnx.List([Block(rngs) for _ in range(2)])
        self.named = nnx.Dict(a=nnx.Linear(16, 16, rngs=rngs))
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(self.named["a"](x)))


PATHS = [
    "head",
    "layers.0.fc1",
    "layers.0.fc2",
    "layers.1.fc1",
    "layers.1.fc2",
    "named.a",
]


def test_sparsify_everything():
    model = Model(nnx.Rngs(0))
    tokens = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)
    expected = model(tokens)
    seen = []
    result = sparsify(model, lambda path, layer: not seen.append((path, layer)))
    assert result is model
    assert sorted(path for path, _ in seen) == PATHS
    assert all(type(layer) is nnx.Linear for _, layer in seen)
    assert sorted(path for path, _ in sparse_layers(model)) == PATHS
    assert model.head.param_dtype == jnp.float16
    assert model.head.bias.dtype == jnp.float32
    assert_close(model(tokens), expected)
    assert_close(nnx.jit(lambda m, t: m(t))(model, tokens), expected)
    assert parameter_bytes(model) == sum(
        leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model))
    )
    assert sparsify(model) is model  # nothing left to swap


@pytest.mark.parametrize("model", [3, linen.Dense(4), None])
def test_sparsify_refuses_what_is_not_of_nnx(model):
    with pytest.raises(TypeError, match=type(model).__name__):
        sparsify(model)


def test_sparsify_some():
    model = Model(nnx.Rngs(0))
    sparsify(model, lambda path, _: path.endswith("fc2"), jnp.bfloat16)
    assert [path for path, _ in sparse_layers(model)] == [
        "layers.0.fc2",
        "layers.1.fc2",
    ]
    assert model.layers[0].fc2.kernel[...].dtype == jnp.bfloat16
    assert type(model.layers[0].fc1) is nnx.Linear


def test_sparsify_nothing():
    model = Model(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"none of 6 \(.*head"):
        sparsify(model, lambda path, _: path == "layers.7.fc1")
    with pytest.raises(ValueError, match="none of 0"):
        sparsify(nnx.LayerNorm(4, rngs=nnx.Rngs(0)), lambda path, _: True)
    norm = nnx.LayerNorm(4, rngs=nnx.Rngs(0))
    assert sparsify(norm) is norm


class Pair(NamedTuple):
    first: nnx.Module
    second: nnx.Module


def test_sparsify_containers():
    rngs = nnx.Rngs(0)

    class Holder(nnx.Module):
        def __init__(self):
            self.pair = nnx.data(Pair(nnx.Linear(4, 4, rngs=rngs), Block(rngs)))
            self.listed = nnx.data([nnx.Linear(4, 4, rngs=rngs)])
            self.mapped = nnx.data({"x": (nnx.Linear(4, 4, rngs=rngs),)})

    holder = sparsify(Holder())
    paths = [
        "listed.0",
        "mapped.x.0",
        "pair.first",
        "pair.second.fc1",
        "pair.second.fc2",
    ]
    assert sorted(path for path, _ in sparse_layers(holder)) == sorted(paths)
    assert isinstance(holder.pair, Pair)
    nnx.split(holder)


def test_sparsify_roots():
    linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    assert isinstance(sparsify(linear), SparseDense)
    assert isinstance(sparsify((linear,))[0], SparseDense)
    sequential = nnx.Sequential(linear, jax.nn.relu)
    x = jnp.ones((2, 4))
    expected = sequential(x)
    assert_close(sparsify(sequential)(x), expected)


def test_sparsify_shared_layers():
    class Shared(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(4, 4, rngs=rngs)
            self.b = self.a
            self.inner = nnx.List([self.a])

    model = Shared(nnx.Rngs(0))
    sparsify(model, lambda path, _: path == "inner.0")
    assert isinstance(model.a, SparseDense)
    assert model.a is model.b is model.inner[0]


def test_sparsify_cycles():
    class Node(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 4, rngs=rngs)
            self.me = self

    model = sparsify(Node(nnx.Rngs(0)))
    assert model.me is model
    assert isinstance(model.linear, SparseDense)


def test_sparsify_leaves_subclasses_alone():
    class Special(nnx.Linear):
        def __call__(self, x):
            return super().__call__(x) + 1

    model = nnx.List([Special(4, 4, rngs=nnx.Rngs(0))])
    assert type(sparsify(model)[0]) is Special


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (1e5, None, r"layers\.1\.fc1: expected magnitudes up to 65504 .* got 100000"),
        (1.0, jnp.float32, "float16 or bfloat16, got float32"),
    ],
)
def test_sparsify_refuses_and_changes_nothing(value, dtype, message):
    model = Model(nnx.Rngs(0))
    model.layers[1].fc1.kernel.set_value(jnp.full((16, 24), value))
    with pytest.raises(ValueError, match=message):
        sparsify(model, dtype=dtype)
    assert not list(sparse_layers(model))


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


def test_sparsify_in_jit():
    with pytest.raises(ValueError, match="expected a kernel with values"):
        nnx.jit(sparsify)(Model(nnx.Rngs(0)))


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
