"""SparseDense in Linen."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from flashjax import linen as fj_linen

from .nn_support import HALVES, assert_close, random


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


def test_linen_features_and_bias_fit_the_kernel():
    variables = fj_linen.SparseDense.params_from_dense(np.ones((16, 20)))
    x = jnp.ones((3, 16))
    with pytest.raises(ValueError, match=r"kernel of 21 features, .*\(16, 20\)"):
        fj_linen.SparseDense(21, use_bias=False).apply(variables, x)
    with pytest.raises(ValueError, match=r"bias: expected shape \(20,\) .* \(21,\)"):
        fj_linen.SparseDense.params_from_dense(np.ones((16, 20)), np.ones(21))
    for function in (fj_linen.trainable, fj_linen.freeze):
        with pytest.raises(TypeError, match="variables of a model, got SparseDense"):
            function(fj_linen.SparseDense(21))


def test_what_is_trained_is_stored_by_flax():
    x = jnp.ones((3, 16), jnp.float16)
    variables = fj_linen.SparseDense(20).init(jax.random.key(0), x)
    trained = fj_linen.trainable(variables)
    data = flax.serialization.to_bytes(trained)
    restored = flax.serialization.from_bytes(trained, data)
    assert jax.tree.structure(restored) == jax.tree.structure(trained)
    jax.tree.map(np.testing.assert_array_equal, restored, trained)
    fj_linen.freeze(restored)
    state = flax.serialization.to_state_dict(trained["sparse"]["kernel"])
    state.pop("live")
    with pytest.raises(ValueError, match="SparsePositions: expected the arrays bitmap"):
        flax.serialization.from_state_dict(trained["sparse"]["kernel"], state)


def test_linen_wrong_inputs():
    layer = fj_linen.SparseDense(features=8)
    variables = layer.init(jax.random.key(0), jnp.ones((2, 4), jnp.float16))
    with pytest.raises(ValueError, match=r"got \(2, 5\)"):
        layer.apply(variables, jnp.ones((2, 5), jnp.float16))
