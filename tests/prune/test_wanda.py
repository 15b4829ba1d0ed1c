import jax.numpy as jnp
import numpy as np
import prune_reference as reference
import pytest

import flashjax as fj


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("seed", range(3))
def test_is_the_definition(seed, dtype):
    X, dense = reference.correlated_layer(seed, K=67, M=31)
    dense = dense.astype(jnp.dtype(dtype))
    stats = fj.prune.InputStatistics.zeros(67).update(X)
    importance = reference.wanda_importance(dense, X)
    for sparsity in (0, 0.3, 0.5, 0.8, 1):
        expected = reference.zero_smallest(
            dense, importance, round(sparsity * 67), axis=0
        )
        pruned = fj.prune.wanda(dense, stats, sparsity)
        assert pruned.dtype == dense.dtype
        np.testing.assert_array_equal(pruned, expected)
    for keep, group in ((2, 4), (4, 8), (1, 3)):
        expected = reference.zero_smallest_of_groups(dense, importance, keep, group)
        pruned = fj.prune.wanda(dense, stats, None, pattern=f"{keep}:{group}")
        np.testing.assert_array_equal(pruned, expected)
