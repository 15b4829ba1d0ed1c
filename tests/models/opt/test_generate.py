"""What generate() returns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generate_support import (
    CONFIG,
    NEW,
    PROMPTS,
    batch,
    count_compilations,
    generate_module,
    left,
    logits_of,
    make_model,
    naive,
)

from flashjax.models import opt
from flashjax.models.opt import generation_request

VARIANTS = {
    "pre_norm": {"num_layers": 2},
    "post_norm_projections": {
        "num_layers": 2,
        "do_layer_norm_before": False,
        "word_embed_proj_dim": 8,
    },
    "untied": {"tie_word_embeddings": False},
    "no_bias_no_final_norm": {
        "enable_bias": False,
        "remove_final_layer_norm": True,
        "layer_norm_elementwise_affine": False,
    },
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_greedy_equals_a_loop_without_cache(variant):
    model = make_model(**variant)
    ids, mask = batch()
    out = opt.generate(model, ids, mask, max_new_tokens=NEW, eos_token_id=-1)
    assert isinstance(out, jax.Array)
    assert out.dtype == jnp.int32
    assert out.shape == (3, 8 + NEW)
    np.testing.assert_array_equal(out[:, :8], ids)
    np.testing.assert_array_equal(out[:, 8:], naive(model, PROMPTS, NEW))


@pytest.mark.parametrize(
    "places",
    [
        left(8),
        lambda n: slice(0, n),
        lambda n: slice(1, n + 1),
        lambda n: [0, 2, 3, 5, 6, 7][-n:],
        lambda n: [0, 1, 3, 4, 5, 7][:n],
    ],
    ids=["left", "right", "both", "holes_left", "holes_right"],
)
def test_greedy_does_not_depend_on_padding(model, places):
    ids, mask = batch(places=places)
    out = opt.generate(model, ids, mask, max_new_tokens=NEW, eos_token_id=-1)
    np.testing.assert_array_equal(out[:, 8:], naive(model, PROMPTS, NEW))


def test_padding_ids_do_not_matter(model):
    ids, mask = batch()
    expected = opt.generate(model, ids, mask, max_new_tokens=NEW)
    for filler in (0, 60, -100, 1 << 20):
        other = np.where(mask, ids, filler)
        out = opt.generate(model, other, mask, max_new_tokens=NEW)
        np.testing.assert_array_equal(out[:, 8:], expected[:, 8:])
        np.testing.assert_array_equal(out[:, :8], other)


def test_rows_do_not_depend_on_each_other(model):
    ids, mask = batch()
    whole = opt.generate(model, ids, mask, max_new_tokens=NEW, eos_token_id=-1)
    for row, prompt in enumerate(PROMPTS):
        one = batch([prompt])
        alone = opt.generate(model, *one, max_new_tokens=NEW, eos_token_id=-1)
        np.testing.assert_array_equal(alone[0], whole[row])


@pytest.mark.parametrize("mask_type", [np.bool_, np.int32, np.int64, np.uint8, "jax"])
@pytest.mark.parametrize("ids_type", [np.int64, np.uint8, "jax", list])
def test_input_types(model, ids_type, mask_type):
    ids, mask = batch()
    expected = opt.generate(model, ids, mask, max_new_tokens=NEW)

    def convert(array, to):
        if to is list:
            return array.tolist()
        return jnp.asarray(array) if to == "jax" else array.astype(to)

    out = opt.generate(
        model, convert(ids, ids_type), convert(mask, mask_type), max_new_tokens=NEW
    )
    np.testing.assert_array_equal(out, expected)
    assert out.dtype == jnp.int32


def test_every_position_can_be_used(model):
    for length in (1, 23):
        prompt = np.full((1, length), 3)
        new = CONFIG.max_positions - length
        out = opt.generate(model, prompt, max_new_tokens=new, eos_token_id=-1)
        np.testing.assert_array_equal(out[:, length:], naive(model, prompt, new))


def test_padding_takes_no_positions(model):
    # Wider than the positions, but no row has more real tokens than fit.
    ids, mask = batch(length=40)
    out = opt.generate(model, ids, mask, max_new_tokens=NEW, eos_token_id=-1)
    np.testing.assert_array_equal(out[:, 40:], naive(model, PROMPTS, NEW))


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 2047, 2048])
def test_bucket(length):
    bucket = generation_request.bucket(length)
    assert length <= bucket < max(2 * length, length + 64)
    assert generation_request.bucket(bucket) == bucket


def test_no_new_tokens(model):
    ids = np.array([[4, 5], [6, 7]])
    np.testing.assert_array_equal(opt.generate(model, ids, max_new_tokens=0), ids)
    assert not list(opt.generate_stream(model, ids, max_new_tokens=0))


def test_no_rows(model):
    out = opt.generate(model, np.zeros((0, 4), np.int32), max_new_tokens=3)
    assert out.shape == (0, 7)
    assert not list(
        opt.generate_stream(model, np.zeros((0, 4), np.int32), max_new_tokens=3)
    )


def test_sampling_is_reproducible(model):
    ids = np.tile(PROMPTS[1], (3, 1))
    options = {"max_new_tokens": NEW, "temperature": 2.0, "eos_token_id": -1}
    one = np.asarray(opt.generate(model, ids, seed=7, **options))
    np.testing.assert_array_equal(one, opt.generate(model, ids, seed=7, **options))
    assert (one != np.asarray(opt.generate(model, ids, seed=8, **options))).any()
    # Equal prompts get draws of their own, the same in a smaller batch.
    assert len({tuple(row) for row in one.tolist()}) > 1
    np.testing.assert_array_equal(
        one[:2], opt.generate(model, ids[:2], seed=7, **options)
    )


def test_sampling_follows_the_model():
    model = make_model(vocab_size=7, init_std=0.2)
    prompt = np.array([[3, 4, 6]])
    rows = 4000
    drawn = opt.generate(
        model,
        np.tile(prompt, (rows, 1)),
        max_new_tokens=1,
        temperature=0.7,
        eos_token_id=-1,
    )[:, 3]
    expected = jax.nn.softmax(logits_of(model, jnp.asarray(prompt))[0, -1] / 0.7)
    shares = np.bincount(drawn, minlength=7) / rows
    np.testing.assert_allclose(shares, expected, atol=0.04)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision(dtype):
    model = make_model(dtype)
    ids, mask = batch()
    out = opt.generate(model, ids, mask, max_new_tokens=NEW, eos_token_id=-1)
    np.testing.assert_array_equal(out[:, 8:], naive(model, PROMPTS, NEW))


BAD = [
    ({"token_ids": np.array([3, 4])}, ValueError, r"\(2,\); .* token_ids\[None\]"),
    ({"token_ids": np.zeros((1, 2, 3), int)}, ValueError, r"got shape \(1, 2, 3\)"),
    ({"token_ids": np.array([[3.0]])}, ValueError, "integers, got dtype float64"),
    ({"token_ids": np.array([[True]])}, ValueError, "integers, got dtype bool"),
    ({"token_ids": [["a"]]}, ValueError, "token_ids must be integers"),
    ({"token_ids": None}, ValueError, "token_ids must be integers"),
    ({"token_ids": [[3], [3, 4]]}, ValueError, "rectangular .* attention_mask"),
    ({"token_ids": [[3, 61]]}, ValueError, "0 to 60 .* got 61 in row 0, column 1"),
    ({"token_ids": [[-1, 3]]}, ValueError, "0 to 60 .* got -1 in row 0, column 0"),
    ({"token_ids": np.array([[1 << 63]], np.uint64)}, ValueError, "0 to 60"),
    ({"token_ids": np.zeros((2, 0), int)}, ValueError, r"row\(s\) \[0, 1\]"),
    ({"attention_mask": [[1, 1]]}, ValueError, r"\(2, 3\), got \(1, 2\)"),
    ({"attention_mask": np.ones((2, 3))}, ValueError, "bool or integers.*float64"),
    ({"attention_mask": [[1, 1, 1], [1, 2, 1]]}, ValueError, "only 0 and 1, got 2"),
    ({"attention_mask": [[1, 0, 0], [0, 0, 0]]}, ValueError, r"row\(s\) \[1\]"),
    ({"max_new_tokens": 22}, ValueError, "24 positions, .* of 3 .*=22"),
    ({"token_ids": np.full((1, 25), 3)}, ValueError, "24 positions, .* of 25 tokens"),
    ({"max_new_tokens": -1}, ValueError, "max_new_tokens must be at least 0, got -1"),
    ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens must be an integer, got 2.0"),
    ({"max_new_tokens": None}, TypeError, "max_new_tokens must be an integer"),
    ({"min_new_tokens": 5}, ValueError, "0 to max_new_tokens=4, got 5"),
    ({"min_new_tokens": -1}, ValueError, "0 to max_new_tokens=4, got -1"),
    ({"min_new_tokens": 1.5}, TypeError, "min_new_tokens must be an integer"),
    ({"temperature": -1.0}, ValueError, "temperature must be finite and at least 0"),
    ({"temperature": float("nan")}, ValueError, "temperature must be finite"),
    ({"top_k": 0}, ValueError, "top_k must be at least 1"),
    ({"top_p": 0.0}, ValueError, "top_p must be greater than 0"),
    ({"seed": -1}, ValueError, "seed must be at least 0"),
    ({"seed": 1.0}, TypeError, "seed must be an integer"),
    ({"eos_token_id": 61}, ValueError, "eos_token_id must be from 0 to 60 .* got 61"),
    ({"eos_token_id": -2}, ValueError, "eos_token_id .* got -2"),
    ({"eos_token_id": [3, -1]}, ValueError, "eos_token_id .* got -1"),
    ({"eos_token_id": 2.0}, TypeError, "eos_token_id must be an integer"),
    ({"eos_token_id": "</s>"}, TypeError, "eos_token_id must be an integer"),
]


@pytest.mark.parametrize("function", [opt.generate, opt.generate_stream])
@pytest.mark.parametrize(
    ("change", "error", "message"), BAD, ids=[f"{i}" for i in range(len(BAD))]
)
def test_bad_input(model, function, change, error, message):
    options = {"token_ids": np.full((2, 3), 3), "max_new_tokens": 4, **change}
    with count_compilations() as events, pytest.raises(error, match=message):
        function(model, **options)
    assert not events


def test_under_jit(model):
    with pytest.raises(TypeError, match="cannot be called under jit"):
        jax.jit(lambda ids: opt.generate(model, ids, max_new_tokens=1))(
            jnp.ones((1, 2), jnp.int32)
        )


def test_a_mesh_with_explicit_axes():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    model = make_model()
    ids, mask = batch()
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match=r"AxisType\.Auto, got one with explicit axes"),
    ):
        opt.generate(model, ids, mask)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3, "top_p": 0.5}],
)
@pytest.mark.parametrize("place", ["a token of one row", "one logit", "infinite"])
def test_logits_that_are_not_finite(options, place):
    model = make_model(tie_word_embeddings=False)
    ids, mask = batch()
    if place == "a token of one row":
        row = np.asarray(ids)[0, np.asarray(mask)[0]]
        at = (int(row[-1]), 0)
        model.embed_tokens.embedding[...] = (
            model.embed_tokens.embedding[...].at[at].set(np.nan)
        )
    elif place == "one logit":
        model.lm_head.kernel[...] = model.lm_head.kernel[...].at[0, 5].set(np.nan)
    else:
        norm = model.final_layer_norm
        norm.bias[...] = norm.bias[...].at[0].set(np.inf)
    options = {"max_new_tokens": 3} | options
    for generate in (
        opt.generate,
        functools.partial(opt.generate, return_logprobs=True),
        lambda *args, **kwargs: list(opt.generate_stream(*args, **kwargs)),
    ):
        with pytest.raises(FloatingPointError, match="logits are NaN or infinite"):
            generate(model, ids, mask, **options)
    config = opt.GenerationConfig(**options)
    request = generation_request.make_request(model.config, ids, mask, config)
    with pytest.raises(FloatingPointError, match="logits are NaN or infinite"):
        generate_module.time_request(model, request)


def test_logits_that_are_nan_in_a_later_step():
    """A stream hands out what came before; after a row's end nothing matters."""
    model = make_model(tie_word_embeddings=False)
    ids = np.array([[5, 6, 7]])
    table = model.embed_positions.embedding[...]
    first_bad = ids.shape[1] + 2  # positions; the table has two more in front
    model.embed_positions.embedding[...] = table.at[first_bad + 2 :].set(np.nan)
    stream = opt.generate_stream(model, ids, max_new_tokens=6, eos_token_id=-1)
    tokens = [int(next(stream)[0]) for _ in range(3)]
    with pytest.raises(FloatingPointError, match="logits are NaN or infinite"):
        next(stream)
    with pytest.raises(FloatingPointError, match="logits are NaN or infinite"):
        opt.generate(model, ids, max_new_tokens=6, eos_token_id=-1)
    ended = opt.generate(model, ids, max_new_tokens=6, eos_token_id=tokens[2])
    assert (
        np.asarray(ended)[0, 3 : 3 + tokens.index(tokens[2]) + 1].tolist()
        == (tokens[: tokens.index(tokens[2]) + 1])
    )
