import itertools

import jax.numpy as jnp
import numpy as np
import prune_reference as reference
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashjax as fj


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(-9, 9), max_size=30), st.integers(-3, 3)),
        max_size=4,
    ),
    st.floats(0, 1),
    st.sampled_from(["float16", "bfloat16", "float32"]),
)
def test_one_threshold_for_all(numbers, sparsity, dtype):
    matrices = {
        str(i): (np.array(values, np.float64) * np.exp(scale)).astype(jnp.dtype(dtype))
        for i, (values, scale) in enumerate(numbers)
    }
    sparsities = fj.prune.magnitude_global(matrices, sparsity)
    pruned = [fj.prune.magnitude(matrices[n], s) for n, s in sparsities.items()]
    together = np.concatenate([np.empty(0, jnp.dtype(dtype)), *matrices.values()])
    expected = fj.prune.magnitude(together, sparsity)
    np.testing.assert_array_equal(np.concatenate([expected[:0], *pruned]), expected)


def test_dtypes_share_the_threshold():
    rng = np.random.default_rng(0)
    matrices = {
        dtype: rng.standard_normal((20, 10)).astype(jnp.dtype(dtype))
        for dtype in ("float16", "bfloat16", "float32")
    }
    sparsities = fj.prune.magnitude_global(matrices, 0.6)
    assert sum(sparsities.values()) * 200 == pytest.approx(360)
    pruned = {n: fj.prune.magnitude(m, sparsities[n]) for n, m in matrices.items()}
    lost = [np.abs(matrices[n][p == 0]).max() for n, p in pruned.items()]
    kept = [np.abs(p[p != 0]).min() for p in pruned.values()]
    assert max(map(float, lost)) <= min(map(float, kept))


def test_holds_one_matrix_at_a_time():
    class Stored(dict):
        def __getitem__(self, name):
            return np.full((3, 3), float(name), np.float32)

    stored = Stored.fromkeys(["1", "2", "3"])
    assert fj.prune.magnitude_global(stored, 0.5) == {"1": 1, "2": 5 / 9, "3": 0}


def test_global_errors_name_the_matrix():
    good = np.ones(3, np.float32)
    with pytest.raises(ValueError, match="fc1: expected an array without NaN, got 1"):
        fj.prune.magnitude_global({"q": good, "fc1": np.float32([1, np.nan])}, 0.5)
    with pytest.raises(ValueError, match=r"fc1: expected dtype .* got float64"):
        fj.prune.magnitude_global({"fc1": np.ones(3)}, 0.5)
    with pytest.raises(TypeError, match=r"fc1: .* got list"):
        fj.prune.magnitude_global({"fc1": [1.0]}, 0.5)
    with pytest.raises(TypeError, match="matrices to be a mapping by name, got list"):
        fj.prune.magnitude_global([good, good], 0.5)


def test_outlier_ratio():
    X, dense = reference.correlated_layer(0)
    stats = fj.prune.InputStatistics.zeros(len(dense)).update(X)
    importance = reference.wanda_importance(dense, X)
    for multiple in (3, 5.0):
        expected = (importance > multiple * importance.mean()).mean()
        assert expected > 0
        assert fj.prune.outlier_ratio(dense, stats, multiple) == pytest.approx(expected)
    with pytest.raises(ValueError, match="positive multiple, got 0"):
        fj.prune.outlier_ratio(dense, stats, 0)
    for wrong in ("5", None, [5.0], True):
        with pytest.raises(TypeError, match="multiple to be a number, got"):
            fj.prune.outlier_ratio(dense, stats, wrong)
    same = fj.prune.outlier_ratio(dense, stats, np.float32(5))
    assert (
        same
        == fj.prune.outlier_ratio(dense, stats, jnp.float32(5))
        == (fj.prune.outlier_ratio(dense, stats))
    )


def test_owl_is_the_paper():
    ratios = {"a": 0.01, "b": 0.03, "c": 0.02}
    budgets = fj.prune.owl(ratios, 0.7)
    assert budgets == pytest.approx({"a": 0.78, "b": 0.62, "c": 0.7})


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 1), st.integers(1, 10**8)), min_size=1, max_size=20
    ),
    st.floats(0, 1),
    st.floats(0, 0.5),
)
def test_owl_keeps_the_mean(matrices, sparsity, spread):
    ratios = {i: ratio for i, (ratio, _) in enumerate(matrices)}
    sizes = {i: size for i, (_, size) in enumerate(matrices)}
    budgets = fj.prune.owl(ratios, sparsity, spread, sizes=sizes)
    assert all(0 <= budget <= 1 for budget in budgets.values())
    mean = sum(budgets[i] * sizes[i] for i in budgets) / sum(sizes.values())
    assert mean == pytest.approx(sparsity, abs=1e-9)
    assert max(budgets.values()) - min(budgets.values()) <= 2 * spread + 1e-9
    by_ratio = sorted(budgets, key=lambda i: ratios[i])
    assert all(
        budgets[i] >= budgets[j] - 1e-12 for i, j in itertools.pairwise(by_ratio)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"a": 0.1}, 1.5), "sparsity from 0 to 1, got 1.5"),
        (({"a": 0.1}, 0.5, 0.6), "spread from 0 to 0.5, got 0.6"),
        (({"a": float("nan")}, 0.5), "finite ratios"),
    ],
)
def test_wrong_budgets(arguments, message):
    with pytest.raises(ValueError, match=message):
        fj.prune.owl(*arguments)


@pytest.mark.parametrize(
    ("arguments", "sizes", "message"),
    [
        (([0.1, 0.2], 0.7), None, "ratios to be a mapping by name, got list"),
        (({"a": 0.1}, 0.7), [3], "sizes to be a mapping by name, got list"),
        (({"a": 0.1}, 0.7, None), None, "spread to be a number .*, got NoneType"),
        (({"a": 0.1}, "0.7"), None, "sparsity to be a number .*, got str"),
        (({"a": "0.1"}, 0.7), None, "the ratio of a to be a number, got str"),
        (({"a": 0.1}, 0.7), {"a": None}, "the size of a to be a number, got NoneType"),
    ],
)
def test_budgets_of_wrong_types(arguments, sizes, message):
    with pytest.raises(TypeError, match=f"prune.owl: expected {message}"):
        fj.prune.owl(*arguments, sizes=sizes)


def test_owl_needs_sizes_of_all():
    with pytest.raises(ValueError, match="only one of them for b"):
        fj.prune.owl({"a": 0.1, "b": 0.2}, 0.5, sizes={"a": 1})
    with pytest.raises(ValueError, match="only one of them for 0, a"):
        fj.prune.owl({0: 0.1}, 0.5, sizes={"a": 1})
    with pytest.raises(ValueError, match="positive sizes"):
        fj.prune.owl({"a": 0.1}, 0.5, sizes={"a": 0})
    assert fj.prune.owl({}, 0.5) == {}
