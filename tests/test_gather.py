"""The gather layout: its packer, plain JAX, and the CUDA kernels."""

import pickle
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import flashjax as fj
from flashjax import gather, layouts

from . import op_cases

# (K, M): ones, less than a strip, rests of a strip and of a block of rows, more panels.
SHAPES = [(1, 1), (8, 40), (257, 33), (1031, 300), (20_000, 70), (40_000, 9)]


@pytest.fixture(params=op_cases.IMPLEMENTATIONS)
def product(request):
    with op_cases.multiplying(*request.param) as multiply:
        yield multiply


# --- Packing ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", op_cases.HALVES)
@pytest.mark.parametrize("sparsity", [0.0, 0.8, 0.99, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_expands_to_what_was_packed(shape, sparsity, dtype):
    dense = op_cases.random_dense(*shape, sparsity, dtype)
    w = op_cases.gather_matrix(dense)
    np.testing.assert_array_equal(np.asarray(w.to_dense()), dense)
    assert w.nnz == np.count_nonzero(dense)


@pytest.mark.parametrize("pattern", op_cases.PATTERNS)
def test_patterns(pattern):
    dense = op_cases.pattern_dense(pattern, 700, 290, "float16")
    np.testing.assert_array_equal(
        np.asarray(op_cases.gather_matrix(dense).to_dense()), dense
    )


@given(op_cases.masks())
def test_any_mask(mask):
    if not mask.size:
        assert gather.pack(np.zeros(mask.shape, np.float16)) is None
        return
    dense = np.where(mask, np.float16(1.5), np.float16(0))
    bitmap, entries, values, _ = gather.pack(dense)
    # Jitted it is compiled at once, not operation by operation for every shape.
    unpack = jax.jit(gather.unpack, static_argnums=(1, 2))
    expanded = unpack((bitmap, entries, values), dense.shape, dense.dtype)
    np.testing.assert_array_equal(np.asarray(expanded), dense)


def test_does_not_depend_on_threads():
    dense = op_cases.random_dense(900, 1000, 0.85, "float16")
    for one, many in zip(gather.pack(dense, 1), gather.pack(dense, 7), strict=True):
        np.testing.assert_array_equal(one, many)


def test_sizes():
    """About 3 bytes a nonzero."""
    dense = op_cases.random_dense(7168, 256, 0.9, "float16")
    w = op_cases.gather_matrix(dense)
    assert w.nbytes < 3.2 * w.nnz
    expected = gather.leaf_shapes(dense.shape)
    assert w.entries.shape == expected["entries"]


def test_few_conflicts():
    """Of 8 lanes that read x at a time, hardly two mean the same banks."""
    dense = op_cases.random_dense(7168, 256, 0.8, "float16")
    bitmap, entries, _, _ = gather.pack(dense)
    chunks = int(entries[1, 0])  # of the first strip
    steps = bitmap[:chunks].view(np.int8).reshape(chunks, 32, 8).astype(np.int64)
    columns = steps.transpose(1, 0, 2).reshape(32, -1).cumsum(axis=1)[:, :-16]
    reads = [
        max(np.bincount(np.unique(quarter[:, i]) % 8))
        for quarter in columns.reshape(4, 8, -1)
        for i in range(columns.shape[1])
    ]
    assert np.mean(reads) < 1.3


def test_too_uneven_rows_do_not_fit():
    dense = op_cases.random_dense(40_000, 32, 0.8, "float16")
    dense[:30_000, 5] = 0
    assert gather.pack(dense) is None


def test_too_many_columns_do_not_fit():
    assert gather.pack(np.ones(((1 << 16) + 1, 2), np.float16)) is None


# --- Choosing ---------------------------------------------------------------------


def test_platforms_without_the_kernel_get_the_default_layout():
    with op_cases.on_platform("cpu"):
        dense = op_cases.random_dense(512, 64, 0.95, "float16")
        assert fj.SparseMatrix.from_dense(dense, tokens=1).layout == layouts.DEFAULT


@pytest.mark.parametrize(
    ("capability", "shape", "tokens", "expected"),
    [
        ("9.0", (512, 64), 8, True),
        ("9.0", (512, 64), 1, True),
        ("9.0", (512, 64), 9, False),
        ("9.0", (512, 64), None, False),
        ("9.0", (0, 64), 8, False),
        ("8.0", (512, 64), 8, False),
        ("10.0", (512, 64), 8, False),
        ("12.0", (512, 64), 8, False),
    ],
)
def test_which_may_have_it(monkeypatch, capability, shape, tokens, expected):
    monkeypatch.setattr(layouts._native, "cuda_available", lambda: True)
    device = types.SimpleNamespace(platform="gpu", compute_capability=capability)
    assert layouts.is_for_few_tokens(shape, device, tokens) == expected


def test_too_many_columns_never_have_it():
    assert layouts.may_gather((1 << 16, 64), 9, np.dtype(np.float16))
    assert not layouts.may_gather(((1 << 16) + 1, 64), 9, np.dtype(np.float16))


@pytest.mark.parametrize(("sparsity", "closer"), [(0.78, True), (0.7, False)])
@pytest.mark.usefixtures("as_on_hopper")
def test_few_tokens_have_closer_streams(sparsity, closer):
    dense = op_cases.random_dense(4096, 1100, sparsity, "float16")
    plain = fj.SparseMatrix.from_dense(dense)
    w = fj.SparseMatrix.from_dense(dense, tokens=8)
    assert w.layout == layouts.DEFAULT
    assert (w.values.size > plain.values.size) == closer
    assert w.nbytes < 1.06 * plain.nbytes
    np.testing.assert_array_equal(np.asarray(w.to_dense()), dense)
    x = op_cases.random_x((3, 4096), "float16")
    op_cases.check_product(fj.sparse_matmul(x, w), x, dense)


@pytest.fixture
def as_on_hopper(monkeypatch):
    """Packs on the CPU as it would for a Hopper GPU."""
    monkeypatch.setattr(layouts, "has_gather_kernel", lambda device: True)


@pytest.mark.parametrize(
    ("k", "sparsity", "dtype", "layout"),
    [
        (4096, 0.9, "float16", layouts.GATHER),
        (4096, 0.78, "float16", layouts.DEFAULT),
        (4096, 0.78, "bfloat16", layouts.GATHER),
        (4096, 0.7, "bfloat16", layouts.DEFAULT),
        # Small, and so padded much; but with hardly any nonzeros it is the smaller one.
        (64, 0.85, "float16", layouts.DEFAULT),
        (4096, 0.99, "float16", layouts.GATHER),
    ],
)
@pytest.mark.usefixtures("as_on_hopper")
def test_layout_follows_from_zeros(k, sparsity, dtype, layout):
    dense = op_cases.random_dense(k, 512, sparsity, dtype)
    w = fj.SparseMatrix.from_dense(dense, tokens=np.int64(8))
    assert w.layout == layout
    np.testing.assert_array_equal(np.asarray(w.to_dense()), dense)


@pytest.mark.usefixtures("as_on_hopper")
def test_a_dense_row_among_others_keeps_the_default_layout():
    dense = op_cases.random_dense(4096, 512, 0.95, "float16")
    dense[:, ::128] = 1
    assert fj.SparseMatrix.from_dense(dense, tokens=8).layout == layouts.DEFAULT


@pytest.mark.usefixtures("as_on_hopper")
def test_arrays_are_where_those_of_the_default_layout_are():
    dense = jnp.asarray(op_cases.random_dense(2048, 256, 0.95, "float16"))
    second = jax.devices()[-1]
    for array in (dense, jax.device_put(dense, second), np.asarray(dense)):
        w = fj.SparseMatrix.from_dense(array, tokens=8)
        plain = fj.SparseMatrix.from_dense(array)
        assert w.layout == layouts.GATHER
        for a, b in zip(w.packed, plain.packed, strict=True):
            assert (a.devices(), a.committed) == (b.devices(), b.committed)


@pytest.mark.usefixtures("as_on_hopper")
def test_packs_concrete_arrays_while_tracing():
    dense = op_cases.random_dense(512, 64, 0.9, "float16")

    @jax.jit
    def multiply(x):
        return fj.sparse_matmul(x, fj.SparseMatrix.from_dense(dense, tokens=8))

    x = op_cases.random_x((2, 512), "float16")
    op_cases.check_product(multiply(x), x, dense)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("sparsity", "tokens", "layout"),
    [
        (0.95, 8, layouts.GATHER),
        (0.95, 9, layouts.DEFAULT),
        (0.5, 8, layouts.DEFAULT),
        (0.75, 8, layouts.DEFAULT),
        (0.95, None, layouts.DEFAULT),
    ],
)
def test_layout_follows_from_zeros_and_tokens(sparsity, tokens, layout):
    if not layouts.has_gather_kernel(jax.devices()[0]):
        layout = layouts.DEFAULT
    dense = jnp.asarray(op_cases.random_dense(4096, 512, sparsity, "float16"))
    w = fj.SparseMatrix.from_dense(dense, tokens=tokens)
    assert w.layout == layout
    np.testing.assert_array_equal(w.to_dense(), dense)
    x = op_cases.random_x((3, 4096), "float16")
    op_cases.check_product(jax.jit(fj.sparse_matmul)(x, w), x, np.asarray(dense))


@pytest.mark.parametrize("tokens", [0, -1, 8.0, True, "8"])
def test_bad_tokens(tokens):
    with pytest.raises(ValueError, match="expected tokens >= 1 or None, got"):
        fj.SparseMatrix.from_dense(np.zeros((8, 8), np.float16), tokens=tokens)


def test_bad_layout():
    w = op_cases.gather_matrix(op_cases.random_dense(64, 64, 0.9, "float16"))
    with pytest.raises(ValueError, match="expected packed layout 'lscd16/1' or"):
        fj.SparseMatrix(*w.packed, w.counts, shape=w.shape, dtype=w.dtype, layout="x")
    with pytest.raises(ValueError, match="expected the packed array 'bitmap'"):
        fj.sparse_matmul(
            np.zeros((1, 64), np.float16),
            fj.SparseMatrix(*w.packed, w.counts, shape=w.shape, dtype=w.dtype),
        )


# --- Multiplying ------------------------------------------------------------------


# All that the kernel does; on CPUs the product is that of the expanded matrix.
@op_cases.for_each("shape", SHAPES, [(1031, 300)])
@pytest.mark.parametrize("dtype", op_cases.HALVES)
@pytest.mark.parametrize("rows", [1, 8])
def test_product(product, shape, rows, dtype):
    dense = op_cases.random_dense(*shape, 0.85, dtype)
    x = op_cases.random_x((rows, shape[0]), dtype)
    op_cases.check_product(product(x, op_cases.gather_matrix(dense)), x, dense)


@pytest.mark.parametrize("rows", [0, 2, 3, 4, 5, 6, 7, 9, 40])
def test_rows(product, rows):
    dense = op_cases.random_dense(257, 300, 0.85, "float16")
    x = op_cases.random_x((rows, 257), "float16")
    op_cases.check_product(product(x, op_cases.gather_matrix(dense)), x, dense)


@op_cases.for_each("pattern", list(op_cases.PATTERNS), ["one_lane"])
def test_product_of_patterns(product, pattern):
    dense = op_cases.pattern_dense(pattern, 1500, 290, "float16")
    x = op_cases.random_x((5, 1500), "float16")
    op_cases.check_product(product(x, op_cases.gather_matrix(dense)), x, dense)


@pytest.mark.parametrize("bias_dtype", ["float32", *op_cases.HALVES])
def test_bias(product, bias_dtype):
    dense = op_cases.random_dense(300, 75, 0.9, "bfloat16")
    bias = op_cases.random_x((75,), bias_dtype, seed=3)
    x = op_cases.random_x((3, 300), "bfloat16")
    y = product(x, op_cases.gather_matrix(dense), bias=bias)
    op_cases.check_product(y, x, dense, bias)


@pytest.mark.parametrize("out", ["float32", "float16"])
@pytest.mark.parametrize("x_dtype", ["float32", "float16"])
def test_dtypes_of_x_and_y(product, x_dtype, out):
    dense = op_cases.random_dense(500, 70, 0.9, "float16")
    x = op_cases.random_x((2, 4, 500), x_dtype)
    y = product(x, op_cases.gather_matrix(dense), preferred_element_type=jnp.dtype(out))
    assert y.dtype == out
    op_cases.check_product(y, x, dense)


@pytest.mark.parametrize("rows", [4, 20])
def test_stack(product, rows):
    """Layers with different numbers of chunks, and a bias for each."""
    layers = [op_cases.random_dense(600, 90, s, "float16", 7) for s in (0.8, 0.95, 1.0)]
    biases = op_cases.random_x((3, 90), "float32", seed=5)
    x = op_cases.random_x((rows, 600), "float16")
    stack = fj.SparseMatrix.stack([op_cases.gather_matrix(dense) for dense in layers])
    multiply = jax.jit(lambda x, i: product(x, stack, bias=biases, layer=i))
    for i, dense in enumerate(layers):
        op_cases.check_product(multiply(x, i), x, dense, biases[i])


def test_gradients(product):
    dense = op_cases.random_dense(300, 70, 0.9, "float16")
    x = jnp.asarray(op_cases.random_x((3, 300), "float16"))
    w = op_cases.gather_matrix(dense)
    y, vjp = jax.vjp(lambda x: product(x, w), x)
    dy = op_cases.random_x(y.shape, "float16", seed=9)
    (dx,) = vjp(jnp.asarray(dy))
    op_cases.check_product(dx, dy, dense.T)
    # With the transpose, which has the default layout, packed as well.
    (dx,) = jax.vjp(lambda x: product(x, w.with_transpose()), x)[1](jnp.asarray(dy))
    op_cases.check_product(dx, dy, dense.T)


def test_gradients_of_the_transpose(product):
    """The default layout, whose transpose is the matrix in the gather layout."""
    dense = op_cases.random_dense(300, 70, 0.9, "float16")
    turned = op_cases.gather_matrix(dense).with_transpose().T
    x = jnp.asarray(op_cases.random_x((3, 70), "float16"))
    y, vjp = jax.vjp(lambda x: product(x, turned), x)
    op_cases.check_product(y, x, dense.T)
    dy = op_cases.random_x(y.shape, "float16", seed=9)
    op_cases.check_product(vjp(jnp.asarray(dy))[0], dy, dense)


def test_vmap_over_weights(product):
    layers = [op_cases.random_dense(200, 40, 0.9, "float16", s) for s in range(3)]
    stack = fj.SparseMatrix.stack([op_cases.gather_matrix(dense) for dense in layers])
    x = op_cases.random_x((3, 2, 200), "float16")
    y = jax.vmap(product)(jnp.asarray(x), stack)
    for i, dense in enumerate(layers):
        op_cases.check_product(y[i], x[i], dense)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", op_cases.HALVES)
@pytest.mark.parametrize("shape", [(7168, 7168), (12_288, 3000), (28_672, 1500)])
def test_large(shape, dtype):
    """Clusters with several strips; the same bits at every call."""
    dense = op_cases.random_dense(*shape, 0.9, dtype)
    x = op_cases.random_x((8, shape[0]), dtype)
    multiply, w = jax.jit(fj.sparse_matmul), op_cases.gather_matrix(dense)
    y = multiply(x, w)
    op_cases.check_product(y, x, dense)
    for _ in range(20):
        np.testing.assert_array_equal(multiply(x, w), y)


# --- Elsewhere --------------------------------------------------------------------


def test_repack():
    dense = op_cases.random_dense(300, 70, 0.9, "float16")
    w = op_cases.gather_matrix(dense).repack()
    assert w.layout == layouts.DEFAULT
    np.testing.assert_array_equal(np.asarray(w.to_dense()), dense)


def test_pickle_is_independent_of_the_layout():
    dense = op_cases.random_dense(300, 70, 0.9, "float16")
    w = pickle.loads(pickle.dumps(op_cases.gather_matrix(dense)))
    assert w.layout == layouts.DEFAULT
    np.testing.assert_array_equal(np.asarray(w.to_dense()), dense)


def test_trainable():
    dense = op_cases.random_dense(300, 70, 0.9, "float16")
    trainable = fj.TrainableMatrix.from_sparse(op_cases.gather_matrix(dense))
    np.testing.assert_array_equal(np.asarray(trainable.to_sparse().to_dense()), dense)


def test_stack_of_two_layouts():
    dense = op_cases.random_dense(300, 70, 0.9, "float16")
    with pytest.raises(ValueError, match="expected matrices of one shape"):
        fj.SparseMatrix.stack(
            [op_cases.gather_matrix(dense), fj.SparseMatrix.from_dense(dense)]
        )
