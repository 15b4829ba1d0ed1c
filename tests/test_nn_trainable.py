"""Training the nonzero weights of SparseDense layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import flashjax as fj
from flashjax.models import opt
from flashjax.nn_trainable import TrainableSparseDense


class Net(nnx.Module):
    def __init__(self):
        self.first = nnx.Linear(40, 30, rngs=nnx.Rngs(0))
        self.tied = self.first
        self.norm = nnx.LayerNorm(30, rngs=nnx.Rngs(0))
        self.last = nnx.Linear(30, 7, use_bias=False, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.last(self.norm(self.first(x) + self.tied(x)))


@pytest.fixture
def net():
    net = Net()
    for layer in (net.first, net.last):
        layer.kernel.set_value(fj.prune.magnitude(layer.kernel[...], 0.7))
    return fj.sparsify(net)


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(0).standard_normal((6, 40)), jnp.float32)


def loss_fn(model, x):
    return jnp.mean((model(x).astype(jnp.float32) - jnp.float32(1)) ** 2)


def test_trainable_and_freeze_change_nothing(net, x):
    expected = net(x)
    weights = [net.first.kernel[...].to_dense(), net.last.kernel[...].to_dense()]
    model = fj.trainable(net)
    assert model is net
    assert type(net.first) is TrainableSparseDense
    assert net.tied is net.first
    np.testing.assert_array_equal(net(x), expected)
    assert [path for path, _ in fj.nn.sparse_layers(net)] == ["first", "last"]
    np.testing.assert_array_equal(net.first.kernel[...].to_dense(), weights[0])
    assert fj.freeze(net) is net
    assert type(net.first) is fj.SparseDense
    assert net.tied is net.first
    np.testing.assert_array_equal(net(x), expected)
    np.testing.assert_array_equal(net.last.kernel[...].to_dense(), weights[1])


def test_training(net, x):
    fj.trainable(net)
    positions = np.asarray(net.first.kernel[...].to_dense()) != 0
    _, params, _ = nnx.split(net, nnx.Param, ...)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    optimizer = nnx.Optimizer(net, optax.adamw(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(loss_fn)(model, x)
        optimizer.update(model, gradients)
        return loss

    with jax.numpy_dtype_promotion("standard"):
        losses = [float(step(net, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
    assert np.all((np.asarray(net.first.kernel[...].to_dense()) != 0) <= positions)
    trained = net(x)
    fj.freeze(net)
    np.testing.assert_array_equal(net(x), trained)


def test_predicate_and_dtype(net):
    fj.trainable(net, lambda path, layer: path == "last", dtype=jnp.bfloat16)
    assert type(net.first) is fj.SparseDense
    assert net.last.values.dtype == jnp.bfloat16


def test_one_layer(x):
    layer = fj.SparseDense(40, 9, rngs=nnx.Rngs(0))
    expected = layer(x)
    swapped = fj.trainable(layer)
    assert isinstance(swapped, TrainableSparseDense)
    assert swapped.bias.dtype == jnp.float32
    np.testing.assert_array_equal(swapped(x), expected)
    frozen = fj.freeze(swapped)
    assert frozen.bias.dtype == layer.bias.dtype == jnp.float16
    np.testing.assert_array_equal(frozen(x), expected)


def test_a_bias_that_keeps_its_dtype_is_shared(x):
    layer = fj.SparseDense(40, 9, rngs=nnx.Rngs(0))
    for dtype in (jnp.float16, jnp.float32):
        layer.bias = nnx.Param(layer.bias[...].astype(dtype))
        assert TrainableSparseDense(layer, dtype).bias is layer.bias


class TaggedParam(nnx.Param):
    """A kind of its own, as filters of optimizers tell them apart."""


def test_biases_stay_what_they_are():
    """One of two layers, of its own kind and with its metadata."""
    matrix = fj.SparseDense(8, 8, rngs=nnx.Rngs(0)).kernel[...].with_transpose()
    bias = TaggedParam(jnp.ones(8, jnp.float16), mark="x")
    model = nnx.List([fj.SparseDense.from_matrix(matrix, bias) for _ in range(2)])
    for change, dtype in ((fj.trainable, jnp.float32), (fj.freeze, jnp.float16)):
        model = change(model)
        first, second = (layer.bias for layer in model)
        assert first is second
        assert type(first) is TaggedParam
        assert first.get_metadata()["mark"] == "x"
        assert first.dtype == dtype
    assert all(layer.kernel[...].transposed is not None for layer in model)


def test_adam_in_half_precision(x):
    """Whose epsilon is 0 in float16."""
    layers = [fj.SparseDense(40, 40, rngs=nnx.Rngs(i)) for i in range(2)]
    model = fj.trainable(nnx.Sequential(*layers))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)

    def loss(model):
        return jnp.mean((model(x.astype(jnp.float16)) - 1).astype(jnp.float32) ** 2)

    losses = []
    for _ in range(3):
        value, gradients = nnx.value_and_grad(loss)(model)
        with jax.numpy_dtype_promotion("standard"):
            optimizer.update(model, gradients)
        losses.append(float(value))
    assert losses[2] < losses[1] < losses[0]


def test_other_parameters_in_float16_are_named():
    layers = [fj.SparseDense(8, 8, rngs=nnx.Rngs(0))]
    layers.append(nnx.Linear(8, 8, param_dtype=jnp.float16, rngs=nnx.Rngs(1)))
    model = nnx.Sequential(*layers)
    with pytest.warns(UserWarning, match=r"2 parameters are float16 \(layers.1.bias"):
        fj.trainable(model)


@pytest.mark.parametrize("factor", [1e6, np.nan])
def test_freeze_refuses_what_is_not_finite(factor):
    layer = fj.trainable(fj.SparseDense(40, 9, rngs=nnx.Rngs(0)))
    layer.values.set_value(layer.values.get_value() * factor)
    with pytest.raises(
        ValueError, match=r"freeze: values: .*up to 65504 for float16, got \d"
    ):
        fj.freeze(layer)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
@pytest.mark.parametrize("wrong", ["values", "bias"])
@pytest.mark.filterwarnings("ignore:trainable. . parameters are float16")
def test_freeze_changes_nothing_on_an_error(wrong, dtype):
    layers = [fj.SparseDense(8, 8, rngs=nnx.Rngs(i)) for i in range(2)]
    model = fj.trainable(nnx.Sequential(*layers), dtype=dtype)
    variable = getattr(model.layers[1], wrong)
    large = 1e6 if dtype == jnp.float32 else np.nan
    variable.set_value(jnp.full_like(variable.get_value(), large))
    with pytest.raises(
        ValueError, match=rf"freeze: layers.1.{wrong}: .*up to 65504 for float16, got"
    ):
        fj.freeze(model)
    assert [type(layer) for layer in model.layers] == [TrainableSparseDense] * 2


def test_split_and_merge(net, x):
    fj.trainable(net)
    graph, state = nnx.split(net)
    hash(graph)
    np.testing.assert_array_equal(nnx.merge(graph, state)(x), net(x))


def test_save_pretrained_folds(tmp_path):
    config = opt.OPTConfig(
        vocab_size=64,
        hidden_size=32,
        num_layers=1,
        ffn_size=48,
        num_heads=2,
        max_positions=16,
    )
    model = opt.OPT(config, rngs=nnx.Rngs(0))
    model = fj.sparsify(model, lambda path, _: "fc" in path, dtype=jnp.float16)
    fj.trainable(model)
    fc1 = model.layers[0].fc1
    fc1.values.set_value(fc1.values.get_value() * 2)
    opt.save_pretrained(model, None, tmp_path / "model")
    loaded, _ = opt.from_pretrained(tmp_path / "model", jnp.float16, sparse=True)
    expected = fc1.kernel[...].to_dense()
    np.testing.assert_array_equal(loaded.layers[0].fc1.kernel[...].to_dense(), expected)


@pytest.mark.filterwarnings("default")  # of orbax itself
def test_orbax_round_trip_of_a_training_state(net, x, tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint")
    fj.trainable(net)
    optimizer = nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param)
    with jax.numpy_dtype_promotion("standard"):
        optimizer.update(net, nnx.grad(loss_fn)(net, x))
    state = nnx.to_pure_dict(nnx.state((net, optimizer)))
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", state)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(a, b)


def test_errors(net):
    with pytest.raises(TypeError, match=r"trainable: expected an nnx.Module.*got int"):
        fj.trainable(3)
    with pytest.raises(TypeError, match=r"freeze: expected an nnx.Module.*got str"):
        fj.freeze("model")
    with pytest.raises(ValueError, match=r"SparseDense layers, got none: .*sparsify"):
        fj.trainable(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="that the predicate takes, got none"):
        fj.trainable(net, lambda path, layer: False)
    with pytest.raises(ValueError, match="float32, float16 or bfloat16, got int8"):
        fj.trainable(net, dtype="int8")
    assert type(net.first) is fj.SparseDense


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = fj.linen.SparseDense(24, sparsity=0.7, name="first")(x)
        return linen.Dense(5)(x)


def test_linen(x):
    model = LinenNet()
    variables = model.init(jax.random.key(0), x)
    with jax.numpy_dtype_promotion("standard"):
        expected = model.apply(variables, x)
        trained = fj.linen.trainable(variables)
        np.testing.assert_array_equal(model.apply(trained, x), expected)

        def loss(params):
            return jnp.mean(model.apply({**trained, "params": params}, x) ** 2)

        before = loss(trained["params"])
        gradient = jax.jit(jax.grad(loss))(trained["params"])
        assert gradient["first"]["kernel"].shape[1:] == (16, 32, 2)
        trained["params"] = jax.tree.map(
            lambda p, g: p - 0.05 * g.astype(p.dtype), trained["params"], gradient
        )
        assert loss(trained["params"]) < before
        frozen = fj.linen.freeze(trained)
        # Products round the values, but not the bias, to what freeze rounds both to.
        bias = trained["params"]["first"]["bias"]
        trained["params"]["first"]["bias"] = bias.astype("float16").astype(bias.dtype)
        assert jax.tree.structure(frozen["params"]) == jax.tree.structure(
            variables["params"]
        )
        np.testing.assert_array_equal(model.apply(frozen, x), model.apply(trained, x))
    # All are of the dtype that they had.
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, variables["params"])
    assert jax.tree.map(lambda leaf: leaf.dtype, frozen["params"]) == dtypes
    assert frozen["sparse"]["first"].keys() == variables["sparse"]["first"].keys()
    trained["params"]["first"]["bias"] += 1e6
    with pytest.warns(UserWarning, match="linen.trainable: 2 parameters are float16"):
        halves = fj.linen.trainable(variables, jnp.float16)
    halves["params"]["first"]["bias"] += np.float16(np.nan)
    for wrong in (trained, halves):
        with pytest.raises(ValueError, match=r"linen.freeze: first.bias: .*up to 655"):
            fj.linen.freeze(wrong)
    with pytest.raises(ValueError, match=r"linen.trainable: expected .*got none in"):
        fj.linen.trainable({"params": {}})
