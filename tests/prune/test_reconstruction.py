"""SparseGPT and ALPS: how much of a layer's output they keep."""

import jax.numpy as jnp
import numpy as np
import prune_reference as reference
import pytest

import flashjax as fj

CASES = [(0.3, None), (0.5, None), (0.6, None), (0.8, None), (None, "2:4")]


def layer(seed, K, M=48):
    X, dense = reference.correlated_layer(seed, K, M, samples=4 * K)
    return X, dense, fj.prune.InputStatistics.zeros(K).update(X)


@pytest.mark.parametrize(("K", "block"), [(97, 32), (256, 128)])
@pytest.mark.parametrize("seed", range(2))
def test_sparsegpt_is_the_paper(seed, K, block):
    X, dense, stats = layer(seed, K)
    for sparsity, pattern in CASES:
        pruned = fj.prune.sparsegpt(
            dense, stats, sparsity, pattern=pattern, block_size=block
        )
        keep, group = (2, 4) if pattern else (0, 0)
        expected = reference.sparsegpt(dense, X, sparsity, keep, group, block)
        assert np.mean((pruned == 0) != (expected == 0)) < 1e-3
        assert reference.reconstruction_error(dense, pruned, X) == pytest.approx(
            reference.reconstruction_error(dense, expected, X), rel=0.01
        )


@pytest.mark.parametrize("seed", range(4))
def test_the_better_method_has_the_smaller_error(seed):
    X, dense, stats = layer(seed, 128)
    for sparsity, pattern in CASES:
        errors = {}
        for name, (function, needs_statistics) in fj.prune.METHODS.items():
            arguments = (stats,) if needs_statistics else ()
            pruned = function(dense, *arguments, sparsity, pattern=pattern)
            errors[name] = reference.reconstruction_error(dense, pruned, X)
        assert errors["wanda"] < errors["magnitude"]
        # At 80% SparseGPT may fall behind Wanda: its masks are chosen block by block.
        if sparsity != 0.8:
            assert errors["sparsegpt"] < errors["wanda"]
        assert errors["alps"] < 0.6 * errors["sparsegpt"]


def test_alps_values_are_least_squares():
    X, dense, stats = layer(0, 64)
    pruned = fj.prune.alps(dense, stats, 0.7)
    gram = X.astype(np.float64).T @ X
    gram += 0.01 * np.diag(gram).mean() * np.eye(64)
    best = np.zeros_like(dense, np.float64)
    for j in range(dense.shape[1]):
        kept = np.flatnonzero(pruned[:, j])
        best[kept, j] = np.linalg.solve(
            gram[np.ix_(kept, kept)], (gram @ dense[:, j])[kept]
        )
    error, least = (
        np.einsum("km,kl,lm", w - dense, gram, w - dense) for w in (pruned, best)
    )
    assert least <= error <= 1.02 * least


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_rounded_once(method, dtype):
    _, dense, stats = layer(0, 64)
    dense = dense.astype(jnp.dtype(dtype))
    prune = fj.prune.METHODS[method].function
    pruned = prune(dense, stats, 0.6)
    expected = prune(dense.astype(np.float32), stats, 0.6)
    np.testing.assert_array_equal(pruned, expected.astype(dense.dtype))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps"])
def test_dead_inputs_go_first(method):
    X, dense, _ = layer(0, 64)
    X[:, 5:25] = 0  # 31%, and all in the first blocks
    stats = fj.prune.InputStatistics.zeros(64).update(X)
    options = {"block_size": 16} if method == "sparsegpt" else {}
    prune = fj.prune.METHODS[method].function
    pruned = prune(dense, stats, 0.5, **options)
    assert not pruned[5:25].any()
    assert np.count_nonzero(pruned == 0) == dense.size // 2
    few = prune(dense, stats, 0.25, **options)
    assert np.count_nonzero(few == 0) == dense.size // 4
    assert not (few[:5] == 0).any()
    assert not (few[25:] == 0).any()
    kept = few[5:25] != 0
    np.testing.assert_array_equal(few[5:25][kept], dense[5:25][kept])


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_no_inputs_but_dead_ones(method):
    dense = np.ones((8, 4), np.float32)
    stats = fj.prune.InputStatistics.zeros(8).update(np.zeros((3, 8), np.float32))
    pruned = fj.prune.METHODS[method].function(dense, stats, 0.5)
    assert np.count_nonzero(pruned == 0) == 16
    assert set(pruned.ravel()) == {0, 1}


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_singular_gram(method):
    X, dense, _ = layer(0, 64)
    X[:, 1] = X[:, 0]
    stats = fj.prune.InputStatistics.zeros(64).update(X[:20])
    prune = fj.prune.METHODS[method].function
    prune(dense, stats, 0.5)
    if method == "alps":  # the penalty of ADMM is damping enough
        return
    with pytest.raises(ValueError, match="from 20 inputs; raise damping, or use more"):
        prune(dense, stats, 0.5, damping=0)


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_new_weights_too_large(method):
    x = np.random.default_rng(0).standard_normal((200, 2)).astype(np.float32)
    x = x[:, :1] + 0.001 * x
    dense = np.array([[40000], [40000]], np.float16)
    stats = fj.prune.InputStatistics.zeros(2).update(x)
    with pytest.raises(ValueError, match="new weights that float16 holds"):
        fj.prune.METHODS[method].function(dense, stats, 0.5)
