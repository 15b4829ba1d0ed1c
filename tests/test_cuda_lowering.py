"""What the op becomes on each platform; needs no GPU."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flashjax as fj
from flashjax import _native, matmul, matmul_impl
from flashjax.trainable_matrix import TrainableMatrix

from . import cuda_stand_in, op_cases

K, M = 520, 300
UNPACK = "flashjax_gather_unpack_cuda"


@pytest.fixture(scope="module", autouse=True)
def cuda_module():
    with cuda_stand_in.cuda_module():
        yield


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """Whatever GPU there is."""
    monkeypatch.setattr(matmul_impl, "_has_wgmma", lambda: True)


@pytest.fixture(scope="module")
def w():
    return fj.SparseMatrix.from_dense(op_cases.random_dense(K, M, 0.7, "float16"))


def lower(f, *args, platforms=("cuda",)):
    return jax.jit(f).trace(*args).lower(lowering_platforms=platforms).as_text()


def targets(text):
    return re.findall(r"stablehlo\.custom_call @(flashjax\w+)", text)


def largest_buffer(text):
    """Elements of the largest array that occurs."""
    shapes = re.findall(r"tensor<((?:\d+x)+)\w+>", text)
    return max(math.prod(map(int, s.rstrip("x").split("x"))) for s in shapes)


def x_of(rows, dtype="float16", k=K):
    return jnp.ones((rows, k), dtype)


def many_rows(rows):
    """The shape of an x of which there is none."""
    return jax.ShapeDtypeStruct((rows, K), jnp.float16)


@pytest.fixture
def few_rows(monkeypatch):
    """As if the kernel took no more than so many."""
    monkeypatch.setitem(matmul.KERNEL_ROWS, "cuda", 64)
    return 64


@pytest.mark.parametrize("rows", [1, 8, 100, 2048, matmul.KERNEL_ROWS["cuda"]])
def test_rows_use_the_kernel_and_no_dense_weight(w, rows):
    text = lower(fj.sparse_matmul, many_rows(rows), w)
    assert targets(text) == ["flashjax_lscd_matmul_cuda"]
    # Not even as many elements as the weight has, whatever their type; but x and the
    # product, and the workspace, which is not larger than it must be for all
    # multiprocessors.
    workspace = _native.cuda.workspace_bytes(rows, M, K)
    assert f"tensor<{workspace}xui8>" in text
    text = text.replace(f"{workspace}xui8", "1xui8")
    text = re.sub(rf"\b{rows}x({K}|{M})xf16", "1xf16", text)
    assert largest_buffer(text) < K * M


@pytest.mark.parametrize("stacked", [False, True])
def test_more_rows_expand_and_multiply(w, stacked):
    layer = 1 if stacked else None
    w = fj.SparseMatrix.stack([w, w]) if stacked else w
    most = matmul.KERNEL_ROWS["cuda"]
    for rows, target in ((most, "matmul"), (most + 1, "unpack")):
        x = many_rows(rows)
        text = lower(lambda x, w: fj.sparse_matmul(x, w, layer=layer), x, w)
        assert targets(text) == [f"flashjax_lscd_{target}_cuda"]
        assert text.count("stablehlo.dot_general") == (target == "unpack")


def test_gpus_without_wgmma_take_fewer_rows(w, monkeypatch):
    monkeypatch.setattr(matmul_impl, "_has_wgmma", lambda: False)
    for rows, target in ((96, "matmul"), (97, "unpack")):
        jax.clear_caches()
        text = lower(fj.sparse_matmul, x_of(rows), w)
        assert targets(text) == [f"flashjax_lscd_{target}_cuda"]
    jax.clear_caches()


def test_unlike_dtypes_expand_and_multiply(w):
    text = lower(fj.sparse_matmul, x_of(4, "float32"), w)
    assert targets(text) == ["flashjax_lscd_unpack_cuda"]


@pytest.mark.parametrize("rows", [1, 8, 9])
def test_gather_layout(rows):
    dense = op_cases.random_dense(K, M, 0.9, "float16")
    w = op_cases.gather_matrix(dense)
    text = lower(fj.sparse_matmul, x_of(rows), w)
    stem = "matmul" if rows <= 8 else "unpack"
    assert targets(text) == [f"flashjax_gather_{stem}_cuda"]
    text = lower(lambda w: w.to_dense(), w)
    assert targets(text) == ["flashjax_gather_unpack_cuda"]


def test_symbolic_rows_of_the_gather_layout():
    """May be more than its kernel takes."""
    w = op_cases.gather_matrix(op_cases.random_dense(K, M, 0.9, "float16"))
    (rows,) = jax.export.symbolic_shape("rows")
    x = jax.ShapeDtypeStruct((rows, K), jnp.float16)
    exported = jax.export.export(
        jax.jit(fj.sparse_matmul),
        platforms=["cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(UNPACK)],
    )(x, w)
    assert targets(exported.mlir_module()) == [UNPACK]


def test_gradient_of_the_gather_layout():
    """The transposed product has the packing of the product alone."""
    w = op_cases.gather_matrix(op_cases.random_dense(K, M, 0.9, "float16"))

    def loss(x, w):
        return jnp.sum(fj.sparse_matmul(x, w).astype(jnp.float32))

    gradient = jax.grad(loss)
    assert set(targets(lower(gradient, x_of(4), w))) == {"flashjax_gather_unpack_cuda"}
    with_both = targets(lower(gradient, x_of(4), w.with_transpose()))
    assert set(with_both) == {"flashjax_lscd_matmul_cuda"}


@pytest.mark.parametrize(
    ("preferred", "written"),
    [(None, "f16"), ("float16", "f16"), ("float32", "f32"), ("bfloat16", "f32")],
)
def test_result_dtypes_of_the_kernel(w, preferred, written):
    def f(x, w):
        return fj.sparse_matmul(x, w, preferred_element_type=preferred)

    text = lower(f, x_of(4), w)
    (call,) = re.findall(r"custom_call @flashjax_lscd_matmul_cuda.*", text)
    assert f"-> (tensor<4x{M}x{written}>" in call


def test_rows_of_x_are_padded_to_16_bytes():
    for k, padded in ((512, 512), (513, 520)):
        dense = op_cases.random_dense(k, 40, 0.5, "bfloat16")
        w = fj.SparseMatrix.from_dense(dense)
        text = lower(fj.sparse_matmul, x_of(4, "bfloat16", k), w)
        (call,) = re.findall(r"custom_call @flashjax_lscd_matmul_cuda.*", text)
        assert f"(tensor<4x{padded}xbf16>" in call
        assert ("stablehlo.pad" in text) == (k != padded)


def test_vmap_is_one_call(w):
    text = lower(jax.vmap(fj.sparse_matmul, in_axes=(0, None)), jnp.stack([x_of(3)]), w)
    assert targets(text) == ["flashjax_lscd_matmul_cuda"]


def test_gradient_expands_the_weights(w):
    def loss(x, w):
        return jnp.sum(fj.sparse_matmul(x, w, preferred_element_type=jnp.float32))

    text = lower(jax.grad(loss), x_of(3), w)
    assert "flashjax_lscd_unpack_cuda" in targets(text)
    assert not any(target.endswith("_cpu") for target in targets(text))


@pytest.mark.parametrize("rows", [3, 65])
def test_gradient_with_a_second_packing(w, rows, few_rows):
    def gradient(dy, w):
        x = jnp.ones((rows, K), jnp.float16)
        _, pullback = jax.vjp(lambda x: fj.sparse_matmul(x, w), x)
        return pullback(dy)

    text = lower(gradient, jnp.ones((rows, M), jnp.float16), w.with_transpose())
    few = rows <= few_rows
    (target,) = targets(text)
    assert target == f"flashjax_lscd_{'matmul' if few else 'unpack'}_cuda"
    assert not few or largest_buffer(text) < K * M


def test_gradient_of_trainable_values(w):
    t = TrainableMatrix.from_sparse(w)

    def loss(values, x):
        return jnp.sum(fj.sparse_matmul(x, t.replace(values)).astype(jnp.float32))

    text = lower(jax.grad(loss), t.values, x_of(3))
    assert targets(text) == ["flashjax_lscd_sample_cuda"]
    assert "output_operand_aliases" in text


def test_to_dense(w):
    text = lower(lambda w: w.to_dense(), w)
    assert targets(text) == ["flashjax_lscd_unpack_cuda"]


def test_symbolic_batch():
    dense = op_cases.random_dense(K, M, 0.7, "float16")
    w = fj.SparseMatrix.from_dense(dense)
    (n,) = jax.export.symbolic_shape("n")
    checks = [jax.export.DisabledSafetyCheck.custom_call("flashjax_lscd_matmul_cuda")]
    exported = jax.export.export(
        jax.jit(fj.sparse_matmul), platforms=["cuda"], disabled_checks=checks
    )(jax.ShapeDtypeStruct((n, K), jnp.float16), w)
    assert targets(exported.mlir_module()) == ["flashjax_lscd_matmul_cuda"]


def test_lowering_for_two_platforms(w):
    text = lower(fj.sparse_matmul, x_of(4), w, platforms=("cpu", "cuda"))
    assert sorted(targets(text)) == [
        "flashjax_lscd_matmul_cpu",
        "flashjax_lscd_matmul_cuda",
    ]


def test_cpu_lowering(w):
    text = lower(fj.sparse_matmul, x_of(4), w, platforms=("cpu",))
    assert targets(text) == ["flashjax_lscd_matmul_cpu"]
    assert largest_buffer(text) < K * M
    rows = matmul.KERNEL_ROWS["cpu"] + 1
    text = lower(fj.sparse_matmul, x_of(rows), w, platforms=("cpu",))
    assert targets(text) == ["flashjax_lscd_unpack_cpu"]


@pytest.mark.parametrize("platform", ["tpu", "rocm"])
def test_other_platforms_use_plain_jax(w, platform):
    text = lower(fj.sparse_matmul, x_of(4), w, platforms=(platform,))
    assert targets(text) == []
    assert "stablehlo.dot_general" in text


def test_a_named_kernel_is_not_replaced_on_another_platform(w):
    def f(x, w):
        return fj.sparse_matmul(x, w, implementation="cpu")

    with pytest.raises(NotImplementedError, match="tpu"):
        lower(f, np.ones((4, K), np.float16), w, platforms=("tpu",))
