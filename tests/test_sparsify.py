"""Swapping the layers of a model for sparse ones."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

from flashjax import prune
from flashjax.nn import SparseDense, parameter_bytes, sparse_layers, sparsify

from .nn_support import assert_close


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
    with pytest.warns(UserWarning, match="got none: it is as it was"):
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


def test_sparsify_in_jit():
    with pytest.raises(ValueError, match="expected a kernel with values"):
        nnx.jit(sparsify)(Model(nnx.Rngs(0)))


def test_unpruned_layers_are_told():
    model = nnx.List([nnx.Linear(256, 512, rngs=nnx.Rngs(i)) for i in range(2)])
    with pytest.warns(
        UserWarning,
        match="2 of 2 that take more memory packed than dense, first 0: 0% zeros, "
        r"\d+ bytes packed, 262144 dense",
    ):
        sparsify(model)


def test_pruned_layers_are_not_told(recwarn):
    layer = nnx.Linear(256, 512, rngs=nnx.Rngs(0))
    layer.kernel[...] = prune.magnitude(layer.kernel[...], 0.5)
    sparsify(nnx.List([layer]))
    assert not recwarn.list


def test_a_model_without_linear_layers_is_told():
    for model in (
        nnx.LayerNorm(4, rngs=nnx.Rngs(0)),
        nnx.List([nnx.LayerNorm(8, rngs=nnx.Rngs(0))]),
    ):
        with pytest.warns(UserWarning, match="expected a model with nnx.Linear layers"):
            assert sparsify(model) is model
