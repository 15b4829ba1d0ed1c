import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flashjax as fj
from flashjax import matmul

from . import op_cases
from .op_cases import (
    DEFAULTS,
    HALVES,
    IMPLEMENTATIONS,
    KERNELS,
    PATTERNS,
    ROWS,
    SHAPES,
    check_product,
    for_each,
)

FLOATS = (*HALVES, "float32")

every_implementation = pytest.mark.parametrize(
    "product", IMPLEMENTATIONS, indirect=True
)
by_default = pytest.mark.parametrize("product", DEFAULTS, indirect=True)


@pytest.fixture
def product(request):
    """sparse_matmul with an implementation, on the platform that it runs on."""
    implementation, platform = request.param
    with op_cases.on_platform(platform):
        yield functools.partial(fj.sparse_matmul, implementation=implementation)


@pytest.fixture(scope="module")
def small():
    """A dense (70, 33) matrix, the same packed, and x (4, 5, 70)."""
    dense = op_cases.random_dense(70, 33, 0.6, "float16")
    x = op_cases.random_x((4, 5, 70), "float16")
    return dense, fj.SparseMatrix.from_dense(dense), x


# --- Values -----------------------------------------------------------------------


@for_each(
    "case",
    [(shape, dtype) for shape in SHAPES for dtype in HALVES],
    [(SHAPES[0], "bfloat16"), *((shape, "float16") for shape in SHAPES[2:])],
)
def test_shapes(product, case):
    shape, dtype = case
    dense, w, x = op_cases.packed_and_x(shape, 0.7, 5, dtype)
    y = product(x, w)
    assert y.dtype == x.dtype
    check_product(y, x, dense)


@for_each("rows", ROWS, [0, 1, 33, 257])
def test_rows(product, rows):
    dense, w, x = op_cases.packed_and_x((200, 77), 0.8, rows, "float16")
    check_product(product(x, w), x, dense)


@for_each("sparsity", [0.0, 0.01, 0.3, 0.5, 0.9, 0.99, 1.0], [0.0, 0.5, 1.0])
def test_sparsities(product, sparsity):
    dense, w, x = op_cases.packed_and_x((515, 90), sparsity, 9, "bfloat16")
    check_product(product(x, w), x, dense)


@for_each("pattern", list(PATTERNS), ["one_lane", "corners"])
def test_patterns(product, pattern):
    dense = op_cases.pattern_dense(pattern, 700, 150, "float16")
    x = op_cases.random_x((9, 700), "float16")
    check_product(product(x, fj.SparseMatrix.from_dense(dense)), x, dense)


@pytest.mark.parametrize("product", KERNELS, indirect=True)
def test_random_matrices(product):
    @settings(max_examples=25, deadline=None)
    @given(op_cases.masks(), st.integers(0, 20), st.sampled_from(HALVES))
    def check(mask, rows, dtype):
        dense = op_cases.random_dense(*mask.shape, 0.0, dtype)
        dense = np.where(mask, dense, np.zeros_like(dense))
        x = op_cases.random_x((rows, mask.shape[0]), dtype)
        check_product(product(x, fj.SparseMatrix.from_dense(dense)), x, dense)

    check()


@for_each(
    "dtypes",
    list(itertools.product(HALVES, FLOATS, (None, *FLOATS))),
    [*itertools.product(HALVES, FLOATS, (None,)), ("float16", "float16", "bfloat16")],
)
def test_dtypes(product, dtypes):
    w_dtype, x_dtype, preferred = dtypes
    dense = op_cases.random_dense(70, 33, 0.6, w_dtype)
    x = op_cases.random_x((6, 70), x_dtype)
    bias = op_cases.random_x((33,), "float32", seed=3)
    w = fj.SparseMatrix.from_dense(dense)
    y = product(x, w, bias=bias, preferred_element_type=preferred)
    if preferred is None:
        preferred = w_dtype if w_dtype == x_dtype else "float32"
    assert y.dtype == preferred
    check_product(y, x, dense, bias)


@for_each("case", list(itertools.product((3, 300), FLOATS)), [(3, "bfloat16")])
def test_bias(product, case):
    rows, bias_dtype = case
    dense, w, x = op_cases.packed_and_x((70, 33), 0.6, rows, "float16")
    bias = op_cases.random_x((33,), bias_dtype, seed=3)
    y = product(x, w, bias=bias)
    assert y.dtype == jnp.float16
    check_product(y, x, dense, bias)


@every_implementation
def test_bias_is_added_before_rounding(product):
    w = fj.SparseMatrix.from_dense(np.full((1, 1), 2048, np.float16))
    x = np.ones((1, 1), np.float16)
    bias = np.array([0.5], np.float32)
    y = product(x, w, bias=bias, preferred_element_type=jnp.float32)
    assert y.item() == 2048.5
    # 2048 + 1 is a tie in float16, a little more is not.
    y = product(x, w, bias=np.array([1.0 + 2.0**-10], np.float32))
    assert y.item() == 2050


@for_each(
    "leading",
    [(), (1,), (0,), (3, 2), (2, 0, 3), (2, 1, 2, 2)],
    [(), (2, 0, 3), (2, 1, 2, 2)],
)
def test_leading_dimensions(product, leading):
    dense, w, _ = op_cases.packed_and_x((70, 33), 0.6, 1, "float16")
    x = op_cases.random_x((*leading, 70), "float16")
    bias = op_cases.random_x((33,), "float32", seed=3)
    y = product(x, w, bias=bias)
    assert y.shape == (*leading, 33)
    check_product(y, x, dense, bias)


@every_implementation
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("rows", [0, 2, 300])
def test_empty_matrices(product, shape, rows):
    w = fj.SparseMatrix.from_dense(np.zeros(shape, np.float16))
    x = np.ones((rows, shape[0]), np.float16)
    bias = np.arange(shape[1], dtype=np.float32)
    y = product(x, w, bias=bias)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, (rows, shape[1])))
    np.testing.assert_array_equal(product(x, w), np.zeros((rows, shape[1])))


@for_each("rows", [4, 300], [4])
def test_special_weights(product, rows):
    dense, _, x = op_cases.packed_and_x((70, 33), 0.6, rows, "float16")
    x = np.abs(x) + np.float16(1)
    dense[3, 4], dense[69, 32], dense[0, 0] = np.inf, -np.inf, np.nan
    dense[1, 6], dense[2, 6] = np.inf, -np.inf
    y = np.asarray(product(x, fj.SparseMatrix.from_dense(dense)))
    assert np.all(np.isposinf(y[:, 4]))
    assert np.all(np.isneginf(y[:, 32]))
    assert np.all(np.isnan(y[:, [0, 6]]))
    assert np.all(np.isfinite(np.delete(y, [0, 4, 6, 32], axis=1)))


@for_each("rows", [4, 300], [4])
def test_special_x_stays_in_its_row(product, rows):
    dense, w, x = op_cases.packed_and_x((70, 33), 0.6, rows, "float16")
    x[1, 5], x[3, 69] = np.nan, np.inf
    y = np.asarray(product(x, w))
    assert np.all(np.isnan(y[1]) | (dense[5] == 0))
    assert np.all(~np.isfinite(y[3]) | (dense[69] == 0))
    finite = np.delete(np.arange(rows), [1, 3])
    check_product(jnp.asarray(y[finite]), x[finite], dense)


@every_implementation
def test_subnormal_weights(product):
    dense = np.full((3, 2), 6e-8, np.float16)  # the smallest
    assert np.all(dense > 0)
    x = np.full((2, 3), 1024, np.float16)
    y = product(x, fj.SparseMatrix.from_dense(dense), preferred_element_type="float32")
    np.testing.assert_array_equal(y, np.full((2, 2), 3 * 2.0**-14, np.float32))


@for_each("rows", [8, 33, 300], [8])
def test_repeats_bit_for_bit(product, rows):
    _, w, x = op_cases.packed_and_x((1031, 97), 0.7, rows, "bfloat16")
    first = product(x, w, preferred_element_type="float32")
    for _ in range(5):
        again = product(x, w, preferred_element_type="float32")
        np.testing.assert_array_equal(first, again)


@by_default
@pytest.mark.parametrize("rows", [0, 4, 300])
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_default_implementation(product, x_dtype, rows):
    dense = op_cases.random_dense(70, 33, 0.6, "float16")
    x = op_cases.random_x((rows, 70), x_dtype)
    check_product(product(x, fj.SparseMatrix.from_dense(dense)), x, dense)


@by_default
def test_matmul_operator(product, small):
    del product  # wanted for its platform
    dense, w, x = small
    for array in (x, jnp.asarray(x)):
        check_product(array @ w, x, dense)


# --- Transformations --------------------------------------------------------------


@every_implementation
def test_jit_takes_the_matrix_as_an_argument(product, small):
    dense, w, x = small
    traces = []

    @jax.jit
    def f(x, w):
        traces.append(None)
        return product(x, w)

    check_product(f(x, w), x, dense)
    f(x + x, w)
    assert len(traces) == 1


@for_each(
    "dtypes",
    [
        ("float16", None),
        ("float16", "float16"),
        ("bfloat16", "float32"),
        ("float32", "bfloat16"),
        ("float32", "float32"),
    ],
    [("float16", "float32"), ("float32", None)],
)
def test_gradient(product, small, dtypes):
    dense, w, x = small
    x_dtype, bias_dtype = dtypes
    x = jnp.asarray(x).astype(x_dtype)
    bias = None if bias_dtype is None else jnp.linspace(-1, 1, 33, dtype=bias_dtype)
    weights = op_cases.random_x((4, 5, 33), "float32", seed=7)

    def loss(x, bias, f):
        y = f(x, bias).astype(jnp.float32)
        return jnp.sum(y * weights)

    def dense_product(x, bias):
        y = jnp.dot(
            x.astype(jnp.float32), dense.astype(jnp.float32), precision="highest"
        )
        return y if bias is None else y + bias.astype(jnp.float32)[None, None]

    gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    got = gradient(x, bias, lambda x, b: product(x, w, bias=b))
    expected = gradient(x, bias, dense_product)
    # dy is rounded to the dtype of y.
    tolerance = 1e-5 if x_dtype == "float32" else 1e-2
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=10 * tolerance)


@every_implementation
def test_gradient_inside_jit_remat_and_vmap(product, small):
    dense, w, x = small
    x = jnp.asarray(x, jnp.float32)
    w32 = dense.astype(np.float32)

    def loss(x):
        return jnp.sum(jnp.sin(product(x, w)))

    expected = np.cos(np.asarray(x) @ w32) @ w32.T
    transformed = [
        jax.grad(jax.checkpoint(loss)),
        jax.vmap(jax.grad(loss)),
        jax.grad(lambda x: jnp.sum(jax.vmap(loss)(x))),
    ]
    for f in (jax.grad(loss), *map(jax.jit, transformed)):
        np.testing.assert_allclose(f(x), expected, rtol=1e-4, atol=1e-4)


@every_implementation
def test_second_derivative(product):
    dense, w, _ = op_cases.packed_and_x((6, 5), 0.5, 1, "float16")
    x = jnp.linspace(-1, 1, 6)
    w32 = dense.astype(np.float32)

    def hessian(f):
        return jax.jit(jax.jacrev(jax.grad(lambda x: jnp.sum(f(x) ** 3))))(x)

    expected = hessian(lambda x: jnp.dot(x, w32))
    got = hessian(lambda x: product(x, w))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_weights_are_not_differentiable(small):
    _, w, x = small
    with pytest.raises(TypeError, match="uint32"):
        jax.grad(lambda w: jnp.sum(fj.sparse_matmul(x, w)))(w)


def _kernel_calls(f, *args):
    """Shapes of x in the custom calls that f is lowered to."""
    text = jax.jit(f).lower(*args).as_text()
    calls = re.findall(r"custom_call @(flashjax\w+).*: \(tensor<([\dx]+)x\w+>", text)
    return [(name, tuple(map(int, shape.split("x")))) for name, shape in calls]


@every_implementation
def test_vmap_over_x(product, small):
    dense, w, x = small
    f = jax.vmap(jax.vmap(lambda x: product(x, w)), in_axes=1, out_axes=1)
    y = f(x)
    np.testing.assert_array_equal(y, product(x, w))
    check_product(y, x, dense)


def test_vmap_over_x_is_one_kernel_call(small):
    _, w, x = small
    f = jax.vmap(jax.vmap(lambda x: fj.sparse_matmul(x, w, implementation="cpu")))
    assert _kernel_calls(f, x) == [("flashjax_lscd_matmul_cpu", (20, 70))]


@every_implementation
@pytest.mark.parametrize("x_axis", [0, None])
def test_vmap_over_bias(product, small, x_axis):
    dense, w, x = small
    bias = op_cases.random_x((4, 33), "float32", seed=3)
    f = jax.vmap(lambda x, b: product(x, w, bias=b), in_axes=(x_axis, 0))
    y = f(x if x_axis == 0 else x[0], bias)
    assert y.shape == (4, 5, 33)
    for i in range(4):
        check_product(y[i], x[i if x_axis == 0 else 0], dense, bias[i])


@every_implementation
@pytest.mark.parametrize("x_axis", [0, None])
def test_vmap_over_weights(product, x_axis):
    denses = [op_cases.random_dense(40, 24, 0.5, "float16", seed=s) for s in range(3)]
    stack = _stack(denses)
    x = op_cases.random_x((3, 2, 40), "float16")
    x = x if x_axis == 0 else x[0]

    def loss(x, w):
        return jnp.sum(product(x, w, preferred_element_type="float32"))

    @jax.jit
    def f(x, stack):
        y = jax.vmap(product, in_axes=(x_axis, 0))(x, stack)
        return y, jax.vmap(jax.grad(loss), in_axes=(x_axis, 0))(x, stack)

    y, dx = f(x, stack)
    for i, dense in enumerate(denses):
        xi = x[i] if x_axis == 0 else x
        check_product(y[i], xi, dense)
        expected = np.broadcast_to(dense.astype(np.float32).sum(1), (2, 40))
        np.testing.assert_allclose(dx[i], expected, rtol=1e-3, atol=1e-2)


def _stack(denses):
    """A stack of matrices, padded to the same number of segments."""
    packed = [fj.SparseMatrix.from_dense(d) for d in denses]
    segments = max(w.values.shape[0] for w in packed)

    def pad(leaf):
        if leaf.ndim == 3 and leaf.shape[1:] == (16, 32):
            return jnp.pad(leaf, ((0, segments - leaf.shape[0]), (0, 0), (0, 0)))
        return leaf

    return jax.tree.map(lambda *a: jnp.stack([pad(b) for b in a]), *packed)


@every_implementation
def test_scan_over_layers(product):
    denses = [op_cases.random_dense(40, 40, 0.5, "float16", seed=s) for s in range(3)]
    x = op_cases.random_x((2, 40), "float32")

    def layer(x, w):
        return jnp.tanh(product(x, w)), None

    y, _ = jax.lax.scan(layer, jnp.asarray(x), _stack(denses))
    for dense in denses:
        x = np.tanh(x @ dense.astype(np.float32))
    np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-5)


@every_implementation
def test_inside_control_flow(product, small):
    dense, w, x = small
    w32 = dense.astype(np.float32)
    x = jnp.asarray(x[0], jnp.float32)

    @jax.jit
    def f(x, w, steps):
        x = jax.lax.fori_loop(
            0, steps, lambda i, x: jnp.tanh(x.at[:, :33].add(product(x, w))), x
        )
        return jax.lax.cond(steps > 2, lambda x: product(x, w), lambda x: x[:, :33], x)

    expected = np.asarray(x)
    for _ in range(3):
        expected = expected.copy()
        expected[:, :33] += expected @ w32
        expected = np.tanh(expected)
    expected = expected @ w32
    np.testing.assert_allclose(f(x, w, 3), expected, rtol=1e-3, atol=1e-3)


def test_eval_shape(small):
    _, w, x = small
    abstract = jax.eval_shape(lambda w: w, w)
    y = jax.eval_shape(fj.sparse_matmul, x, abstract)
    assert (y.shape, y.dtype) == ((4, 5, 33), jnp.float16)


def test_abstract_operands_are_lowered(small):
    _, w, x = small
    spec = jax.ShapeDtypeStruct(x.shape, x.dtype)
    compiled = jax.jit(fj.sparse_matmul).lower(spec, jax.eval_shape(lambda w: w, w))
    assert compiled.compile()(x, w).shape == (4, 5, 33)


# --- Several devices --------------------------------------------------------------


def _mesh(axis_type):
    devices = jax.local_devices(backend="cpu")[:4]
    if len(devices) < 4:
        pytest.skip("needs 4 CPU devices: run without FLASHJAX_TEST_PLATFORM=cuda")
    return jax.make_mesh((4,), ("data",), (axis_type,), devices=devices)


@pytest.mark.parametrize(
    ("implementation", "check_vma"), [("cpu", True), ("xla", True), (None, False)]
)
def test_shard_map_over_rows(small, implementation, check_vma):
    dense, w, x = small
    bias = jnp.linspace(-1, 1, 33)
    x = jnp.asarray(x, jnp.float32)

    def f(x, bias):
        return fj.sparse_matmul(x, w, bias=bias, implementation=implementation)

    mapped = jax.shard_map(
        f,
        mesh=_mesh(AxisType.Auto),
        in_specs=(P("data"), P()),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    check_product(jax.jit(mapped)(x, bias), x, dense, bias)

    def gradient(f):
        return jax.jit(jax.grad(lambda *args: jnp.sum(f(*args) ** 2), (0, 1)))

    got, expected = gradient(mapped)(x, bias), gradient(f)(x, bias)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["xla", None])
def test_shard_map_result_varies_like_x(small, implementation):
    _, w, x = small

    def f(x):
        def step(x, _):
            y = fj.sparse_matmul(x, w, implementation=implementation)
            return jnp.pad(y, ((0, 0), (0, 0), (0, 37))), None

        return jax.lax.scan(step, x, None, length=2)[0]

    mesh = _mesh(AxisType.Auto)
    in_spec, out_spec = P("data"), P("data")
    jax.eval_shape(jax.shard_map(f, mesh=mesh, in_specs=in_spec, out_specs=out_spec), x)
    with pytest.raises(ValueError, match="out_specs"):
        jax.eval_shape(jax.shard_map(f, mesh=mesh, in_specs=in_spec, out_specs=P()), x)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("data"), P(None, "data"), P(None, None, "data")])
def test_sharded_operands_under_jit(axis_type, spec):
    dense = op_cases.random_dense(72, 32, 0.6, "float16")
    w = fj.SparseMatrix.from_dense(dense)
    x = op_cases.random_x((4, 8, 72), "float16")
    bias = op_cases.random_x((32,), "float32", seed=3)
    mesh = _mesh(axis_type)

    @jax.jit
    def f(x, w, bias):
        y, vjp = jax.vjp(lambda x, bias: fj.sparse_matmul(x, w, bias=bias), x, bias)
        return y, *vjp(jnp.ones_like(y))

    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, spec))
        sharded_bias = jax.device_put(bias, NamedSharding(mesh, P("data")))
        y, dx, dbias = f(sharded, w, sharded_bias)
        if axis_type == AxisType.Explicit:
            rows = [*spec, None, None][:2]
            assert jax.typeof(y).sharding.spec == P(*rows, None)
            assert jax.typeof(dx).sharding == jax.typeof(sharded).sharding
            assert jax.typeof(dbias).sharding == jax.typeof(sharded_bias).sharding
    check_product(y, x, dense, bias)
    expected = np.broadcast_to(dense.astype(np.float32).sum(1), x.shape)
    np.testing.assert_allclose(dx.astype(np.float32), expected, rtol=1e-2, atol=1e-2)
    np.testing.assert_array_equal(dbias, np.full(32, 32))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_weights(small, axis_type):
    dense, w, x = small
    mesh = _mesh(axis_type)

    def split_last(leaf):
        even = leaf.shape[-1] % 4 == 0
        spec = P(*[None] * (leaf.ndim - 1), "data" if even else None)
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        w = jax.tree.map(split_last, w)
        check_product(fj.sparse_matmul(x, w), x, dense)
        np.testing.assert_array_equal(w.to_dense(), dense)


# --- jax.export -------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["xla", None])
def test_export_with_a_symbolic_batch(small, implementation):
    _, w, x = small
    x = x[0]
    (n,) = jax.export.symbolic_shape("n")
    spec = jax.ShapeDtypeStruct((n, 70), x.dtype)
    bias = jnp.linspace(-1, 1, 33)
    checks = [
        jax.export.DisabledSafetyCheck.custom_call(name)
        for name in ("flashjax_lscd_matmul_cpu", "flashjax_lscd_unpack_cpu")
    ]

    def f(x, w, bias):
        return fj.sparse_matmul(x, w, bias=bias, implementation=implementation)

    exported = jax.export.export(jax.jit(f), platforms=["cpu"], disabled_checks=checks)(
        spec, jax.eval_shape(lambda w: w, w), bias
    )
    assert str(exported.out_avals[0].shape) == "(n, 33)"
    for rows in (1, 5, 100):
        x = op_cases.random_x((rows, 70), "float16")
        got = jax.jit(exported.call)(x, w, bias)
        np.testing.assert_allclose(got, f(x, w, bias), rtol=2e-3, atol=2e-3)


# --- Bad input --------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (71,), (70, 4), (3, 69)])
def test_wrong_x_shape(small, shape):
    _, w, _ = small
    with pytest.raises(ValueError, match=r"\(\.\.\., 70\).*\(70, 33\).*got") as error:
        fj.sparse_matmul(np.zeros(shape, np.float16), w)
    assert str(error.value).endswith(f"got {shape}")


@pytest.mark.parametrize("dtype", ["float64", "int32", "bool", "complex64"])
def test_wrong_x_dtype(small, dtype):
    _, w, _ = small
    with pytest.raises(ValueError, match=f"float16, bfloat16 or float32.*got {dtype}"):
        fj.sparse_matmul(np.zeros((2, 70), dtype), w)


@pytest.mark.parametrize("shape", [(), (1,), (32,), (1, 33)])
def test_wrong_bias_shape(small, shape):
    _, w, x = small
    expected = re.escape(f"bias of shape (33,) for w of shape (70, 33), got {shape}")
    with pytest.raises(ValueError, match=expected):
        fj.sparse_matmul(x, w, bias=np.zeros(shape, np.float32))


def test_wrong_bias_dtype(small):
    _, w, x = small
    with pytest.raises(ValueError, match="float dtype, got int32"):
        fj.sparse_matmul(x, w, bias=np.zeros(33, np.int32))


@pytest.mark.parametrize("dtype", ["int8", "float64", "no dtype", object()])
def test_wrong_preferred_element_type(small, dtype):
    _, w, x = small
    with pytest.raises(ValueError, match=r"preferred_element_type.*got"):
        fj.sparse_matmul(x, w, preferred_element_type=dtype)


def test_no_arrays(small):
    dense, w, x = small
    with pytest.raises(TypeError, match=r"SparseMatrix, got ndarray"):
        fj.sparse_matmul(x, dense)
    with pytest.raises(TypeError, match=r"x to be a numpy or JAX array, got list"):
        fj.sparse_matmul([1.0], w)
    with pytest.raises(TypeError, match=r"bias to be a numpy or JAX array, got float"):
        fj.sparse_matmul(x, w, bias=1.0)


def test_errors_are_raised_before_tracing(small):
    _, w, _ = small
    with pytest.raises(ValueError, match=r"got \(3, 69\)"):
        jax.jit(fj.sparse_matmul)(np.zeros((3, 69), np.float16), w)


def test_a_stack_is_refused(small):
    _, w, x = small
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), w)
    with pytest.raises(ValueError, match="got a stack"):
        fj.sparse_matmul(x, stack)


def test_unknown_implementation(small):
    _, w, x = small
    with pytest.raises(ValueError, match=r"'cuda', 'cpu', 'xla'.*got 'tpu'"):
        fj.sparse_matmul(x, w, implementation="tpu")


@pytest.mark.skipif(fj.cuda_available(), reason="has a GPU")
def test_cuda_that_cannot_run(small):
    _, w, x = small
    with pytest.raises(NotImplementedError) as error:
        fj.sparse_matmul(x, w, implementation="cuda")
    assert fj.cuda_unavailable_reason() in str(error.value)


@pytest.mark.gpu
def test_implementations_of_the_other_platform(small):
    _, w, x = small
    with pytest.raises(NotImplementedError, match="x lives on gpu"):
        fj.sparse_matmul(jnp.asarray(x), w, implementation="cpu")
    on_cpu = jax.device_put(x, jax.local_devices(backend="cpu")[0])
    with pytest.raises(NotImplementedError, match="x lives on cpu"):
        fj.sparse_matmul(on_cpu, w, implementation="cuda")


def test_thresholds_are_documented():
    assert set(matmul.KERNEL_ROWS) == {"cuda", "cpu"}
