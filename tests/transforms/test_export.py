"""Functions that go through jax.export, with and without a file in between."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import pytest

import flashjax as fj
from flashjax import packing


def export(f, *args, platforms=("cpu",), **options):
    return jax.export.export(
        jax.jit(f),
        platforms=platforms,
        disabled_checks=fj.export.disabled_checks(),
        **options,
    )(*args)


def affine(x, w, bias):
    return fj.sparse_matmul(x, w, bias=bias)


def test_custom_calls_are_refused_without_the_helper(w, x, bias):
    with pytest.raises(ValueError, match="flashjax_lscd_matmul_cpu"):
        jax.export.export(jax.jit(affine), platforms=["cpu"])(x, w, bias)


@pytest.mark.parametrize("rows", ["n", "4, 3", "n, m"])
def test_batches(w, bias, rows):
    shape = (*jax.export.symbolic_shape(rows), w.shape[0])
    spec = jax.ShapeDtypeStruct(shape, jnp.float32)
    exported = export(affine, spec, jax.eval_shape(lambda w: w, w), bias)
    sizes = {"n": (7,), "4, 3": (4, 3), "n, m": (2, 5)}[rows]
    x = op_cases.random_x((*sizes, w.shape[0]), "float32")
    np.testing.assert_array_equal(exported.call(x, w, bias), affine(x, w, bias))


def test_gradient_with_a_symbolic_batch(w, bias, dense):
    (n,) = jax.export.symbolic_shape("n")
    spec = jax.ShapeDtypeStruct((n, w.shape[0]), jnp.float32)
    gradient = jax.grad(lambda x, w, bias: jnp.sum(affine(x, w, bias)))
    exported = export(gradient, spec, w, bias)
    dx = exported.call(np.ones((3, w.shape[0]), np.float32), w, bias)
    expected = np.broadcast_to(dense.astype(np.float32).sum(1), dx.shape)
    np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=1e-5)


def test_derivative_of_an_exported_function(w, x, bias):
    pytest.importorskip("flatbuffers", reason="jax.export stores files with it")
    blob = export(affine, x, w, bias).serialize(vjp_order=1)
    call = jax.export.deserialize(blob).call
    got = jax.grad(lambda x: jnp.sum(jnp.sin(call(x, w, bias))))(x)
    expected = jax.grad(lambda x: jnp.sum(jnp.sin(affine(x, w, bias))))(x)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_both_platforms(w, x, bias):
    if not packing.can_lower_for_cuda():
        pytest.skip("needs the CUDA module: build with FLASHJAX_CUDA=ON")
    exported = export(affine, x.astype(w.dtype), w, bias, platforms=("cpu", "cuda"))
    module = exported.mlir_module()
    assert "flashjax_lscd_matmul_cpu" in module
    assert "flashjax_lscd_matmul_cuda" in module


PROGRAM = """
import sys
import jax, numpy as np
import flashjax as fj
import flashjax.export
f = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
dense = np.load(sys.argv[2])
w = f.call(np.ones((2, 3), "float16"), fj.SparseMatrix.from_dense(dense))[1]
print(w.shape, w.nnz)
"""


def test_another_process_calls_it(tmp_path):
    pytest.importorskip("flatbuffers", reason="jax.export stores files with it")
    dense = np.array([[1, 0], [0, 2], [3, 0]], np.float16)
    w = fj.SparseMatrix.from_dense(dense)
    exported = export(lambda x, w: (x @ w, w), jnp.ones((2, 3), jnp.float16), w)
    (tmp_path / "f").write_bytes(exported.serialize())
    np.save(tmp_path / "dense.npy", dense)
    command = [sys.executable, "-c", PROGRAM, tmp_path / "f", tmp_path / "dense.npy"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "(3, 2) 3\n", done.stderr
