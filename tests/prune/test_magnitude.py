import jax
import jax.numpy as jnp
import numpy as np
import prune_reference as reference
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashjax as fj

DTYPES = ("float16", "bfloat16", "float32", "float64")


@pytest.mark.parametrize("sparsity", [0, 0.0, 0.1, 0.29, 1 / 3, 0.5, 0.999, 1, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeroes_the_smallest(dtype, sparsity):
    dense = np.random.default_rng(0).standard_normal((37, 23)).astype(jnp.dtype(dtype))
    original = dense.copy()
    pruned = fj.prune.magnitude(dense, sparsity)
    np.testing.assert_array_equal(dense, original)
    assert type(pruned) is np.ndarray
    assert (pruned.dtype, pruned.shape) == (dense.dtype, dense.shape)
    kept = pruned != 0
    assert np.count_nonzero(~kept) == round(sparsity * dense.size)
    np.testing.assert_array_equal(pruned[kept], dense[kept])
    if 0 < np.count_nonzero(kept) < dense.size:
        assert np.abs(dense[kept]).min() >= np.abs(dense[~kept]).max()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(-3, 3), max_size=40),
    st.floats(0, 1),
    st.sampled_from(DTYPES),
)
def test_ties_go_in_order(numbers, sparsity, dtype):
    dense = np.array(numbers, jnp.dtype(dtype))
    pruned = fj.prune.magnitude(dense, sparsity)
    order = np.argsort(np.abs(numbers), kind="stable")[: round(sparsity * len(numbers))]
    expected = dense.copy()
    expected[order] = 0
    np.testing.assert_array_equal(pruned, expected)


def test_zeros_count():
    dense = np.array([0.0, -0.0, 0.0, 1.0, 2.0], np.float32)
    np.testing.assert_array_equal(fj.prune.magnitude(dense, 0.4), dense)
    np.testing.assert_array_equal(fj.prune.magnitude(dense, 0.8), [0, 0, 0, 0, 2])


def test_infinity_is_largest():
    dense = np.array([np.inf, 1, -np.inf, 2], np.float16)
    pruned = fj.prune.magnitude(dense, 0.5)
    np.testing.assert_array_equal(pruned, [np.inf, 0, -np.inf, 0])


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,), (2, 3, 4)])
def test_shapes(shape):
    dense = np.ones(shape, np.float32)
    pruned = fj.prune.magnitude(dense, 1.0)
    np.testing.assert_array_equal(pruned, np.zeros(shape))


def test_memory_order_and_byte_order():
    dense = np.random.default_rng(0).standard_normal((20, 30)).astype(np.float32)
    expected = fj.prune.magnitude(dense, 0.7)
    for same in (np.asfortranarray(dense), dense.astype(">f4")):
        pruned = fj.prune.magnitude(same, 0.7)
        assert pruned.dtype == same.dtype
        np.testing.assert_array_equal(pruned, expected)


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_jax_arrays(dtype):
    device = jax.devices()[-1]
    dense = jax.random.normal(jax.random.key(0), (17, 19)).astype(dtype)
    dense = jax.device_put(dense, device)
    pruned = fj.prune.magnitude(dense, 0.5)
    assert isinstance(pruned, jax.Array)
    assert pruned.devices() == {device}
    assert pruned.dtype == dense.dtype
    np.testing.assert_array_equal(pruned, fj.prune.magnitude(np.asarray(dense), 0.5))


def test_uncommitted_arrays_stay_uncommitted():
    assert not fj.prune.magnitude(jnp.ones(4), 0.5).committed


@pytest.mark.parametrize(
    "sparsity", [-0.1, 1.1, float("nan"), float("inf"), -float("inf"), 80]
)
def test_wrong_sparsity(sparsity):
    with pytest.raises(ValueError, match=f"from 0 to 1, got {float(sparsity)}"):
        fj.prune.magnitude(np.ones(3), sparsity)


@pytest.mark.parametrize("sparsity", ["0.5", None, True, [0.5]])
def test_sparsity_that_is_no_number(sparsity):
    with pytest.raises(TypeError, match=f"got {type(sparsity).__name__}"):
        fj.prune.magnitude(np.ones(3), sparsity)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan(dtype):
    dense = np.array([1, np.nan, 2, np.nan], jnp.dtype(dtype))
    with pytest.raises(ValueError, match="without NaN, got 2 NaN among 4"):
        fj.prune.magnitude(dense, 0.5)


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "float8_e4m3fn"])
def test_wrong_dtype(dtype):
    with pytest.raises(ValueError, match=f"got {dtype}"):
        fj.prune.magnitude(np.ones(3, jnp.dtype(dtype)), 0.5)


def test_no_arrays():
    with pytest.raises(TypeError, match="got list"):
        fj.prune.magnitude([1.0], 0.5)
    with pytest.raises(TypeError, match="traced"):
        jax.jit(lambda a: fj.prune.magnitude(a, 0.5))(jnp.ones(3))


@pytest.mark.parametrize("sparsity", [0, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("dtype", DTYPES)
def test_by_row(dtype, sparsity):
    dense = np.random.default_rng(0).integers(-9, 9, (37, 23)).astype(jnp.dtype(dtype))
    magnitudes = np.abs(dense.astype(np.float64))
    expected = reference.zero_smallest(dense, magnitudes, round(sparsity * 37), axis=0)
    pruned = fj.prune.magnitude(dense, sparsity, scope="row")
    assert pruned.dtype == dense.dtype
    np.testing.assert_array_equal(pruned, expected)


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (4, 8), (1, 3)])
def test_pattern(keep, group):
    dense = np.random.default_rng(0).integers(-9, 9, (37, 23)).astype(np.float16)
    magnitudes = np.abs(dense.astype(np.float64))
    expected = reference.zero_smallest_of_groups(dense, magnitudes, keep, group)
    pruned = fj.prune.magnitude(dense, None, pattern=f"{keep}:{group}")
    np.testing.assert_array_equal(pruned, expected)


def test_wrong_scope():
    with pytest.raises(ValueError, match="'layer' or 'row', got 'column'"):
        fj.prune.magnitude(np.ones((2, 2)), 0.5, scope="column")
    with pytest.raises(ValueError, match=r"matrix .*, got shape \(3,\)"):
        fj.prune.magnitude(np.ones(3), 0.5, scope="row")
