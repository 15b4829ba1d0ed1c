"""What all methods share: counts, kinds of arrays, patterns, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from mesh_support import make_mesh

import flashjax as fj

METHODS = sorted(fj.prune.METHODS)
WITH_STATISTICS = [n for n in METHODS if fj.prune.METHODS[n].needs_statistics]
SHAPES = [(1, 7), (13, 1), (131, 5)]


def statistics(K, seed=0):
    x = np.random.default_rng(seed).standard_normal((2 * K + 8, K)).astype(np.float32)
    return fj.prune.InputStatistics.zeros(K).update(x)


def prune(method, dense, *arguments, stats=None, **options):
    function, needs_statistics = fj.prune.METHODS[method]
    if needs_statistics:
        stats = statistics(len(dense)) if stats is None else stats
        arguments = (stats, *arguments)
    return function(dense, *arguments, **options)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(METHODS),
    st.sampled_from(SHAPES),
    st.one_of(st.floats(0, 0.99), st.just(1.0)),
    st.sampled_from(["float16", "bfloat16", "float32"]),
    st.sampled_from([np.asarray, jnp.asarray]),
    st.integers(0, 3),
)
def test_zeros_kind_and_repeats(method, shape, sparsity, dtype, kind, seed):
    values = np.random.default_rng(seed).uniform(1, 2, shape)
    dense = kind(values.astype(jnp.dtype(dtype)))
    pruned = prune(method, dense, sparsity)
    assert type(pruned) is type(dense)
    assert (pruned.dtype, pruned.shape) == (dense.dtype, dense.shape)
    zeros = np.asarray(pruned) == 0
    if method == "wanda":
        assert (zeros.sum(0) == round(sparsity * shape[0])).all()
    else:
        assert zeros.sum() == round(sparsity * zeros.size)
    again = prune(method, dense, sparsity)
    assert np.asarray(again).tobytes() == np.asarray(pruned).tobytes()
    np.testing.assert_array_equal(dense, values.astype(dense.dtype))


@pytest.mark.parametrize("pattern", ["2:4", "5:16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_patterns(method, shape, pattern):
    keep, group = map(int, pattern.split(":"))
    dense = np.random.default_rng(0).uniform(1, 2, shape).astype(np.float32)
    pruned = prune(method, dense, None, pattern=pattern)
    for start in range(0, shape[0], group):
        part = pruned[start : start + group]
        assert (np.count_nonzero(part, 0) == min(keep, len(part))).all()
    same = prune(method, dense, 1 - keep / group, pattern=pattern)
    np.testing.assert_array_equal(same, pruned)


@pytest.mark.parametrize("method", METHODS)
def test_zeros_count(method):
    rng = np.random.default_rng(0)
    dense = rng.uniform(1, 2, (16, 8)).astype(np.float32)
    dense[rng.permuted(np.arange(16) < 6, axis=0)] = 0
    dense[:6] = 0
    zeros = dense == 0
    share = zeros.mean()
    pruned = prune(method, dense, share)
    np.testing.assert_allclose(pruned, dense, rtol=1e-5)
    pruned = prune(method, dense, 0.75)
    assert np.count_nonzero(pruned == 0) == 96


@pytest.mark.parametrize("method", METHODS)
def test_nothing_to_prune(method):
    for shape in ((0, 3), (3, 0)):
        stats = fj.prune.InputStatistics.zeros(shape[0])
        stats = stats.update(np.ones((2, shape[0]), np.float32))
        for kind in (np.zeros, jnp.zeros):
            dense = kind(shape, jnp.float16)
            pruned = prune(method, dense, 0.5, stats=stats)
            assert (type(pruned), pruned.shape) == (type(dense), shape)
    dense = np.random.default_rng(0).standard_normal((9, 5)).astype(np.float16)
    np.testing.assert_array_equal(prune(method, dense, 0.0), dense)


@pytest.mark.parametrize("method", METHODS)
def test_byte_and_memory_order(method):
    dense = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    expected = prune(method, dense, 0.5)
    for same in (dense.astype(">f4"), np.asfortranarray(dense)):
        pruned = prune(method, same, 0.5)
        assert pruned.dtype == same.dtype
        np.testing.assert_array_equal(pruned, expected)


@pytest.mark.parametrize("method", METHODS)
def test_stays_on_its_device(method):
    device = jax.devices()[-1]
    stats = jax.device_put(statistics(8), device)
    dense = jax.device_put(jnp.ones((8, 4), jnp.float16), device)
    assert prune(method, dense, 0.5, stats=stats).devices() == {device}


@pytest.mark.parametrize("method", WITH_STATISTICS)
def test_statistics_on_other_devices(method):
    here, there = make_mesh((2,)).devices.flat
    dense = np.ones((8, 4), np.float32)
    stats = jax.device_put(statistics(8), there)
    message = (
        f"prune.{method}: expected weight and statistics on the same devices, got "
        f"weight on {here} and statistics on {there}; move one of them"
    )
    with pytest.raises(ValueError, match=message):
        prune(method, jax.device_put(dense, here), 0.5, stats=stats)
    expected = prune(method, dense, 0.5)
    for free in (dense, jnp.asarray(dense)):  # goes where the statistics are
        pruned = prune(method, free, 0.5, stats=stats)
        np.testing.assert_array_equal(pruned, expected)
    pruned = prune(method, jax.device_put(dense, there), 0.5, stats=statistics(8))
    assert pruned.devices() == {there}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", [P("model", None), P(None, "model"), P(None, None)])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_split_weights(kind, spec, method):
    """The statistics are whole on every device, split by the same kind of axes."""
    mesh = make_mesh(kind=kind)
    dense = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    stats = statistics(16)
    split = jax.device_put(dense, NamedSharding(mesh, spec))
    whole = jax.tree.map(
        lambda leaf: jax.device_put(leaf, NamedSharding(mesh, P(*[None] * leaf.ndim))),
        stats,
    )
    pruned = prune(method, split, 0.5, stats=whole)
    assert pruned.sharding == split.sharding
    expected = prune(method, dense, 0.5, stats=stats)
    np.testing.assert_allclose(pruned, expected, atol=1e-4)
    errors = [
        fj.prune.reconstruction_error(*weights)
        for weights in ((split, pruned, whole), (dense, expected, stats))
    ]
    np.testing.assert_allclose(*errors, rtol=1e-3)
    ratios = [
        fj.prune.outlier_ratio(*weights) for weights in ((split, whole), (dense, stats))
    ]
    assert ratios[0] == ratios[1]


@pytest.mark.parametrize("method", METHODS)
def test_masked_arrays_are_refused(method):
    dense = np.ma.masked_array(np.ones((8, 4), np.float32), np.eye(8, 4) > 0)
    with pytest.raises(TypeError, match=f"prune.{method}: .*mask, got MaskedArray"):
        prune(method, dense, 0.5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("sparsity", "pattern", "message"),
    [
        (1.5, None, "from 0 to 1, got 1.5"),
        (float("nan"), None, "from 0 to 1, got nan"),
        (0.6, "2:4", "expected sparsity 0.5, .* pattern 2:4 gives .*, got 0.6"),
        (0.5, "4:2", "a pattern as '2:4' .*, got '4:2'"),
        (0.5, "0:4", "got '0:4'"),
        (0.5, "2", "got '2'"),
        (0.5, "1:9999", "got '1:9999'"),
    ],
)
def test_wrong_numbers(method, sparsity, pattern, message):
    with pytest.raises(ValueError, match=f"prune.{method}: .*{message}"):
        prune(method, np.ones((8, 4), np.float32), sparsity, pattern=pattern)


@pytest.mark.parametrize("method", WITH_STATISTICS)
def test_wrong_weights_and_statistics(method):
    dense = np.ones((8, 4), np.float32)
    good = statistics(8)

    def check(error, message, dense=dense, stats=good, sparsity=0.5, **options):
        with pytest.raises(error, match=f"prune.{method}: .*{message}"):
            prune(method, dense, sparsity, stats=stats, **options)

    for bad in (np.nan, np.inf):
        broken = fj.prune.InputStatistics(good.gram.at[1, 2].set(bad), good.count)
        check(ValueError, "finite statistics, got NaN or infinity", stats=broken)
        check(ValueError, "finite weights, got NaN", dense=dense * np.float32(bad))
    empty = fj.prune.InputStatistics.zeros(8)
    check(ValueError, "at least one input, got none", stats=empty)
    check(ValueError, "statistics of 8 input features", stats=statistics(4))
    check(ValueError, "float32, got float64", dense=np.ones((8, 4)))
    check(ValueError, r"matrix .*, got shape \(8,\)", dense=np.ones(8, np.float32))
    check(TypeError, "numpy or JAX array, got list", dense=[[1.0]] * 8)
    check(TypeError, "InputStatistics, got ndarray", stats=np.ones((8, 8)))
    check(TypeError, "sparsity to be a number .* got NoneType", sparsity=None)
    check(TypeError, "pattern as text, .* got int", pattern=24)
    with pytest.raises(TypeError, match="traced"):
        jax.jit(lambda d: prune(method, d, 0.5, stats=good))(jnp.asarray(dense))
    with pytest.raises(TypeError, match="traced"):
        jax.jit(lambda s: prune(method, dense, 0.5, stats=s))(good)


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_wrong_damping(method):
    dense = np.ones((8, 4), np.float32)
    with pytest.raises(ValueError, match="damping of at least 0, got -1"):
        prune(method, dense, 0.5, damping=-1)
    with pytest.raises(TypeError, match="damping to be a number, got str"):
        prune(method, dense, 0.5, damping="0.01")


def test_wrong_block_size():
    dense = np.ones((8, 4), np.float32)
    with pytest.raises(ValueError, match="block_size of at least 1, got 0"):
        prune("sparsegpt", dense, 0.5, block_size=0)
    with pytest.raises(TypeError, match="block_size to be an int, got float"):
        prune("sparsegpt", dense, 0.5, block_size=1.0)
