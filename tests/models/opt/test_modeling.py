import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flashjax.models import opt
from flashjax.models.opt import OPT, OPTConfig, modeling
from flashjax.models.opt.config import ACTIVATIONS

DATA = Path(__file__).parent / "data"
VARIANTS = sorted(path.parent.name for path in DATA.glob("*/config.json"))
MASKS = ("none", "left", "mixed")


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    """A model, and what PyTorch computes with the same weights in float32."""
    model, _ = opt.from_pretrained(DATA / request.param, dtype=jnp.float32)
    with np.load(DATA / f"{request.param}.npz") as reference:
        return model, dict(reference)


@pytest.fixture(scope="module")
def tiny():
    config = OPTConfig(
        vocab_size=40,
        hidden_size=16,
        num_layers=2,
        ffn_size=24,
        num_heads=2,
        max_positions=12,
        init_std=0.2,
    )
    return OPT(config, rngs=nnx.Rngs(0))


@functools.cache
def jitted_step(model):
    graph, state = nnx.split(model)

    @jax.jit(donate_argnums=(1,))
    def step(state, cache, tokens, mask, positions, start):
        model = nnx.merge(graph, state)
        return model.step(tokens, mask, positions, cache, start, last_only=True)

    return lambda cache, *args: step(state, cache, *args)


def test_every_variant_is_stored():
    assert len(VARIANTS) == 7


@pytest.mark.parametrize("kind", MASKS)
def test_logits_equal_pytorch(variant, kind):
    model, reference = variant
    mask, expected = reference[f"mask_{kind}"], reference[f"logits_{kind}"]
    logits = model(reference["tokens"], None if kind == "none" else mask)
    assert logits.dtype == jnp.float32
    assert logits.shape == expected.shape
    error = np.abs(np.asarray(logits) - expected)[mask.astype(bool)]
    assert error.max() < 1e-4
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("kind", MASKS)
def test_cached_steps_equal_pytorch(variant, kind):
    """Prefill of a part, then one token at a time, each with its position."""
    model, reference = variant
    tokens, mask = jnp.asarray(reference["tokens"]), reference[f"mask_{kind}"]
    positions = modeling.positions_from_mask(mask)
    mask = jnp.asarray(mask).astype(bool)
    prefill = 3
    batch, length = tokens.shape
    logits, cache = model.step(
        *(a[:, :prefill] for a in (tokens, mask, positions)),
        model.init_cache(batch, length + 2),
        0,
    )
    step, outputs = jitted_step(model), [logits]
    for i in range(prefill, length):
        logits, cache = step(
            cache, *(a[:, i : i + 1] for a in (tokens, mask, positions)), jnp.int32(i)
        )
        outputs.append(logits[:, None])
    outputs = np.concatenate(outputs, axis=1)
    error = np.abs(outputs - reference[f"logits_{kind}"])[np.asarray(mask)]
    assert error.max() < 1e-4


@pytest.mark.parametrize("kind", ["none", "left"])
def test_greedy_continuations_equal_pytorch(variant, kind):
    model, reference = variant
    expected = reference[f"generated_{kind}"]
    tokens = reference["tokens"]
    out = opt.generate(
        model,
        tokens,
        reference[f"mask_{kind}"],
        max_new_tokens=expected.shape[1] - tokens.shape[1],
    )
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_equals_pytorch(name):
    with np.load(DATA / "activations.npz") as reference:
        y = modeling._ACTIVATIONS[name](jnp.asarray(reference["x"]))
        np.testing.assert_allclose(y, reference[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("name", ["pre_norm", "post_norm_projected"])
def test_half_precision(name, dtype):
    model, _ = opt.from_pretrained(DATA / name, dtype=dtype, sparse=False)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(dtype)}
    with np.load(DATA / f"{name}.npz") as reference:
        logits = model(reference["tokens"], reference["mask_left"])
        expected = reference["logits_left"]
        mask = reference["mask_left"].astype(bool)
    assert logits.dtype == jnp.float32
    error = np.abs(np.asarray(logits) - expected)[mask]
    scale = np.abs(expected[mask]).max()
    # A handful of roundings on the way through two layers.
    assert error.max() < 16 * float(jnp.finfo(dtype).eps) * scale
    assert model.init_cache(1, 4).keys[0].dtype == dtype


def test_padding_does_not_change_real_tokens(tiny):
    tokens = np.array([[5, 6, 7, 8]], np.int32)
    expected = tiny(tokens)
    left = tiny(
        np.array([[1, 1, 1, 5, 6, 7, 8]], np.int32), np.array([[0, 0, 0, 1, 1, 1, 1]])
    )
    right = tiny(
        np.array([[5, 6, 7, 8, 9, 9, 9]], np.int32),
        np.array([[1, 1, 1, 1, 0, 0, 0]], bool),
    )
    np.testing.assert_allclose(left[:, 3:], expected, atol=1e-5)
    np.testing.assert_allclose(right[:, :4], expected, atol=1e-5)


def test_positions_from_mask():
    mask = np.array([[1, 1, 1], [0, 1, 1], [1, 0, 1], [0, 0, 0]])
    expected = [[0, 1, 2], [-1, 0, 1], [0, -1, 1], [-1, -1, -1]]
    positions = modeling.positions_from_mask(mask)
    assert positions.dtype == jnp.int32
    np.testing.assert_array_equal(positions, expected)


def test_a_row_of_padding_is_finite(tiny):
    logits = tiny(np.ones((2, 3), np.int32), np.array([[1, 1, 1], [0, 0, 0]]))
    assert np.isfinite(logits).all()


def test_long_attention_goes_in_blocks(tiny, monkeypatch):
    tokens = np.arange(22, dtype=np.int32).reshape(2, 11)
    expected = tiny(tokens)
    limit = "flashjax.models.opt.attention._MAX_SCORES"
    monkeypatch.setattr(limit, 2 * 2 * 11 * 3)
    np.testing.assert_allclose(tiny(tokens), expected, atol=1e-5)


def test_logits_of_chosen_tokens(tiny):
    tokens = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)
    mask = jnp.ones((2, 4), bool)
    positions = modeling.positions_from_mask(mask)
    args = tokens, mask, positions, tiny.init_cache(2, 6), 0
    every, _ = tiny.step(*args)
    last, _ = tiny.step(*args, last_only=True)
    chosen, _ = tiny.step(*args, logits_index=jnp.array([1, 3], jnp.int32))
    assert every.shape == (2, 4, 40)
    np.testing.assert_allclose(last, every[:, -1], atol=1e-5)
    np.testing.assert_allclose(chosen, every[np.arange(2), [1, 3]], atol=1e-5)


def test_step_updates_the_donated_cache_in_place(tiny):
    cache = tiny.init_cache(2, 6)
    before = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache)]
    token = jnp.ones((2, 1), jnp.int32)
    mask, start = jnp.ones((2, 1), bool), jnp.int32(0)
    _, after = jitted_step(tiny)(cache, token, mask, token, start)
    assert cache.keys[0].is_deleted()
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after)] == before


def test_cache_properties(tiny):
    cache = tiny.init_cache(3, 5)
    assert (cache.batch, cache.max_length) == (3, 5)
    assert cache.nbytes == 2 * 2 * 3 * 5 * 16 * 4 + 15
    assert len(cache.keys) == len(cache.values) == 2


def test_jit_and_grad(tiny):
    tokens = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)
    np.testing.assert_allclose(
        nnx.jit(lambda m, t: m(t))(tiny, tokens), tiny(tokens), atol=1e-5
    )
    loss_grad = nnx.jit(nnx.grad(lambda m: jnp.mean(jnp.square(m(tokens)))))
    grads = loss_grad(tiny)
    leaves = jax.tree.leaves(grads)
    assert len(leaves) == len(jax.tree.leaves(nnx.state(tiny)))
    assert all(np.isfinite(leaf).all() for leaf in leaves)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int16, np.uint32])
def test_takes_other_integer_dtypes(tiny, dtype):
    tokens = np.arange(4, dtype=np.int32)[None]
    mask = np.array([[0, 1, 1, 1]])
    np.testing.assert_array_equal(
        tiny(tokens.astype(dtype), mask.astype(dtype)), tiny(tokens, mask.astype(bool))
    )


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        (np.zeros((1, 2), np.float32), None, "integers, got dtype float32"),
        (np.zeros((1, 2), bool), None, "integers, got dtype bool"),
        (np.zeros((2,), np.int32), None, r"\(batch, length\).*\(2,\)"),
        (np.zeros((1, 0), np.int32), None, r"\(1, 0\)"),
        (np.zeros((1, 13), np.int32), None, "length 13, the model has 12 positions"),
        (np.array([[0, 40]]), None, r"\[0, 40\), got values from 0 to 40"),
        (np.array([[-1, 3]]), None, "from -1 to 3"),
        (np.array([[2**40, 3]]), None, f"from 3 to {2**40}"),
        (np.zeros((2, 3), int), np.ones((3, 2), int), r"\(2, 3\), got \(3, 2\)"),
        (np.zeros((2, 3), int), np.ones((2, 3)), "integers, got dtype float64"),
        (np.zeros((1, 2), int), np.array([[0, 2]]), "0 and 1, got values from 0 to 2"),
    ],
)
def test_wrong_input(tiny, tokens, mask, message):
    with pytest.raises(ValueError, match=message):
        tiny(tokens, mask)


def test_wrong_step_input(tiny):
    tokens, mask = jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3), bool)
    with pytest.raises(ValueError, match=r"shape of token_ids, \(2, 3\)"):
        tiny.step(tokens, mask[:, :2], tokens, tiny.init_cache(2, 4), 0)
    with pytest.raises(ValueError, match="batch of 1, token_ids have 2"):
        tiny.step(tokens, mask, tokens, tiny.init_cache(1, 4), 0)
    with pytest.raises(ValueError, match="3 tokens from slot 2 do not fit"):
        tiny.step(tokens, mask, tokens, tiny.init_cache(2, 4), 2)
    for slots in (2, 5):
        with pytest.raises(ValueError, match=f"slots must be from 3.*4, got {slots}"):
            tiny.step(tokens, mask, tokens, tiny.init_cache(2, 4), 0, slots=slots)
    with pytest.raises(ValueError, match="batch=0"):
        tiny.init_cache(0, 4)


def test_wrong_dtype():
    with pytest.raises(ValueError, match=r"float16 or bfloat16, got .*int32"):
        OPT(OPTConfig(), dtype=jnp.int32, rngs=nnx.Rngs(0))
