import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import layout_reference
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashjax as fj
from flashjax import _native, reference

from . import op_cases

LEAVES = ("bitmap", "entries", "values", "counts")


@pytest.fixture(scope="module")
def dense():
    return op_cases.random_dense(70, 33, 0.6, "float16")


@pytest.fixture(scope="module")
def w(dense):
    return fj.SparseMatrix.from_dense(dense)


def bits(array) -> np.ndarray:
    """The bit patterns, -0.0 as 0."""
    words = np.ascontiguousarray(array).view(np.uint16)
    return np.where(words == 0x8000, np.uint16(0), words)


def assert_same(got, expected):
    assert isinstance(got, jax.Array)
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(bits(got), bits(expected))


# --- Round trips ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", op_cases.HALVES)
@pytest.mark.parametrize("shape", [*op_cases.SHAPES, (0, 0), (0, 5), (5, 0)], ids=str)
def test_round_trip(shape, dtype):
    dense = op_cases.random_dense(*shape, 0.7, dtype)
    w = fj.SparseMatrix.from_dense(dense)
    assert_same(w.to_dense(), dense)
    assert w.nnz == np.count_nonzero(dense)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
def test_round_trip_of_every_bit_pattern(sparsity):
    words = np.random.default_rng(0).permutation(1 << 16).astype(np.uint16)
    for dtype in op_cases.HALVES:
        dense = words.reshape(512, 128).copy().view(jnp.dtype(dtype))
        dense[np.random.default_rng(1).random(dense.shape) < sparsity] = 0
        assert_same(fj.SparseMatrix.from_dense(dense).to_dense(), dense)


@pytest.mark.parametrize("pattern", op_cases.PATTERNS)
def test_round_trip_of_patterns(pattern):
    dense = op_cases.pattern_dense(pattern, 700, 150, "bfloat16")
    assert_same(fj.SparseMatrix.from_dense(dense).to_dense(), dense)


@settings(max_examples=60, deadline=None)
@given(op_cases.masks(), st.integers(0, 3))
def test_native_round_trip(mask, threads):
    words = np.random.default_rng(0).integers(0, 1 << 16, mask.shape, np.uint16)
    dense = np.where(mask, words, np.uint16(0)).view(np.float16)
    w = fj.SparseMatrix.from_dense(dense, threads=threads)
    got = _native.cpu.unpack(*map(np.asarray, w.packed), *dense.shape, threads)
    np.testing.assert_array_equal(bits(got), bits(dense))
    assert w.nnz == np.count_nonzero(dense)
    w.check_leaves("test")


def test_packs_like_the_slow_packer(dense, w):
    expected = layout_reference.pack(dense.view(np.uint16))
    for name, leaf in zip(LEAVES, expected, strict=True):
        np.testing.assert_array_equal(getattr(w, name), leaf, err_msg=name)


def test_plain_jax_unpacks_several_chains():
    dense = op_cases.random_dense(1024, 2080, 0.8, "float16")
    w = fj.SparseMatrix.from_dense(dense)
    assert reference.chain_count(w.shape) > 1
    np.testing.assert_array_equal(
        jax.jit(reference.unpack, static_argnums=(1, 2))(w.packed, w.shape, w.dtype),
        dense,
    )


def test_negative_zero_counts_as_zero():
    dense = np.array([[0.0, -0.0, 1.0]], np.float16)
    w = fj.SparseMatrix.from_dense(dense)
    assert w.nnz == 1
    assert_same(w.to_dense(), dense)


def test_memory_orders(dense, w):
    expected = [np.asarray(leaf) for leaf in jax.tree.leaves(w)]
    wide = np.zeros((140, 66), np.float16)
    wide[::2, ::2] = dense
    readonly = dense.copy()
    readonly.flags.writeable = False
    for same in (
        np.asfortranarray(dense),
        dense.T.copy().T,
        wide[::2, ::2],
        np.flip(np.flip(dense).copy()),
        dense.astype(">f2"),
        readonly,
        jnp.asarray(dense),
    ):
        packed = fj.SparseMatrix.from_dense(same)
        assert packed.dtype == np.float16
        for got, leaf in zip(jax.tree.leaves(packed), expected, strict=True):
            np.testing.assert_array_equal(got, leaf)


def test_input_is_not_modified(dense):
    original = dense.copy()
    fj.SparseMatrix.from_dense(dense)
    np.testing.assert_array_equal(dense, original)


def test_threads_do_not_matter():
    dense = op_cases.random_dense(512, 700, 0.7, "float16")
    one, many = (fj.SparseMatrix.from_dense(dense, threads=n) for n in (1, 3))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_array_equal(a, b)


# --- Properties -------------------------------------------------------------------


def test_properties(dense, w):
    assert w.shape == (70, 33)
    assert w.ndim == 2
    assert w.size == dense.size
    assert w.dtype == np.float16
    assert w.nnz == np.count_nonzero(dense)
    assert w.sparsity == pytest.approx(1 - np.count_nonzero(dense) / dense.size)
    assert w.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(w))
    assert fj.SparseMatrix.from_dense(np.zeros((0, 3), np.float16)).sparsity == 0


@pytest.mark.parametrize("shape", [(2048, 512), (768, 3072)])
@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.7, 0.8])
def test_size_limit(sparsity, shape):
    dense = op_cases.random_dense(*shape, sparsity, "float16")
    w = fj.SparseMatrix.from_dense(dense)
    limit = 1.06 * (2 * (1 - w.sparsity) + 0.125) * dense.size
    assert w.nbytes <= limit


def test_repr(w):
    assert repr(w) == (
        f"SparseMatrix(shape=(70, 33), dtype=float16, nnz={w.nnz}, "
        f"sparsity={w.sparsity:.3f}, nbytes={w.nbytes}, layout='lscd16/1')"
    )
    abstract = jax.eval_shape(lambda w: w, w)
    assert repr(abstract) == (
        "SparseMatrix(shape=(70, 33), dtype=float16, layout='lscd16/1')"
    )


def test_is_frozen(w):
    with pytest.raises(dataclasses.FrozenInstanceError):
        w.shape = (1, 1)


# --- A pytree ---------------------------------------------------------------------


def test_leaves(w):
    leaves, tree = jax.tree.flatten(w)
    assert [leaf.dtype for leaf in leaves] == [jnp.uint32] * 4
    again = jax.tree.unflatten(tree, leaves)
    assert (again.shape, again.dtype, again.layout) == (w.shape, w.dtype, w.layout)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(w)]
    assert paths == [f".{name}" for name in LEAVES]


@pytest.mark.parametrize("leaf", [None, "text", object(), 1.0, jax.P("data"), (1, 2)])
def test_tree_utilities_may_put_in_anything(w, leaf):
    replaced = jax.tree.map(lambda _: leaf, w)
    assert replaced.bitmap is leaf
    assert repr(replaced).startswith("SparseMatrix(shape=(70, 33)")
    with pytest.raises(ValueError, match="'bitmap'"):
        replaced.to_dense()


def test_equal_structure_of_equal_shapes(w):
    other = fj.SparseMatrix.from_dense(np.ones((70, 33), np.float16))
    assert jax.tree.structure(w) == jax.tree.structure(other)
    other = fj.SparseMatrix.from_dense(np.ones((33, 70), np.float16))
    assert jax.tree.structure(w) != jax.tree.structure(other)


def test_jit_argument_and_result(dense, w):
    traces = []

    @jax.jit
    def f(w):
        traces.append(None)
        return w, w.to_dense() * 2

    again, double = f(w)
    f(again)
    assert len(traces) == 1
    np.testing.assert_array_equal(double, dense * 2)
    assert_same(again.to_dense(), dense)


def test_donation(dense):
    w = fj.SparseMatrix.from_dense(dense)
    moved = jax.jit(lambda w: w, donate_argnums=0)(w)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(w))
    assert_same(moved.to_dense(), dense)


def test_scan_and_vmap_over_a_stack(dense, w):
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), w)
    assert "nnz" not in repr(stack)
    _, denses = jax.lax.scan(lambda _, w: (None, w.to_dense()), None, stack)
    np.testing.assert_array_equal(denses, [dense, dense])
    np.testing.assert_array_equal(jax.vmap(lambda w: w.to_dense())(stack), denses)
    one = jax.tree.map(lambda leaf: leaf[1], stack)
    assert_same(one.to_dense(), dense)
    with pytest.raises(ValueError, match=r"got a stack.*\(2, 3, 1, 32, 4\)"):
        stack.to_dense()


def test_numpy_leaves(dense, w):
    host = jax.tree.map(np.asarray, w)
    assert host.nnz == w.nnz
    assert host.nbytes == w.nbytes
    assert_same(host.to_dense(), dense)


# --- Where it lives ---------------------------------------------------------------


def test_stays_on_the_device_of_the_array(dense):
    device = jax.devices()[-1]
    w = fj.SparseMatrix.from_dense(jax.device_put(dense, device))
    for leaf in (*jax.tree.leaves(w), w.to_dense()):
        assert leaf.devices() == {device}
        assert leaf.committed


def test_default_device(dense):
    device = jax.devices()[-1]
    with jax.default_device(device):
        w = fj.SparseMatrix.from_dense(dense)
    for leaf in jax.tree.leaves(w):
        assert leaf.devices() == {device}
        assert not leaf.committed


def test_sharded_array(dense):
    devices = jax.devices()
    if len(devices) < 2:
        pytest.skip("needs two devices")
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(dense, jax.NamedSharding(mesh, jax.P("data")))
    assert_same(fj.SparseMatrix.from_dense(sharded).to_dense(), dense)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", op_cases.HALVES)
@pytest.mark.parametrize("shape", [*op_cases.SHAPES, (0, 5), (5, 0)], ids=str)
def test_packs_on_the_gpu_like_on_the_host(shape, dtype):
    dense = op_cases.random_dense(*shape, 0.6, dtype)
    on_gpu = fj.SparseMatrix.from_dense(jnp.asarray(dense))
    on_host = fj.SparseMatrix.from_dense(dense)
    for name in LEAVES:
        a, b = getattr(on_gpu, name), getattr(on_host, name)
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert_same(on_gpu.to_dense(), dense)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", op_cases.PATTERNS)
def test_packs_patterns_on_the_gpu(pattern):
    dense = op_cases.pattern_dense(pattern, 700, 150, "float16")
    on_gpu = fj.SparseMatrix.from_dense(jnp.asarray(dense))
    on_host = fj.SparseMatrix.from_dense(dense)
    for name in LEAVES:
        a, b = getattr(on_gpu, name), getattr(on_host, name)
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert_same(on_gpu.to_dense(), dense)


# --- Storage ----------------------------------------------------------------------


def test_pickle_is_independent_of_the_layout(dense, w):
    data = pickle.dumps(w)
    assert b"lscd16" not in data
    again = pickle.loads(data)
    assert_same(again.to_dense(), dense)
    assert jax.tree.structure(again) == jax.tree.structure(w)


def test_pickle_of_special_trees(w):
    abstract = pickle.loads(pickle.dumps(jax.tree.map(lambda leaf: leaf.shape, w)))
    assert abstract.bitmap == w.bitmap.shape
    stack = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), w)
    assert pickle.loads(pickle.dumps(stack)).bitmap.shape == stack.bitmap.shape


def test_a_stack_has_the_sparsity_of_its_matrices(w):
    stack = fj.SparseMatrix.stack([w, w, w])
    assert stack.nnz == 3 * w.nnz
    assert stack.sparsity == pytest.approx(w.sparsity)
    assert repr(stack).startswith("SparseMatrix(layers=3, shape=(")


def test_nnz_of_a_traced_matrix(w):
    for read in (lambda w: w.nnz, lambda w: w.sparsity):
        with pytest.raises(TypeError, match=r"SparseMatrix.nnz: .*got a traced one"):
            jax.jit(read)(w)


def test_repr_of_what_cannot_be_read(w):
    x = jnp.ones((2, w.shape[0]), w.dtype)
    for matrix in op_cases.unreadable(w, x, "counts"):
        assert repr(matrix).startswith(f"SparseMatrix(shape={w.shape}, dtype=")


def test_arguments_that_are_nearly_right(dense, w):
    again = fj.SparseMatrix.from_dense(dense, threads=np.int64(2))
    assert_same(again.to_dense(), dense)
    with pytest.raises(ValueError, match="expected threads >= 0, got 10000000000"):
        fj.SparseMatrix.from_dense(dense, threads=10**10)
    with pytest.raises(TypeError, match="numpy or JAX array, got MaskedArray"):
        fj.SparseMatrix.from_dense(np.ma.masked_array(np.asarray(dense)))
    with pytest.raises(TypeError, match="expected a sequence of SparseMatrix, got one"):
        fj.SparseMatrix.stack(w)
    x = np.ones((2, w.shape[0]), w.dtype)
    with pytest.raises(ValueError, match="bias of a float dtype, got >f4"):
        fj.sparse_matmul(x, w, bias=np.ones(w.shape[1], ">f4"))
    with pytest.raises(ValueError, match="a layer from 0 to 1 of a stack of 2, got 7"):
        fj.sparse_matmul(x, fj.SparseMatrix.stack([w, w]), layer=np.array(7))


def test_copies(dense, w):
    for again in (copy.copy(w), copy.deepcopy(w), copy.deepcopy([w])[0]):
        assert_same(again.to_dense(), dense)
    host = jax.tree.map(np.array, w)
    assert copy.copy(host).bitmap is host.bitmap
    assert copy.deepcopy(host).bitmap is not host.bitmap


def test_orbax_round_trip(dense, w, tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "matrix", {"w": w})
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"w": w})
        restored = checkpointer.restore(tmp_path / "matrix", abstract)["w"]
    assert isinstance(restored, fj.SparseMatrix)
    assert_same(restored.to_dense(), dense)


# --- Bad input --------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_wrong_rank(shape):
    with pytest.raises(
        ValueError, match=r"\(in_features, out_features\), got"
    ) as error:
        fj.SparseMatrix.from_dense(np.zeros(shape, np.float16))
    assert str(error.value).endswith(f"got shape {shape}")


@pytest.mark.parametrize("dtype", ["float32", "float64", "int16", "bool", "complex64"])
def test_wrong_dtype(dtype):
    with pytest.raises(ValueError, match=f"float16 or bfloat16, got {dtype}"):
        fj.SparseMatrix.from_dense(np.zeros((2, 3), dtype))


def test_no_array():
    with pytest.raises(TypeError, match="numpy or JAX array, got list"):
        fj.SparseMatrix.from_dense([[1.0]])


@pytest.mark.parametrize("threads", [-1, 1.5, None])
def test_wrong_threads(threads):
    with pytest.raises(ValueError, match=f"threads >= 0, got {threads}"):
        fj.SparseMatrix.from_dense(np.zeros((2, 3), np.float16), threads=threads)


def test_packing_is_not_traceable(dense):
    with pytest.raises(TypeError, match=r"pack outside of jit") as error:
        jax.jit(fj.SparseMatrix.from_dense)(dense)
    assert "float16[70,33]" in str(error.value)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (-1, 3), (2.0, 3)])
def test_wrong_static_shape(w, shape):
    with pytest.raises(ValueError, match=r"expected a shape .* got \("):
        dataclasses.replace(w, shape=shape)


def test_foreign_layout(w):
    with pytest.raises(ValueError, match=r"layout 'lscd16/1' or .*, got 'lscd16/0'"):
        dataclasses.replace(w, layout="lscd16/0")


def test_wrong_static_dtype(w):
    with pytest.raises(ValueError, match=r"float16 or bfloat16, got .*float32"):
        dataclasses.replace(w, dtype=jnp.float32)


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_that_do_not_fit(w, name):
    leaf = getattr(w, name)
    for wrong in (leaf[..., :-1], leaf.astype(jnp.float32), leaf.reshape(-1)[0]):
        broken = dataclasses.replace(w, **{name: wrong})
        with pytest.raises(ValueError, match=rf"to_dense: .*'{name}'.* got"):
            broken.to_dense()
        with pytest.raises(ValueError, match=rf"sparse_matmul: .*'{name}'.* got"):
            fj.sparse_matmul(np.ones((1, 70), np.float16), broken)
