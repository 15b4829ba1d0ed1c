"""Random caches, and attention to them in float64."""

import jax
import jax.numpy as jnp
import numpy as np


def random_case(shape, dtype, cache_dtype, seed=0):
    """Queries, keys, values and mask for a cache (batch, heads, slots, head_dim)."""
    rng = np.random.default_rng(seed)
    batch, heads, slots, head_dim = shape
    queries = rng.standard_normal((batch, heads, head_dim)) / head_dim**0.5
    keys, values = (rng.standard_normal(shape) for _ in range(2))
    mask = rng.random((batch, slots)) < 0.8
    mask[:, 0] = True
    cache_dtype = cache_dtype or dtype
    keys, values = (array.astype(cache_dtype) for array in (keys, values))
    return queries.astype(dtype), keys, values, mask


def in_plain_jax(queries, keys, values, mask, used):
    """What the kernel computes."""
    keys, values = keys.astype(jnp.float32), values.astype(jnp.float32)
    scores = jnp.einsum("bhd,bhsd->bhs", queries.astype(jnp.float32), keys)
    scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    in_use = (jnp.arange(keys.shape[2]) < used)[None, None]
    weights = jax.nn.softmax(jnp.where(in_use, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhs,bhsd->bhd", weights, values).astype(queries.dtype)


def check(outputs, case, used):
    """Compares (batch, heads, head_dim) with attention to the first `used` slots."""
    queries, keys, values = (np.asarray(array, np.float64) for array in case[:3])
    mask = np.asarray(case[3])[:, None, :used]
    scores = np.einsum("bhd,bhsd->bhs", queries, keys[:, :, :used])
    lowest = np.finfo(np.float32).min
    scores = np.where(mask, scores, lowest)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("bhs,bhsd->bhd", weights, values[:, :, :used])
    assert outputs.dtype == case[0].dtype
    digits = 2.0 ** (-10 if outputs.dtype == np.float16 else -7)
    np.testing.assert_allclose(
        np.asarray(outputs, np.float64), expected, rtol=digits, atol=digits / 8
    )
