"""Queries, keys and values from one product: the same model, the same files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from opt_folders import DATA, TOKENS, assert_same, edited, prune, sparse_layers
from safetensors.numpy import load_file

import flashjax as fj
from flashjax.checkpoint import CheckpointError, CheckpointReader
from flashjax.checkpoint.encoding import check_rows, encode
from flashjax.models import opt
from flashjax.models.opt import OPT, OPTConfig
from flashjax.models.opt.fused_qkv import QKV, JoinedQKV, rows_of, split_by_head
from flashjax.nn import SparseDense
from flashjax.nn_trainable import TrainableSparseDense
from flashjax.sparse_rows import SparseRows
from flashjax.testing import random_opt

V_PROJ = "model.decoder.layers.0.self_attn.v_proj.weight"
HALVES = [jnp.float16, jnp.bfloat16]
# With biases, before and after the norm, and without.
NAMES = ["pre_norm", "post_norm_projected", "no_bias"]


def both(folder, **kwargs):
    """The same folder fused and apart."""
    return [
        opt.from_pretrained(folder, fuse_qkv=fuse_qkv, **kwargs)[0]
        for fuse_qkv in (True, False)
    ]


def assert_form(attention, *, fused, kind):
    layers = {name: getattr(attention, name) for name in (*QKV, "qkv_proj")}
    present = {name for name, layer in layers.items() if layer is not None}
    assert present == ({"qkv_proj"} if fused else set(QKV))
    assert all(type(layers[name]) is kind for name in present)


def projections(model, index=0):
    """Queries, keys and values of random inputs, in float32."""
    x = jax.random.normal(jax.random.key(0), (2, 5, model.config.hidden_size))
    found = model.layers[index].self_attn.project(x.astype(model.dtype))
    return [np.asarray(array, np.float32) for array in found]


def stored_projections(folder, dtype):
    """The same by NumPy, from the tensors of the folder."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    config = OPTConfig.from_hf(folder)
    x = jax.random.normal(jax.random.key(0), (2, 5, config.hidden_size))
    x = np.asarray(x.astype(dtype), np.float64)
    found = []
    for name in QKV:
        stem = f"model.decoder.layers.0.self_attn.{name}"
        y = x @ tensors[f"{stem}.weight"].astype(dtype).astype(np.float64).T
        if config.enable_bias:
            y = y + tensors[f"{stem}.bias"].astype(dtype).astype(np.float64)
        if name == "q_proj":  # scaled after the bias
            y = y * config.head_dim**-0.5
        y = y.reshape(*x.shape[:2], config.num_heads, config.head_dim)
        found.append(y.transpose(0, 2, 1, 3))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_dense_in_float32(name):
    fused, apart = both(DATA / name, dtype=jnp.float32)
    for layers, is_fused in ((fused.layers, True), (apart.layers, False)):
        for layer in layers:
            assert_form(layer.self_attn, fused=is_fused, kind=nnx.Linear)
    expected = stored_projections(DATA / name, np.float32)
    for a, b, c in zip(projections(fused), projections(apart), expected, strict=True):
        assert a.shape == c.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())
        np.testing.assert_allclose(a, c, rtol=0, atol=1e-6 * np.abs(c).max())
    logits = np.asarray(apart(TOKENS))
    np.testing.assert_allclose(
        fused(TOKENS), logits, rtol=0, atol=1e-6 * np.abs(logits).max()
    )
    np.testing.assert_array_equal(
        opt.generate(fused, TOKENS, max_new_tokens=8),
        opt.generate(apart, TOKENS, max_new_tokens=8),
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sparse", [True, False])
def test_half_precision(name, dtype, sparse):
    fused, apart = both(DATA / name, dtype=dtype, sparse=sparse)
    for layer in fused.layers:
        kind = SparseDense if sparse else nnx.Linear
        assert_form(layer.self_attn, fused=True, kind=kind)
        assert (layer.self_attn.qkv_proj.bias is None) == (name == "no_bias")
    expected = stored_projections(DATA / name, jnp.dtype(dtype))
    for a, b, c in zip(projections(fused), projections(apart), expected, strict=True):
        # At most twice the error of the form that it replaces, and one rounding.
        rounding = float(jnp.finfo(dtype).eps) / 2 * np.abs(c).max()
        assert np.abs(a - c).max() <= 2 * np.abs(b - c).max() + rounding
    a, b = np.asarray(fused(TOKENS)), np.asarray(apart(TOKENS))
    assert np.abs(a - b).max() <= 8 * float(jnp.finfo(dtype).eps) * np.abs(b).max()


def test_outputs_are_ordered_by_head():
    heads, head_dim = 3, 2
    parts = {n: np.arange(6) + 10 * i for i, n in enumerate(QKV)}
    joined = JoinedQKV(heads, use_bias=False)
    for i, (name, part) in enumerate(reversed(parts.items())):
        assert not joined.complete
        joined.add(name, "kernel", part[:, None], sparse=i == 0)
    assert joined.complete
    assert not joined.alike
    assert [joined.is_sparse(name) for name in QKV] == [False, False, True]
    fused = joined.tensors["kernel"]
    assert fused[:, 0].tolist() == [
        *(0, 1, 10, 11, 20, 21),
        *(2, 3, 12, 13, 22, 23),
        *(4, 5, 14, 15, 24, 25),
    ]
    split = split_by_head(jnp.asarray(fused).reshape(1, 1, -1), heads)
    for (name, part), array in zip(parts.items(), split, strict=True):
        np.testing.assert_array_equal(rows_of(fused, name, heads)[:, 0], part)
        np.testing.assert_array_equal(array, part.reshape(1, heads, 1, head_dim))
    assert all(
        tensor[:, 0].tolist() == parts[name].tolist()
        for name, _, tensor in joined.separate()
    )


def test_tensors_may_come_in_any_order(monkeypatch):
    expected, _ = opt.from_pretrained(DATA / "pre_norm", sparse=True)
    order = np.random.default_rng(0).permutation
    names = CheckpointReader.names
    monkeypatch.setattr(CheckpointReader, "names", lambda self: order(names(self)))
    assert_same(opt.from_pretrained(DATA / "pre_norm", sparse=True)[0], expected)


def test_values_too_large(folder):
    with edited(folder) as tensors:
        tensors[V_PROJ] = tensors[V_PROJ].astype(np.float32)
        tensors[V_PROJ][0, 0] = 1e6
    with pytest.raises(CheckpointError, match=r"float16 in .*v_proj\.weight"):
        opt.from_pretrained(folder)


# Where q, k and v are not alike.


def half_pruned(folder):
    """Everything is sparse but v of the first layer."""
    with edited(folder) as tensors:
        dense = tensors[V_PROJ].copy()
    prune(folder)
    with edited(folder) as tensors:
        tensors[V_PROJ] = dense
    return folder


@pytest.mark.parametrize("dtype", HALVES)
def test_layers_that_are_not_alike_stay_apart(folder, tmp_path, dtype):
    fused, apart = both(half_pruned(folder), dtype=dtype)
    first, second = (layer.self_attn for layer in fused.layers)
    assert first.qkv_proj is None
    assert isinstance(first.q_proj, SparseDense)
    assert isinstance(first.k_proj, SparseDense)
    assert isinstance(first.v_proj, nnx.Linear)
    assert isinstance(first.out_proj, SparseDense)
    assert_form(second, fused=True, kind=SparseDense)
    assert nnx.graphdef(first) == nnx.graphdef(apart.layers[0].self_attn)
    assert_same(nnx.List([first]), nnx.List([apart.layers[0].self_attn]))
    a, b = np.asarray(fused(TOKENS)), np.asarray(apart(TOKENS))
    assert np.abs(a - b).max() <= 8 * float(jnp.finfo(dtype).eps) * np.abs(b).max()
    opt.save_pretrained(fused, None, tmp_path / "out")
    loaded, _ = opt.from_pretrained(tmp_path / "out", dtype=dtype)
    assert nnx.graphdef(loaded) == nnx.graphdef(fused)
    assert_same(loaded, fused)


def test_all_dense_or_all_sparse_is_alike(folder):
    half_pruned(folder)
    for kwargs, kind in (
        ({"sparse": False}, nnx.Linear),
        ({"sparse": True}, SparseDense),
        ({"dtype": jnp.float32}, nnx.Linear),
    ):
        model, _ = opt.from_pretrained(folder, **kwargs)
        for layer in model.layers:
            assert_form(layer.self_attn, fused=True, kind=kind)


# Saving.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("dtype", "sparse"),
    [(jnp.float32, False), *((dtype, s) for dtype in HALVES for s in (True, False))],
)
def test_files_are_the_same(name, dtype, sparse, tmp_path):
    fused, apart = both(DATA / name, dtype=dtype, sparse=sparse)
    opt.save_pretrained(fused, None, tmp_path / "fused")
    opt.save_pretrained(apart, None, tmp_path / "apart")
    files = sorted(path.name for path in (tmp_path / "fused").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "apart").iterdir())
    for file in files:
        ours, theirs = (tmp_path / f / file for f in ("fused", "apart"))
        assert ours.read_bytes() == theirs.read_bytes(), file
    for expected, fuse_qkv in ((fused, True), (apart, False)):
        loaded, _ = opt.from_pretrained(
            tmp_path / "fused", dtype=dtype, fuse_qkv=fuse_qkv
        )
        assert_same(loaded, expected)
        assert nnx.graphdef(loaded) == nnx.graphdef(expected)


# Models that are made or changed.


def test_new_models_are_apart_unless_asked():
    config = OPTConfig.from_hf(DATA / "pre_norm")
    for kwargs, fused in (({}, False), ({"fuse_qkv": True}, True)):
        model = OPT(config, rngs=nnx.Rngs(0), **kwargs)
        assert_form(model.layers[1].self_attn, fused=fused, kind=nnx.Linear)
        assert np.isfinite(model(TOKENS)).all()


def test_sparsify_and_fine_tuning(folder, tmp_path):
    prune(folder)
    packed, _ = opt.from_pretrained(folder)
    model, _ = opt.from_pretrained(folder, sparse=False)
    model = fj.sparsify(model, lambda path, _: path.startswith("layers."))
    assert sorted(sparse_layers(model)) == sorted(sparse_layers(packed))
    assert_same(model, packed)
    with pytest.warns(UserWarning, match="12 parameters are float16"):
        model = fj.trainable(model)
    layer = model.layers[0].self_attn.qkv_proj
    assert layer.bias.dtype == jnp.float32
    assert isinstance(layer, TrainableSparseDense)
    layer.values.set_value(layer.values.get_value() * 2)
    opt.save_pretrained(model, None, tmp_path / "out")
    with CheckpointReader(tmp_path / "out") as reader:
        assert len(reader.sparse) == 2 * 6
        found = reader.load(V_PROJ)
        biases = [n for n in reader.names() if n.endswith("_proj.bias")]
        assert {reader.dtype(name) for name in biases} == {np.dtype(np.float16)}
    np.testing.assert_array_equal(
        found, 2 * load_file(folder / "model.safetensors")[V_PROJ]
    )
    # What half precision does not hold is not stored as infinity.
    for variable in (layer.values, layer.bias):
        kept = variable.get_value()
        variable.set_value(jnp.full_like(kept, 1e6))
        with pytest.raises(ValueError, match=r"layers\.0\..*_proj.*up to 65504"):
            opt.save_pretrained(model, None, tmp_path / "large")
        variable.set_value(kept)
    assert not (tmp_path / "large").exists()


def test_synthetic_models_are_fused():
    config = OPTConfig.from_hf(DATA / "pre_norm")
    for sparsity, kind in ((0.0, nnx.Linear), (0.7, SparseDense)):
        model = random_opt(config, sparsity)
        assert_form(model.layers[1].self_attn, fused=True, kind=kind)
        apart = random_opt(config, sparsity, fuse_qkv=False)
        assert_form(apart.layers[1].self_attn, fused=False, kind=kind)


@pytest.mark.parametrize("stored_sparse", [QKV, QKV[1:2], ()])
def test_joins_what_is_stored_sparse(stored_sparse):
    """In the form in which it came if all did, and else dense."""
    rng, heads = np.random.default_rng(0), 2
    weights = {
        name: (rng.random((8, 20)) * (rng.random((8, 20)) < 0.4)).astype(np.float16)
        for name in QKV
    }
    joined, expected = JoinedQKV(heads, False), JoinedQKV(heads, False)
    for name in reversed(QKV):
        array = weights[name]
        rows = check_rows(*encode(array), array.shape)
        joined.add(name, "kernel", rows if name in stored_sparse else array, True)
        expected.add(name, "kernel", array, True)
    kernel = joined.tensors["kernel"]
    assert isinstance(kernel, SparseRows) == (stored_sparse == QKV)
    if isinstance(kernel, SparseRows):
        kernel = kernel.to_dense()
    np.testing.assert_array_equal(kernel, expected.tensors["kernel"])
