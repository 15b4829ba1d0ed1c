"""Keys and values in another dtype than the model."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from generate_support import batch, make_model
from mesh_support import make_mesh

from flashjax.models import opt
from flashjax.models.opt import memory
from flashjax.models.opt.attention import check_cache_dtype, to_cache
from flashjax.models.opt.modeling import positions_from_mask

DEMO = Path(__file__).parents[3] / "examples/demo-opt"
FLOAT8 = jnp.float8_e4m3fn


def prefill(model, ids):
    """Logits of every token, through a cache."""
    mask = jnp.ones(ids.shape, bool)
    positions = positions_from_mask(mask)
    cache = model.init_cache(*ids.shape)
    step = nnx.jit(lambda model, *arguments: model.step(*arguments)[0])
    return np.asarray(step(model, ids, mask, positions, cache, 0))


@pytest.fixture(scope="module")
def demo():
    """Token ids, and the logits of the model with a cache of its own dtype."""
    model, tokenizer = opt.from_pretrained(DEMO)
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")[:1500]
    ids = jnp.asarray([tokenizer.encode(text).ids[:256]], jnp.int32)
    return ids, prefill(model, ids)


def test_bytes():
    model = make_model(jnp.float16)
    model.cache_dtype = check_cache_dtype(FLOAT8, model.dtype)
    cache = model.init_cache(3, 16)
    assert {leaf.dtype for leaf in (*cache.keys, *cache.values)} == {np.dtype(FLOAT8)}
    arguments = {"sparsity": 0, "batch": 3, "length": 16}
    predicted = memory.predict(model.config, **arguments, cache_dtype=FLOAT8)
    assert predicted.kv_cache == cache.nbytes
    whole = memory.predict(model.config, **arguments)
    mask = cache.mask.size
    assert whole.kv_cache - mask == 2 * (predicted.kv_cache - mask)


def test_what_is_kept_is_what_is_rounded():
    model, rounded = make_model(), make_model()
    rounded.cache_dtype = check_cache_dtype("float8_e4m3fn", model.dtype)
    ids = jnp.asarray([[5, 9, 31, 7, 8, 12]])
    mask, positions = jnp.ones(ids.shape, bool), jnp.arange(6, dtype=jnp.int32)[None]
    first = (ids, mask, positions)
    _, kept = model.step(*first, model.init_cache(1, 8), 0)
    _, found = rounded.step(*first, rounded.init_cache(1, 8), 0)
    for ours, theirs in zip(found.keys, kept.keys, strict=True):
        expected = np.asarray(theirs.astype(FLOAT8), np.float32)
        np.testing.assert_array_equal(np.asarray(ours, np.float32), expected)


def test_too_large_is_the_largest():
    x = jnp.asarray([1e5, -1e5, 448, 0.3, jnp.inf, jnp.nan], jnp.float32)
    found = np.asarray(to_cache(x, FLOAT8), np.float32)
    np.testing.assert_array_equal(found, [448, -448, 448, 0.3125, 448, np.nan])
    assert to_cache(x, jnp.float32) is x or to_cache(x, jnp.float32).dtype == x.dtype


@pytest.mark.parametrize("count", [None, 4])
def test_demo_tokens(count, demo):
    """Most of the tokens that follow stay the same; streams and meshes agree."""
    ids, expected = demo
    mesh = None if count is None else make_mesh((count,))
    model, _ = opt.from_pretrained(DEMO, cache_dtype=FLOAT8, mesh=mesh)
    logits = prefill(model, ids)
    assert np.mean(logits.argmax(-1) == expected.argmax(-1)) > 0.9
    new = np.asarray(opt.generate(model, ids[:, :20], max_new_tokens=12))[:, 20:]
    stream = list(opt.generate_stream(model, ids[:, :20], max_new_tokens=12))
    np.testing.assert_array_equal(np.stack(stream, axis=1), new)


def test_programs_are_compiled_apart():
    model = make_model(jnp.bfloat16)
    ids, mask = batch(length=6)
    for cache_dtype in (None, FLOAT8, None):
        model.cache_dtype = check_cache_dtype(cache_dtype, model.dtype)
        out = opt.generate(model, ids, mask, max_new_tokens=5)
        assert out.shape == (len(ids), 11)


@pytest.mark.parametrize("cache_dtype", ["float8_e5m2", "int8", "nonsense", 3.5])
def test_bad_dtypes(cache_dtype):
    message = "cache_dtype must be float16 or float8_e4m3fn, got "
    with pytest.raises(ValueError, match=message):
        opt.from_pretrained(DEMO, cache_dtype=cache_dtype)
    with pytest.raises(ValueError, match=message):
        make_model_with(cache_dtype)


def make_model_with(cache_dtype):
    return opt.OPT(
        make_model().config,
        dtype=jnp.float16,
        cache_dtype=cache_dtype,
        rngs=nnx.Rngs(0),
    )
