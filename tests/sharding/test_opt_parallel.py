"""OPT split over devices computes what it computes on one."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mesh_support import collectives, make_mesh
from safetensors.numpy import load_file

from flashjax.models import opt
from flashjax.models.opt import generation_request
from flashjax.nn import SparseDense

DATA = Path(__file__).parents[1] / "models/opt/data"
VARIANTS = sorted(path.parent.name for path in DATA.glob("*/config.json"))
DEMO = Path(__file__).parents[2] / "examples/demo-opt"
PROMPT = np.array([[2, 5, 9, 11, 4]], np.int32)


def load(folder, count=2, **kwargs):
    """A model split over so many devices."""
    mesh = make_mesh((count,), kind=jax.sharding.AxisType.Explicit)  # JAX's default
    return opt.from_pretrained(folder, mesh=mesh, **kwargs)[0]


def pair(folder, **kwargs):
    """The same on one device, and split over two."""
    return opt.from_pretrained(folder, **kwargs)[0], load(folder, **kwargs)


@functools.cache
def tokens_of_one(**kwargs):
    """Tokens that the demo model generates on one device."""
    one, _ = opt.from_pretrained(DEMO, **kwargs)
    return np.asarray(opt.generate(one, PROMPT, max_new_tokens=12))


def decode_step(model):
    graph, state = nnx.split(model)
    cache = jax.jit(lambda: model.init_cache(1, 16))()
    token, mask = jnp.ones((1, 1), jnp.int32), jnp.ones((1, 1), bool)

    def step(state, cache, start):
        model = nnx.merge(graph, state)
        return model.step(token, mask, token, cache, start, last_only=True)

    lowered = jax.jit(step, donate_argnums=1).lower(state, cache, jnp.int32(3))
    return lowered.compile(), cache


def variants():
    for name in VARIANTS:
        quick = name in ("pre_norm", "post_norm_projected")
        yield pytest.param(name, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.parametrize("name", list(variants()))
def test_every_variant_generates_the_same(name):
    split = load(DATA / name, dtype=jnp.float32)
    with np.load(DATA / f"{name}.npz") as reference:
        tokens, mask = reference["tokens"], reference["mask_left"]
        expected = reference["generated_left"]
    new = expected.shape[1] - tokens.shape[1]
    out = opt.generate(split, tokens, mask, max_new_tokens=new)
    np.testing.assert_array_equal(out, expected)
    stream = np.stack(
        list(opt.generate_stream(split, tokens, mask, max_new_tokens=new)), axis=1
    )
    end = tokens.shape[1] + stream.shape[1]
    np.testing.assert_array_equal(stream, np.asarray(out)[:, tokens.shape[1] : end])


@pytest.mark.parametrize("fuse_qkv", [True, False])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("name", ["post_norm_projected", "no_bias"])
def test_half_precision(name, dtype, sparse, fuse_qkv):
    one, split = pair(DATA / name, dtype=dtype, sparse=sparse, fuse_qkv=fuse_qkv)
    layers = [n for _, n in nnx.iter_modules(split) if isinstance(n, SparseDense)]
    per_layer = 4 if fuse_qkv else 6
    assert len(layers) == (per_layer * len(split.layers) if sparse else 0)
    tokens = np.array([[2, 5, 9, 11, 4]], np.int32)
    a, b = np.asarray(split(tokens)), np.asarray(one(tokens))
    assert np.abs(a - b).max() < 16 * float(jnp.finfo(dtype).eps) * np.abs(b).max()


@pytest.mark.parametrize("fuse_qkv", [True, False])
@pytest.mark.parametrize("sparse", ["auto", False])
@pytest.mark.parametrize("count", [4, 8])
def test_two_collectives_a_layer(count, sparse, fuse_qkv):
    """For the vocabulary: an all-reduce of the embedding, a gather of the logits."""
    options = {"dtype": jnp.float16, "sparse": sparse, "fuse_qkv": fuse_qkv}
    split = load(DEMO, count, **options)
    compiled, cache = decode_step(split)
    found = collectives(compiled)
    assert found.count("all-reduce") == 2 * len(split.layers) + 1
    assert found.count("all-gather") == 1
    assert len(found) == 2 * len(split.layers) + 2
    gathered = re.search(r"= f32\[([\d,]+)\].* all-gather\(", compiled.as_text())
    assert gathered
    sizes = [int(n) for n in gathered[1].split(",")]
    assert np.prod(sizes) == split.config.vocab_size  # the logits, not the table
    heads = split.config.num_heads
    assert cache.keys[0].addressable_shards[0].data.shape[1] == heads // count
    np.testing.assert_array_equal(
        opt.generate(split, PROMPT, max_new_tokens=12), tokens_of_one(**options)
    )


@pytest.mark.parametrize("fuse_qkv", [True, False])
@pytest.mark.parametrize("sparse", [True, False])
def test_devices_hold_their_parts(sparse, fuse_qkv):
    split = load(DATA / "pre_norm", dtype=jnp.float16, sparse=sparse, fuse_qkv=fuse_qkv)
    layer = split.layers[0]
    attention = layer.self_attn
    queries = attention.qkv_proj if fuse_qkv else attention.q_proj
    assert queries.bias[...].addressable_shards[0].data.size == queries.bias.size // 2
    for linear in (layer.fc1, layer.fc2, queries):
        for leaf in jax.tree.leaves(nnx.state(linear)["kernel"]):
            assert leaf.addressable_shards[0].data.size == leaf.size // 2
    table = split.embed_tokens.embedding[...]
    assert table.addressable_shards[0].data.shape[0] == table.shape[0] // 2
    assert layer.fc2.bias[...].is_fully_replicated


@pytest.mark.parametrize("sparse", [True, False])
def test_a_device_holds_queries_keys_and_values_of_its_heads(sparse):
    fused, apart = (
        load(DEMO, count=8, dtype=jnp.float16, sparse=sparse, fuse_qkv=fuse_qkv)
        for fuse_qkv in (True, False)
    )

    def parts(linear):
        """The kernel's slices in the order of the devices."""
        kernel = linear.kernel.get_value()
        dense = kernel.to_dense() if sparse else kernel
        shards = sorted(dense.addressable_shards, key=lambda s: s.device.id)
        return [np.asarray(shard.data) for shard in shards]

    apart, fused = apart.layers[0].self_attn, fused.layers[0].self_attn
    assert fused.num_heads == 8  # one on each device
    separate = zip(
        *(parts(p) for p in (apart.q_proj, apart.k_proj, apart.v_proj)), strict=True
    )
    for together, qkv in zip(parts(fused.qkv_proj), separate, strict=True):
        np.testing.assert_array_equal(together, np.concatenate(qkv, axis=1))


def test_prefill_in_pieces(monkeypatch, request):
    request.addfinalizer(jax.clear_caches)
    one, split = pair(DATA / "pre_norm", dtype=jnp.float32)
    ids = np.random.default_rng(0).integers(4, one.config.vocab_size, (6, 8))
    expected = opt.generate(one, ids, max_new_tokens=8)
    monkeypatch.setattr(generation_request, "_MOST_PREFILLED", 16)
    jax.clear_caches()
    np.testing.assert_array_equal(opt.generate(split, ids, max_new_tokens=8), expected)


@pytest.mark.parametrize("sparse", [True, False])
def test_saves_what_one_device_saves(tmp_path, sparse):
    one, split = pair(DATA / "no_final_norm_untied", dtype=jnp.float16, sparse=sparse)
    opt.save_pretrained(one, None, tmp_path / "one")
    opt.save_pretrained(split, None, tmp_path / "split")
    a, b = (
        load_file(tmp_path / name / "model.safetensors") for name in ("one", "split")
    )
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].tobytes() == b[name].tobytes()


@pytest.mark.parametrize(
    ("count", "axis", "message"),
    [
        (3, "model", "num_heads must be divisible by the 3 devices"),
        (2, "tensor", r"must have an axis 'tensor', got axes \('model',\)"),
    ],
)
def test_wrong_mesh(count, axis, message):
    with pytest.raises(ValueError, match=message):
        opt.from_pretrained(DATA / "pre_norm", mesh=make_mesh((count,)), axis=axis)


def test_no_mesh():
    with pytest.raises(ValueError, match=r"mesh must be a jax\.sharding\.Mesh, got 4"):
        opt.from_pretrained(DATA / "pre_norm", mesh=4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
@pytest.mark.parametrize("count", [2, 4])
def test_tokens_on_gpus(count, dtype):
    """Equal in float32; in float16 sums in another order decide close calls."""
    if jax.device_count() < count:
        pytest.skip(f"needs {count} GPUs, found {jax.device_count()}")
    mesh = jax.make_mesh((count,), ("model",), devices=jax.devices()[:count])
    one, _ = opt.from_pretrained(DEMO, dtype=dtype)
    split, _ = opt.from_pretrained(DEMO, dtype=dtype, mesh=mesh)
    prompts = np.random.default_rng(0).integers(4, one.config.vocab_size, (8, 16))
    expected = opt.generate(one, prompts, max_new_tokens=64)
    if dtype == jnp.float32:
        tokens = opt.generate(split, prompts, max_new_tokens=64)
        np.testing.assert_array_equal(tokens, expected)
    else:
        following = [np.argmax(model(expected), -1) for model in (split, one)]
        assert np.mean(following[0] == following[1]) > 0.99
