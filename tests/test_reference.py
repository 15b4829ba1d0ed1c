import jax
import jax.numpy as jnp
import layout_reference
import numpy as np
import pytest

from flashjax import reference

from . import op_cases

SHAPES = [(1, 1), (64, 16), (300, 40), (1031, 33), (256, 257)]


def _packed(dense):
    """What the slow packer makes of a matrix, with explicit zeros in the streams."""
    bits = dense.view(np.uint16)
    bitmap, entries, values, _ = layout_reference.pack(bits)
    return bitmap, entries, values


def _unpack(packed, dense):
    # A new function, because jit remembers traces by function.
    def unpack(packed):
        return reference.unpack(packed, dense.shape, dense.dtype)

    return jax.jit(unpack)(packed)


@pytest.mark.parametrize("dtype", op_cases.HALVES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpack(shape, dtype):
    dense = op_cases.random_dense(*shape, 0.6, dtype)
    got = _unpack(_packed(dense), dense)
    assert got.dtype == dense.dtype
    np.testing.assert_array_equal(got, dense)


def test_unpack_uneven_streams():
    dense = op_cases.pattern_dense("one_lane", 1300, 40, "float16")
    packed = _packed(dense)
    # There are explicit zeros, and several segments.
    assert np.bitwise_count(packed[0]).sum() > np.count_nonzero(dense)
    assert packed[2].shape[0] > 1
    np.testing.assert_array_equal(_unpack(packed, dense), dense)


def test_unpack_of_zeros():
    dense = np.zeros((70, 20), np.float16)
    np.testing.assert_array_equal(_unpack(_packed(dense), dense), dense)


def test_unpack_in_chunks(monkeypatch):
    dense = op_cases.random_dense(130, 90, 0.6, "float16")
    # Six strips, in chunks of four.
    monkeypatch.setattr(reference, "_CHUNK_POSITIONS", 4 * 16 * 256)
    packed = _packed(dense)
    jaxpr = jax.make_jaxpr(lambda p: reference.unpack(p, (130, 90), jnp.float16))
    assert "scan" in str(jaxpr(packed))
    got = _unpack(packed, dense)
    np.testing.assert_array_equal(got, dense)


@pytest.mark.parametrize(
    "shape", [*SHAPES, (0, 0), (0, 5), (5, 0), (1, 5000), (9999, 3), (2048, 2048)]
)
def test_sizes(shape):
    sizes = layout_reference.sizes(*shape)
    assert reference.leaf_shapes(shape) == {
        "bitmap": (sizes["strips"], sizes["groups"], 32, 4),
        "entries": (sizes["strips"], sizes["entries"], 18),
        "values": (None, 16, 32),
        "counts": (sizes["strips"],),
    }
    assert reference.chain_count(shape) == sizes["chains"]


def test_dense_product_promotes_nothing_silently():
    x = jnp.ones((2, 3), jnp.bfloat16)
    dense = jnp.ones((3, 4), jnp.float16)
    y = reference.dense_product(x, dense, jnp.ones(4, jnp.float16), jnp.float32)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, np.full((2, 4), 4))
