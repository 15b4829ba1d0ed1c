"""What the tests of layers share."""

import jax.numpy as jnp
import numpy as np

HALVES = [jnp.float16, jnp.bfloat16]


def random(shape, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def assert_close(y, expected, dtype=jnp.float16):
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    assert y.shape == expected.shape
    np.testing.assert_allclose(
        np.asarray(y, np.float32),
        np.asarray(expected, np.float32),
        rtol=tolerance,
        atol=tolerance * 8,
    )
