"""Weights as checkpoints store them, expanded and packed by the native code."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flashjax as fj
from flashjax import _native
from flashjax.checkpoint.encoding import check_rows, count_bits, encode
from flashjax.sparse_rows import SparseRows


def stored(dense: np.ndarray) -> SparseRows:
    bitmap, values = encode(dense)
    return check_rows(bitmap, values, dense.shape)


def check(rows: SparseRows, dense: np.ndarray, threads: int = 0) -> None:
    """dense (out, in)."""
    assert (rows.shape, rows.dtype) == (dense.shape, dense.dtype)
    np.testing.assert_array_equal(rows.to_dense(threads), dense)
    expected = _native.cpu.pack(np.ascontiguousarray(dense.T).view(np.uint16))
    for got, leaf in zip(rows.pack(threads), expected, strict=True):
        np.testing.assert_array_equal(got, leaf)


@st.composite
def weights(draw):
    """(M, K), of which a few bits make a byte of the bitmap that two rows share."""
    m, k = draw(st.integers(0, 70)), draw(st.integers(0, 300))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    keep = rng.random((m, k)) < draw(st.sampled_from([0.0, 0.01, 0.3, 1.0]))
    return np.where(keep, rng.uniform(1, 2, (m, k)), 0).astype(np.float16)


@given(weights())
def test_rows(dense):
    check(stored(dense), dense)


@given(weights(), st.integers(0, 2**32))
def test_order_of_joined_rows(dense, seed):
    order = np.random.default_rng(seed).permutation(2 * len(dense))
    rows = SparseRows.join([stored(dense), stored(-dense)], order)
    check(rows, np.concatenate([dense, -dense])[order])


def test_does_not_depend_on_threads():
    rng = np.random.default_rng(0)
    dense = rng.uniform(1, 2, (700, 1000)) * (rng.random((700, 1000)) < 0.3)
    for threads in (1, 5):
        check(stored(dense.astype(np.float16)), dense.astype(np.float16), threads)


def test_matrix():
    dense = np.eye(40, 70, dtype=np.float16)
    w = fj.SparseMatrix.from_rows(stored(dense))
    assert (w.shape, w.nnz) == ((70, 40), 40)
    np.testing.assert_array_equal(np.asarray(w.to_dense()), dense.T)


def test_many_rows_without_columns():
    """As a file may claim at no cost."""
    rows = SparseRows(((np.empty(0, np.uint8), np.empty(0, np.float16), 1 << 31),), 0)
    assert rows.to_dense().shape == (1 << 31, 0)


def test_values_that_are_zero_are_not_stored():
    """Converting to another half precision may make some."""
    rows = SparseRows(((np.uint8([7]), np.float16([1, 0, -0.0]), 1),), 8)
    assert fj.SparseMatrix.from_rows(rows).nnz == 1


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 64, 1001])
def test_count_bits(size):
    bitmap = np.random.default_rng(size).integers(0, 256, size).astype(np.uint8)
    assert count_bits(bitmap) == np.unpackbits(bitmap).sum()


BITMAP, VALUES = np.uint8([0b101, 0]), np.uint16([1, 2])


@pytest.mark.parametrize(
    ("parts", "order", "message"),
    [
        ([(BITMAP, VALUES[:1], 2)], None, "as many values as bits"),
        ([(BITMAP, np.append(VALUES, VALUES), 2)], None, "as many values as bits"),
        ([(BITMAP[:1], VALUES, 2)], None, "a bitmap of"),
        ([(BITMAP, VALUES, -2)], None, "a bitmap of"),
        ([(BITMAP, VALUES, 1 << 62)], None, "a bitmap of"),
        ([(BITMAP, VALUES, 2)], np.int64([0, 2]), "order is out of range"),
        ([(BITMAP, VALUES, 2)], np.int64([-1]), "order is out of range"),
    ],
)
@pytest.mark.parametrize("function", ["pack_rows", "decode_rows"])
def test_what_does_not_belong_together(function, parts, order, message):
    with pytest.raises(ValueError, match=message):
        getattr(_native.cpu, function)(parts, 8, order)
