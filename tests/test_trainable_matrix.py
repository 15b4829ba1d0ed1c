"""TrainableMatrix: gradients at the stored positions alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import flashjax as fj
from flashjax import _native, sample
from flashjax.trainable_matrix import TrainableMatrix

from . import op_cases
from .mesh_support import make_mesh
from .op_cases import HALVES, SHAPES, every_implementation, for_each


@pytest.fixture(scope="module")
def small():
    """A trainable (70, 33) matrix, x (4, 5, 70) and weights of the loss (4, 5, 33)."""
    t = make((70, 33), 0.6, "float16")
    x = op_cases.random_x((4, 5, 70), "float32")
    return t, x, op_cases.random_x((4, 5, 33), "float32", seed=2)


def make(shape, sparsity, dtype, values_dtype="float32") -> TrainableMatrix:
    dense = op_cases.random_dense(*shape, sparsity, dtype)
    return TrainableMatrix.from_sparse(fj.SparseMatrix.from_dense(dense), values_dtype)


def scatter(t: TrainableMatrix, slots) -> np.ndarray:
    """Slots in float32 to a dense (K, M), exactly: each half of the bits by itself."""
    bits = np.asarray(slots, np.float32).view(np.uint32)
    positions = [np.asarray(a) for a in (t.positions.bitmap, t.positions.entries)]

    def unpack(halves):
        words = np.ascontiguousarray(halves[..., 0] | halves[..., 1] << np.uint32(16))
        dense = _native.cpu.unpack(*positions, words, *t.shape)
        return dense.astype(np.uint32)

    low, high = unpack(bits & 0xFFFF), unpack(bits >> 16)
    return (low | high << np.uint32(16)).view(np.float32)


def value_gradient(product, t, x, weights, **kwargs):
    """Of sum(product * weights)."""

    def loss(values):
        y = product(x, t.replace(values), preferred_element_type="float32", **kwargs)
        return jnp.sum(y * weights)

    return jax.grad(loss)(t.values)


def check_gradient(gradient, t, x, weights):
    """Against the dense masked gradient in float64; slots without a value have 0."""
    assert gradient.shape == t.values.shape
    assert gradient.dtype == t.values.dtype
    x64 = np.asarray(x).astype(np.float64).reshape(-1, t.shape[0])
    dy64 = np.asarray(weights).astype(np.float64).reshape(-1, t.shape[1])
    stored = np.asarray(t.to_dense()) != 0
    expected = np.where(stored, x64.T @ dy64, 0)
    magnitude = np.abs(x64.T) @ np.abs(dy64)
    epsilon = 2.0**-24 * (4 + len(x64))
    if gradient.dtype != np.float32:
        epsilon += float(jnp.finfo(gradient.dtype).eps)
    got = scatter(t, gradient.astype(jnp.float32))
    np.testing.assert_array_less(np.abs(got - expected), epsilon * magnitude + 1e-30)
    # Nothing is anywhere but at the stored values.
    assert np.count_nonzero(gradient) == np.count_nonzero(got)
    assert np.all(got[~stored] == 0)


# --- The container ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 5), (5, 0), (0, 0)])
def test_round_trip(shape, dtype):
    dense = op_cases.random_dense(*shape, 0.8, dtype)
    w = fj.SparseMatrix.from_dense(dense)
    t = TrainableMatrix.from_sparse(w)
    assert (t.shape, t.dtype, t.nnz, t.ndim) == (w.shape, w.dtype, w.nnz, 2)
    assert (t.size, t.sparsity) == (w.size, w.sparsity)
    assert t.values.dtype == jnp.float32
    assert np.count_nonzero(t.values) == w.nnz
    for a, b in zip(w.packed, t.to_sparse().packed, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(jax.jit(lambda t: t.to_dense())(t), dense)
    assert t.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(t))
    np.testing.assert_array_equal(scatter(t, t.values), dense.astype(np.float32))


def test_repr():
    t = make((70, 33), 0.6, "bfloat16", "float16")
    assert repr(t) == (
        "TrainableMatrix(shape=(70, 33), dtype=bfloat16, values=float16, "
        f"layout={t.positions.layout!r})"
    )


def test_no_dense_gradient_is_kept():
    t = make((256, 16 * 80), 0.9, "float16")
    x = jnp.ones((4, 256), jnp.float32)

    def loss(values):
        return jnp.sum(fj.sparse_matmul(x, t.replace(values)))

    text = jax.jit(jax.grad(loss)).lower(t.values).as_text()
    assert "tensor<1024x256xf32>" in text  # a block
    assert "tensor<1280x256xf32>" not in text
    assert "tensor<256x1280xf32>" not in text


def test_few_entries_beyond_the_nonzeros():
    t = make((2048, 1040), 0.8, "float16")
    assert t.values.size < 1.08 * t.nnz


def test_padding_counts_as_zero(small):
    t, x, weights = small
    dirty = t.replace(jnp.where(t.values == 0, jnp.float32(7), t.values))
    np.testing.assert_array_equal(dirty.to_dense(), t.to_dense())
    np.testing.assert_array_equal(fj.sparse_matmul(x, dirty), fj.sparse_matmul(x, t))
    gradient = value_gradient(fj.sparse_matmul, dirty, x, weights)
    check_gradient(gradient, t, x, weights)


def test_a_value_that_becomes_zero_keeps_its_position(small):
    t, x, weights = small
    zeroed = t.replace(jnp.zeros_like(t.values))
    assert not np.any(zeroed.to_dense())
    gradient = value_gradient(fj.sparse_matmul, zeroed, x, weights)
    check_gradient(gradient, t, x, weights)


def test_products_round_the_values(small):
    t, x, _ = small
    third = t.replace(jnp.where(t.values == 0, 0, jnp.float32(1 / 3)))
    expected = fj.sparse_matmul(x, fj.SparseMatrix.from_dense(third.to_dense()))
    np.testing.assert_array_equal(fj.sparse_matmul(x, third), expected)
    np.testing.assert_array_equal(x @ third, expected)


# --- Gradients ----------------------------------------------------------------------


@for_each(
    "case",
    [(shape, dtype) for shape in SHAPES for dtype in HALVES],
    [(SHAPES[0], "bfloat16"), *((shape, "float16") for shape in SHAPES[2:5])],
)
def test_shapes(product, case):
    shape, dtype = case
    t = make(shape, 0.7, dtype)
    x = op_cases.random_x((9, shape[0]), "float32")
    weights = op_cases.random_x((9, shape[1]), "float32", seed=2)
    check_gradient(value_gradient(product, t, x, weights), t, x, weights)


@every_implementation
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.99, 1.0])
def test_sparsities(product, sparsity):
    t = make((515, 90), sparsity, "bfloat16")
    x = op_cases.random_x((9, 515), "float32")
    weights = op_cases.random_x((9, 90), "float32", seed=2)
    check_gradient(value_gradient(product, t, x, weights), t, x, weights)


@every_implementation
@pytest.mark.parametrize("pattern", ["one_lane", "corners", "dense_then_empty"])
def test_patterns(product, pattern):
    dense = op_cases.pattern_dense(pattern, 700, 150, "float16")
    t = TrainableMatrix.from_sparse(fj.SparseMatrix.from_dense(dense))
    x = op_cases.random_x((3, 700), "float32")
    weights = op_cases.random_x((3, 150), "float32", seed=2)
    check_gradient(value_gradient(product, t, x, weights), t, x, weights)


@every_implementation
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("rows", [0, 2])
def test_empty_matrices(product, shape, rows):
    t = make(shape, 0.5, "float16")
    x = np.ones((rows, shape[0]), np.float32)
    gradient = value_gradient(product, t, x, np.ones((rows, shape[1]), np.float32))
    assert gradient.shape == t.values.shape
    assert not np.any(gradient)


@every_implementation
@pytest.mark.parametrize("leading", [(), (0,), (2, 1, 3)])
def test_leading_dimensions(product, leading):
    t = make((70, 33), 0.6, "float16")
    x = op_cases.random_x((*leading, 70), "float32")
    weights = op_cases.random_x((*leading, 33), "float32", seed=2)
    check_gradient(value_gradient(product, t, x, weights), t, x, weights)


@every_implementation
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("values_dtype", ["float32", "float16", "bfloat16"])
def test_half_precision(product, half, values_dtype):
    t = make((130, 50), 0.6, half, values_dtype)
    x = op_cases.random_x((7, 130), half)
    weights = op_cases.random_x((7, 50), half, seed=2)

    def loss(values):
        return jnp.sum((product(x, t.replace(values)) * weights).astype(jnp.float32))

    check_gradient(jax.grad(loss)(t.values), t, x, weights)


@every_implementation
def test_several_blocks(product, monkeypatch):
    monkeypatch.setattr(sample, "BLOCK_STRIPS", 3)
    jax.clear_caches()
    for columns in (16 * 9, 16 * 7 + 1):  # a last block that overlaps, and one not
        t = make((300, columns), 0.7, "float16")
        x = op_cases.random_x((9, 300), "float32")
        weights = op_cases.random_x((9, columns), "float32", seed=2)
        check_gradient(value_gradient(product, t, x, weights), t, x, weights)
    jax.clear_caches()


def test_random_matrices():
    jitted_sample = jax.jit(sample.sample, static_argnums=1)

    @settings(max_examples=6, deadline=None)
    @given(op_cases.masks(), st.integers(0, 5), st.sampled_from(HALVES))
    def check(mask, rows, dtype):
        dense = op_cases.random_dense(*mask.shape, 0.0, dtype)
        dense = np.where(mask, dense, np.zeros_like(dense))
        t = TrainableMatrix.from_sparse(fj.SparseMatrix.from_dense(dense))
        # Sampling alone: every stored element goes where it is read from.
        target = op_cases.random_x(mask.shape, "float32", seed=rows)
        slots = jitted_sample((target,), mask.shape, t.positions.arrays)
        np.testing.assert_array_equal(scatter(t, slots), np.where(mask, target, 0))

    check()


@every_implementation
def test_x_and_bias_have_their_gradients(product, small):
    t, x, weights = small
    bias = op_cases.random_x((33,), "float32", seed=4)

    def loss(x, values, bias):
        return jnp.sum(product(x, t.replace(values), bias=bias) * weights)

    dx, dvalues, dbias = jax.grad(loss, (0, 1, 2))(x, t.values, bias)
    check_gradient(dvalues, t, x, weights)
    w = t.to_sparse()

    def frozen(x, bias):
        return jnp.sum(product(x, w, bias=bias) * weights)

    expected_dx, expected_dbias = jax.grad(frozen, (0, 1))(x, bias)
    np.testing.assert_array_equal(dx, expected_dx)
    np.testing.assert_array_equal(dbias, expected_dbias)


def test_gradient_of_to_dense(small):
    t, _, _ = small
    target = op_cases.random_x(t.shape, "float32")

    def loss(values):
        return jnp.sum(t.replace(values).to_dense().astype(jnp.float32) * target)

    gradient = jax.grad(loss)(t.values)
    expected = np.where(np.asarray(t.to_dense()) != 0, target.astype(np.float16), 0)
    np.testing.assert_array_equal(scatter(t, gradient), expected)


def test_without_jit(small):
    """As one debugs."""
    t, x, weights = small
    with jax.disable_jit():
        y = fj.sparse_matmul(x, t.to_sparse())
        gradient = value_gradient(fj.sparse_matmul, t, x, weights)
        dense_gradient = jax.grad(lambda v: t.replace(v).to_dense().sum())(t.values)
    np.testing.assert_array_equal(y, fj.sparse_matmul(x, t))
    check_gradient(gradient, t, x, weights)
    assert np.array_equal(dense_gradient != 0, t.values != 0)


@every_implementation
def test_gradients_with_x64(product, small, x64):
    t, x, weights = small
    check_gradient(value_gradient(product, t, x, weights), t, x, weights)


def test_repeats_bit_for_bit():
    t = make((1031, 300), 0.7, "float16")
    x = op_cases.random_x((33, 1031), "float32")
    weights = op_cases.random_x((33, 300), "float32", seed=2)
    first = np.asarray(value_gradient(fj.sparse_matmul, t, x, weights))
    for _ in range(5):
        again = value_gradient(fj.sparse_matmul, t, x, weights)
        np.testing.assert_array_equal(first, again)


# --- Transformations ----------------------------------------------------------------


def test_jit_and_remat(small):
    t, x, weights = small
    gradient = jax.jit(functools.partial(value_gradient, fj.sparse_matmul))
    check_gradient(gradient(t, x, weights), t, x, weights)
    remat = jax.checkpoint(fj.sparse_matmul, static_argnums=())

    def product(x, t, **kwargs):
        return remat(x, t).astype(jnp.float32)

    check_gradient(value_gradient(product, t, x, weights), t, x, weights)


def test_vmap_sums_over_the_batch(small):
    t, x, weights = small

    def product(x, t, **kwargs):
        return jax.vmap(lambda x: fj.sparse_matmul(x, t, **kwargs))(x)

    check_gradient(value_gradient(product, t, x, weights), t, x, weights)


def test_vmap_of_gradients(small):
    t, x, weights = small
    gradients = jax.vmap(
        lambda x, weights: value_gradient(fj.sparse_matmul, t, x, weights)
    )(x, weights)
    for gradient, one_x, one_weights in zip(gradients, x, weights, strict=True):
        check_gradient(gradient, t, one_x, one_weights)


def test_vmap_over_values(small):
    t, x, weights = small
    stack = jnp.stack([t.values, 2 * t.values])
    gradients = jax.vmap(
        lambda values: value_gradient(fj.sparse_matmul, t.replace(values), x, weights)
    )(stack)
    for gradient in gradients:
        check_gradient(gradient, t, x, weights)


def test_scan_over_steps_and_layers(small):
    t, x, weights = small

    def product(x, t, **kwargs):
        def step(carry, x):
            return carry, fj.sparse_matmul(x, t, **kwargs)

        return jax.lax.scan(step, 0, x)[1]

    check_gradient(value_gradient(product, t, x, weights), t, x, weights)

    square = make((40, 40), 0.5, "float16")
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), square)
    x = op_cases.random_x((3, 40), "float32")

    def scanned(values):
        def layer(x, t):
            return fj.sparse_matmul(x, t), None

        return jnp.sum(jax.lax.scan(layer, x, stack.replace(values))[0])

    gradient = jax.grad(scanned)(stack.values)
    hidden = fj.sparse_matmul(x, square)
    check_gradient(gradient[1], square, hidden, np.ones((3, 40), np.float32))


def test_vmap_is_one_product(small):
    def product(x, t, **kwargs):
        return jax.vmap(lambda x: fj.sparse_matmul(x, t, **kwargs))(x)

    text = str(jax.make_jaxpr(functools.partial(value_gradient, product))(*small))
    assert text.count(" sampled_product[") == 1
    assert "scan" not in text


@every_implementation
def test_forward_mode_and_second_derivatives(product, small):
    t, x, _ = small
    target = jnp.float32(0.5)

    def loss(x, values):
        y = product(x, t.replace(values), preferred_element_type="float32")
        return jnp.mean((y - target) ** 3)

    def dense_loss(x, dense):
        y = jnp.dot(x, dense, precision="highest")
        return jnp.mean((y - target) ** 3)

    dense = scatter(t, t.values)
    mask = dense != 0
    # Exact in half precision, which tangents are rounded to.
    direction = jnp.where(t.values == 0, 0, jnp.float32(0.25))
    dense_direction = jnp.where(mask, jnp.float32(0.25), 0)
    dx = jnp.full_like(jnp.asarray(x), 0.5)

    def both(f, *args):
        return jax.jvp(f, args, (dx, direction))

    def dense_both(f, *args):
        return jax.jvp(f, args, (dx, dense_direction))

    for got, expected in zip(
        both(loss, x, t.values), dense_both(dense_loss, x, dense), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-4)
    _, (got_x, got_values) = both(jax.grad(loss, (0, 1)), x, t.values)
    _, (want_x, want_values) = dense_both(jax.grad(dense_loss, (0, 1)), x, dense)
    np.testing.assert_allclose(got_x, want_x, rtol=1e-3, atol=1e-4)
    want_values = jnp.where(mask, want_values, 0)
    np.testing.assert_allclose(scatter(t, got_values), want_values, 1e-3, 1e-4)

    # Reverse over reverse: a penalty on the gradient of x, as a function of the values.
    def penalty(f):
        return lambda x, values: jnp.sum(jax.grad(f)(x, values) ** 2) * 100

    got = scatter(t, jax.grad(penalty(loss), 1)(x, t.values))
    want = jnp.where(mask, jax.grad(penalty(dense_loss), 1)(x, dense), 0)
    scale = float(jnp.abs(want).max())
    np.testing.assert_allclose(got, want, rtol=1e-2, atol=2e-3 * scale)


def data_parallel(t, x, weights):
    mesh = make_mesh(names=("data",))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P()
    )
    def gradient(t, x, weights):
        return value_gradient(fj.sparse_matmul, t, x, weights)

    return gradient(t, x, weights)


def test_shard_map_sums_over_devices(small):
    t, x, weights = small
    check_gradient(jax.jit(data_parallel)(t, x, weights), t, x, weights)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded_batch(small, kind):
    t, x, weights = small
    mesh = make_mesh(names=("data",), kind=getattr(jax.sharding.AxisType, kind))
    split = jax.NamedSharding(mesh, P("data"))
    everywhere = jax.NamedSharding(mesh, P())
    args = (
        jax.device_put(t, everywhere),
        jax.device_put(x, split),
        jax.device_put(weights, split),
    )
    gradient = jax.jit(functools.partial(value_gradient, fj.sparse_matmul))(*args)
    check_gradient(jax.device_get(gradient), t, x, weights)


# --- Training -----------------------------------------------------------------------


def test_adam_step_equals_the_dense_masked_one(small):
    t, x, weights = small
    optimizer = optax.adamw(0.1, weight_decay=0.01)
    dense = scatter(t, t.values)
    mask = dense != 0
    values, sparse_state = t.values, optimizer.init(t.values)
    dense_state = optimizer.init(jnp.asarray(dense))
    target = jnp.asarray(weights)

    def loss(y):
        return jnp.mean((y - target) ** 2)

    def sparse_loss(values):
        return loss(fj.sparse_matmul(x, t.replace(values)))

    def dense_loss(dense):
        rounded = dense.astype(jnp.float16).astype(jnp.float32)
        return loss(jnp.dot(x, rounded, precision="highest"))

    with jax.numpy_dtype_promotion("standard"):
        for _ in range(3):
            gradient = jax.grad(sparse_loss)(values)
            updates, sparse_state = optimizer.update(gradient, sparse_state, values)
            values = optax.apply_updates(values, updates)
            gradient = jax.grad(dense_loss)(dense) * mask
            updates, dense_state = optimizer.update(gradient, dense_state, dense)
            dense = optax.apply_updates(dense, updates)
    assert np.all(np.asarray(dense)[~mask] == 0)
    np.testing.assert_allclose(scatter(t, values), dense, rtol=1e-3, atol=1e-4)
    assert np.count_nonzero(sparse_state[0].mu) <= t.nnz


# --- Errors -------------------------------------------------------------------------


def test_errors(small):
    t, x, _ = small
    with pytest.raises(ValueError, match="float32, float16 or bfloat16, got int32"):
        TrainableMatrix.from_sparse(t.to_sparse(), "int32")
    with pytest.raises(TypeError, match="expected a SparseMatrix, got ndarray"):
        TrainableMatrix.from_sparse(np.ones((2, 2), np.float16))
    with pytest.raises(
        ValueError, match=r"x of shape \(\.\.\., 70\).*got \(4, 5, 69\)"
    ):
        fj.sparse_matmul(x[..., 1:], t)
    with pytest.raises(TypeError, match="expected x to be a numpy or JAX array"):
        fj.sparse_matmul([1.0], t)
    with pytest.raises(ValueError, match=r"bias of shape \(33,\)"):
        fj.sparse_matmul(x, t, bias=np.ones(3, np.float32))
    with pytest.raises(ValueError, match="layer: expected a stack of SparseMatrix"):
        fj.sparse_matmul(x, t, layer=0)
    with pytest.raises(ValueError, match="implementation to be one of"):
        fj.sparse_matmul(x, t, implementation="tpu")
    with pytest.raises(ValueError, match="preferred_element_type float16"):
        fj.sparse_matmul(x, t, preferred_element_type="int8")
    with pytest.raises(ValueError, match=r"'values' .*\(\d+, 16, 32, 2\), got"):
        fj.sparse_matmul(x, t.replace(t.values[1:]))
    with pytest.raises(ValueError, match=r"'values' .* as float32 or .*, got int32"):
        t.replace(t.values.astype(jnp.int32)).to_dense()
    with pytest.raises(ValueError, match=r"'values' .*got object"):
        t.replace(object()).to_sparse()


def test_native_errors(small):
    t, _, _ = small
    positions = t.positions
    slots = jnp.zeros_like(t.values)

    def call(rows=48, k=70, first=0, slots=slots):
        block = jnp.zeros((rows, k), jnp.float32)
        return sample._kernel("flashjax_lscd_sample_cpu")(
            block, positions.bitmap, positions.entries, jnp.asarray(first), slots
        )

    with op_cases.on_platform("cpu"):
        assert call().shape == slots.shape
        for message, kwargs in (
            ("block: expected a multiple of 16 rows, at most 48, got 17", {"rows": 17}),
            ("block: expected a multiple of 16 rows, at most 48, got 64", {"rows": 64}),
            (r"bitmap: expected shape \(3, 2, 32, 4\)", {"k": 300}),
            ("first_strip: expected dtype int32", {"first": 0.0}),
            ("slots: expected dtype float32", {"slots": slots.astype(jnp.float16)}),
        ):
            with pytest.raises(jax.errors.JaxRuntimeError, match=message):
                call(**kwargs)
