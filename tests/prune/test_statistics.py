import jax
import jax.numpy as jnp
import numpy as np
import prune_reference as reference
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from mesh_support import make_mesh

import flashjax as fj

Statistics = fj.prune.InputStatistics


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_sums_over_batches(dtype):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 20, 13)).astype(jnp.dtype(dtype))
    stats = Statistics.zeros(13)
    update = jax.jit(Statistics.update, donate_argnums=0)
    for batch in x:
        stats = update(stats, batch)
    flat = x.reshape(-1, 13).astype(np.float64)
    assert stats.gram.dtype == jnp.float32
    np.testing.assert_allclose(stats.gram, flat.T @ flat, rtol=1e-5, atol=1e-4)
    assert int(stats.count) == 60


def test_masked_inputs_do_not_count():
    x = np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32)
    mask = np.array([[True] * 5, [True, True, False, False, False]])
    holes = np.where(mask[..., None], x, np.nan)
    stats = Statistics.zeros(4).update(holes, mask)
    expected = Statistics.zeros(4).update(x[mask])
    np.testing.assert_allclose(stats.gram, expected.gram, rtol=1e-6)
    assert int(stats.count) == int(expected.count) == 7


def test_half_precision_does_not_overflow():
    stats = Statistics.zeros(2).update(jnp.full((4, 2), 60000, jnp.float16))
    np.testing.assert_allclose(stats.gram, 4 * 60000.0**2, rtol=1e-2)


@pytest.mark.parametrize(
    ("x", "mask", "message"),
    [
        (np.ones((2, 3), np.float32), None, r"shape \(..., 4\), got \(2, 3\)"),
        (np.float32(1), None, r"got \(\)"),
        (np.ones((2, 4), np.int32), None, "float dtype, got int32"),
        (np.ones((2, 4), np.float32), np.ones(3, bool), r"bool mask of shape \(2,\)"),
        (np.ones((2, 4), np.float32), np.ones(2), "got float32 of shape"),
    ],
)
def test_wrong_inputs(x, mask, message):
    with pytest.raises(ValueError, match=message):
        Statistics.zeros(4).update(x, mask)


@pytest.mark.parametrize(
    ("K", "error", "message"),
    [
        ((64, 48), TypeError, "K to be an int, got tuple"),
        (8.0, TypeError, "K to be an int, got float"),
        (True, TypeError, "K to be an int, got bool"),
        (-1, ValueError, "K of at least 0, got -1"),
    ],
)
def test_wrong_numbers_of_features(K, error, message):
    with pytest.raises(error, match=f"InputStatistics.zeros: expected {message}"):
        Statistics.zeros(K)


@pytest.mark.parametrize("K", [0, 3, np.int64(3), np.uint8(3), np.array(3)])
def test_numbers_of_features(K):
    assert Statistics.zeros(K).gram.shape == (K, K)


def test_masked_arrays_are_refused():
    x = np.ma.masked_array(np.ones((2, 4), np.float32), np.zeros((2, 4), bool))
    with pytest.raises(TypeError, match="without a mask, got MaskedArray"):
        Statistics.zeros(4).update(x)
    with pytest.raises(TypeError, match="without a mask, got MaskedArray"):
        Statistics.zeros(4).update(x.data, np.ma.masked_array([True, True]))


def test_are_equal_to_themselves_only():
    stats = Statistics.zeros(4)
    assert stats == stats
    assert stats != Statistics.zeros(4)
    assert len({stats, stats, Statistics.zeros(4)}) == 2


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("in_context", [False, True])
@pytest.mark.parametrize("update", [Statistics.update, jax.jit(Statistics.update)])
@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((8, 96), P("data")),
        ((8, 96), P(None, "data")),
        ((8, 96), P("data", "model")),
        ((8, 96), P(("data", "model"))),
        ((2, 4, 96), P("data", "model")),
        ((3, 4, 96), P(None, "data")),
    ],
)
def test_split_inputs(shape, spec, update, in_context, kind):
    mesh = make_mesh((2, 2), ("data", "model"), kind)
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(np.float32)
    mask = rng.random(shape[:-1]) < 0.7
    split = jax.device_put(x, NamedSharding(mesh, spec))
    where = NamedSharding(mesh, P(*spec[: x.ndim - 1]))
    with jax.set_mesh(mesh if in_context else jax.sharding.get_mesh()):
        stats = update(Statistics.zeros(96), split)
        for some in (mask, jax.device_put(mask, where)):
            stats = update(stats, split, some)
        stats = update(stats, x)
    rows = x.reshape(-1, 96)
    expected = 2 * rows.T @ rows + 2 * x[mask].T @ x[mask]
    np.testing.assert_allclose(stats.gram, expected, rtol=1e-4, atol=1e-4)
    assert int(stats.count) == 2 * mask.size + 2 * mask.sum()
    if kind == AxisType.Explicit:
        assert stats.gram.sharding.is_fully_replicated


@pytest.mark.parametrize("seed", range(3))
def test_reconstruction_error(seed):
    X, dense = reference.correlated_layer(seed)
    stats = Statistics.zeros(len(dense)).update(X)
    pruned = fj.prune.magnitude(dense, 0.5)
    expected = reference.reconstruction_error(dense, pruned, X)
    error = fj.prune.reconstruction_error(dense, pruned, stats)
    assert isinstance(error, float)
    assert error == pytest.approx(expected, rel=1e-4)
    assert fj.prune.reconstruction_error(dense, dense, stats) == 0
    assert fj.prune.reconstruction_error(0 * dense, dense, stats) == np.inf


def test_reconstruction_error_of_other_shapes():
    stats = Statistics.zeros(4).update(np.ones((1, 4), np.float32))
    with pytest.raises(ValueError, match=r"one shape, got \(4, 3\) and \(4, 2\)"):
        fj.prune.reconstruction_error(
            np.ones((4, 3), np.float32), np.ones((4, 2), np.float32), stats
        )


def test_reconstruction_error_over_other_devices():
    here, there = make_mesh((2,)).devices.flat
    dense = jax.device_put(jnp.ones((4, 3)), here)
    stats = Statistics.zeros(4).update(np.ones((1, 4), np.float32))
    assert fj.prune.reconstruction_error(dense, 0 * dense, stats) == 1
    message = f"expected dense and pruned on the same devices, got dense on {here} and "
    with pytest.raises(ValueError, match=message + f"pruned on {there}"):
        fj.prune.reconstruction_error(dense, jax.device_put(dense, there), stats)
