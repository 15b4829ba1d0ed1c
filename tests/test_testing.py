"""Synthetic weights, and the bytes predicted for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flashjax as fj
from flashjax.models import opt
from flashjax.packed_size import packed_bytes
from flashjax.testing import random_opt, random_sparse_matrix

CONFIG = opt.OPTConfig(
    vocab_size=50,
    hidden_size=64,
    num_layers=3,
    ffn_size=160,
    num_heads=2,
    max_positions=24,
    word_embed_proj_dim=32,
)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.8, 1.0])
def test_matrix(dtype, sparsity):
    shape = (400, 300)
    w = random_sparse_matrix(jax.random.key(1), shape, sparsity, dtype)
    assert (w.shape, w.dtype) == (shape, dtype)
    assert w.sparsity == pytest.approx(sparsity, abs=0.01)
    dense = np.asarray(w.to_dense(), np.float32)
    assert np.isfinite(dense).all()
    if sparsity < 1:
        assert dense[dense != 0].mean() == pytest.approx(0, abs=0.01)
        y = jax.random.normal(jax.random.key(2), (8, 400)) @ dense
        assert y.std() == pytest.approx(1, rel=0.2)


def test_matrix_follows_its_key():
    a, b, c = (
        random_sparse_matrix(jax.random.key(seed), (64, 64), 0.5) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(a.to_dense(), b.to_dense())
    assert (a.to_dense() != c.to_dense()).any()


@pytest.mark.parametrize(
    ("shape", "sparsity", "dtype", "message"),
    [
        ((3,), 0.5, jnp.float16, "expected a shape"),
        ((3, -1), 0.5, jnp.float16, "expected a shape"),
        ((3, 3), 1.5, jnp.float16, "sparsity from 0 to 1, got 1.5"),
        ((3, 3), 0.5, jnp.float32, "float16 or bfloat16 .* got float32"),
    ],
)
def test_bad_matrices(shape, sparsity, dtype, message):
    with pytest.raises(ValueError, match=message):
        random_sparse_matrix(jax.random.key(0), shape, sparsity, dtype)


@pytest.mark.parametrize(
    ("sparsity", "dtype"),
    [(0.0, jnp.float32), (0.0, jnp.bfloat16), (0.8, jnp.float16), (0.8, jnp.bfloat16)],
)
@pytest.mark.parametrize("fuse_qkv", [True, False])
def test_model(sparsity, dtype, fuse_qkv):
    done = []
    model = random_opt(
        CONFIG,
        sparsity,
        dtype=dtype,
        progress=lambda *a: done.append(a),
        fuse_qkv=fuse_qkv,
    )
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert (len(model.layers), model.config, model.dtype) == (3, CONFIG, dtype)
    same = opt.OPT(CONFIG, dtype=dtype, fuse_qkv=fuse_qkv, rngs=nnx.Rngs(0))
    if sparsity:
        same = fj.sparsify(same, lambda path, _: path.startswith("layers."))
    assert nnx.graphdef(model) == nnx.graphdef(same)
    layers = [layer for _, layer in fj.nn.sparse_layers(model)]
    assert len(layers) == (3 * (4 if fuse_qkv else 6) if sparsity else 0)
    assert all(abs(la.kernel[...].sparsity - sparsity) < 0.05 for la in layers)
    assert np.isfinite(model(jnp.ones((2, 5), jnp.int32))).all()
    # Every array has a memory of its own.
    leaves = jax.tree.leaves(nnx.state(model))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_sparse_models_are_of_half_precision():
    with pytest.raises(ValueError, match="or bfloat16 for sparse weights, got float32"):
        random_opt(CONFIG, 0.5, dtype=jnp.float32)


@pytest.mark.parametrize("shape", [(1000, 1500), (3072, 768), (2048, 2304)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.6, 0.8, 0.9])
def test_packed_bytes(shape, sparsity):
    real = random_sparse_matrix(jax.random.key(3), shape, sparsity).nbytes
    assert packed_bytes(shape, sparsity) == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (64, 16), (300, 17)])
def test_packed_bytes_where_they_are_certain(shape):
    for sparsity in (0.0, 1.0):
        real = random_sparse_matrix(jax.random.key(3), shape, sparsity).nbytes
        assert packed_bytes(shape, sparsity) == real


def test_packed_bytes_of_a_wrong_sparsity():
    with pytest.raises(ValueError, match="0 to 1, got -1"):
        packed_bytes((3, 3), -1)
