import contextlib
import dataclasses
import gc
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flashjax as fj
from flashjax import matmul
from flashjax.models import opt
from flashjax.models.opt import generation_request

# `opt.generate` is the function; this is the module that it comes from.
generate_module = sys.modules["flashjax.models.opt.generate"]

CONFIG = opt.OPTConfig(
    vocab_size=61,
    hidden_size=16,
    num_layers=1,
    ffn_size=32,
    num_heads=2,
    max_positions=24,
    pad_token_id=1,
    eos_token_id=2,
    init_std=0.4,
)
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
NEW = 8
PROMPTS = [[5, 9, 31], [7, 8, 9, 10, 11, 12], [50]]


def _model(dtype=jnp.float32, seed=0, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return opt.OPT(config, dtype=dtype, rngs=nnx.Rngs(seed))


@pytest.fixture(scope="module")
def model():
    return _model()


@nnx.jit
def _logits(model, token_ids):
    return model(token_ids)


def _naive(model, prompts, new):
    """Greedy continuations without cache, mask and end token: (rows, new)."""
    # One shape for all, so that a model is compiled once.
    ids = np.zeros((len(PROMPTS), CONFIG.max_positions), np.int32)
    ends = np.array([len(p) for p in prompts])
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    rows = np.arange(len(prompts))
    for _ in range(new):
        # Causal attention: what comes after a row's end does not change its logits.
        logits = np.asarray(_logits(model, jnp.asarray(ids)))[rows, ends - 1]
        ids[rows, ends] = logits.argmax(axis=-1)
        ends = ends + 1
    return np.stack([ids[r, ends[r] - new : ends[r]] for r in rows])


def _left(length):
    """Places of a prompt after padding to this length."""
    return lambda n: slice(length - n, None)


def _batch(prompts=PROMPTS, length=8, places=None):
    """Token ids and mask, each prompt at the slots ``places(len(prompt))``."""
    places = places or _left(length)
    ids = np.full((len(prompts), length), CONFIG.pad_token_id, np.int32)
    mask = np.zeros((len(prompts), length), np.bool_)
    for row, prompt in enumerate(prompts):
        slots = places(len(prompt))
        ids[row, slots] = prompt
        mask[row, slots] = True
    return ids, mask


@contextlib.contextmanager
def _count_compilations():
    """The names of what JAX traces and compiles meanwhile."""
    events = []

    def listen(event, duration, **kwargs):
        if event.startswith("/jax/core/compile"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_greedy_equals_a_loop_without_cache(variant):
    model = _model(**variant)
    ids, mask = _batch()
    out = opt.generate(model, ids, mask, max_new_tokens=NEW, eos_token_id=-1)
    assert isinstance(out, jax.Array)
    assert out.dtype == jnp.int32
    assert out.shape == (3, 8 + NEW)
    np.testing.assert_array_equal(out[:, :8], ids)
    np.testing.assert_array_equal(out[:, 8:], _naive(model, PROMPTS, NEW))


@pytest.mark.parametrize(
    "places",
    [
        _left(8),
        lambda n: slice(0, n),
        lambda n: slice(1, n + 1),
        lambda n: [0, 2, 3, 5, 6, 7][-n:],
        lambda n: [0, 1, 3, 4, 5, 7][:n],
    ],
    ids=["left", "right", "both", "holes_left", "holes_right"],
)
def test_greedy_does_not_depend_on_padding(model, places):
    ids, mask = _batch(places=places)
    out = opt.generate(model, ids, mask, max_new_tokens=NEW, eos_token_id=-1)
    np.testing.assert_array_equal(out[:, 8:], _naive(model, PROMPTS, NEW))


def test_padding_ids_do_not_matter(model):
    ids, mask = _batch()
    expected = opt.generate(model, ids, mask, max_new_tokens=NEW)
    for filler in (0, 60, -100, 1 << 20):
        other = np.where(mask, ids, filler)
        out = opt.generate(model, other, mask, max_new_tokens=NEW)
        np.testing.assert_array_equal(out[:, 8:], expected[:, 8:])
        np.testing.assert_array_equal(out[:, :8], other)


def test_rows_do_not_depend_on_each_other(model):
    ids, mask = _batch()
    whole = opt.generate(model, ids, mask, max_new_tokens=NEW, eos_token_id=-1)
    for row, prompt in enumerate(PROMPTS):
        one = _batch([prompt])
        alone = opt.generate(model, *one, max_new_tokens=NEW, eos_token_id=-1)
        np.testing.assert_array_equal(alone[0], whole[row])


@pytest.mark.parametrize("mask_type", [np.bool_, np.int32, np.int64, np.uint8, "jax"])
@pytest.mark.parametrize("ids_type", [np.int64, np.uint8, "jax", list])
def test_input_types(model, ids_type, mask_type):
    ids, mask = _batch()
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
        np.testing.assert_array_equal(out[:, length:], _naive(model, prompt, new))


def test_padding_takes_no_positions(model):
    # Wider than the positions, but no row has more real tokens than fit.
    ids, mask = _batch(length=40)
    out = opt.generate(model, ids, mask, max_new_tokens=NEW, eos_token_id=-1)
    np.testing.assert_array_equal(out[:, 40:], _naive(model, PROMPTS, NEW))


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


class TestEnd:
    """Stopping at end tokens."""

    @pytest.fixture
    def free(self, model):
        """Prompts, and what the model says to them without an end token."""
        ids = np.array([[7, 8, 9, 10, 11, 12], [9, 9, 3, 4, 5, 6], [8, 0, 0, 0, 5, 9]])
        out = opt.generate(model, ids, max_new_tokens=NEW, eos_token_id=-1)
        return ids, np.asarray(out)[:, 6:]

    def _cut(self, new, ends):
        expected = new.copy()
        for row in expected:
            where = np.flatnonzero(np.isin(row, ends))
            if where.size:
                row[where[0] + 1 :] = CONFIG.pad_token_id
        return expected

    @pytest.mark.parametrize("at", [0, 1, 4, NEW - 1])
    def test_rows_are_padded_after_their_end(self, model, free, at):
        ids, new = free
        end = int(new[0, at])
        out = opt.generate(model, ids, max_new_tokens=NEW, eos_token_id=end)
        np.testing.assert_array_equal(out[:, 6:], self._cut(new, [end]))

    @pytest.mark.parametrize("kind", [list, tuple, np.array])
    def test_several_ends(self, model, free, kind):
        ids, new = free
        ends = kind([int(new[0, 3]), int(new[1, 2])])
        out = opt.generate(model, ids, max_new_tokens=NEW, eos_token_id=ends)
        np.testing.assert_array_equal(out[:, 6:], self._cut(new, ends))

    def test_none_takes_the_configuration(self, free):
        ids, new = free
        ends = (int(new[0, 2]), int(new[1, 4]))
        other = _model(eos_token_id=ends)
        out = opt.generate(other, ids, max_new_tokens=NEW)
        np.testing.assert_array_equal(out[:, 6:], self._cut(new, ends))
        found = generation_request._end_tokens(CONFIG, None)
        assert np.flatnonzero(found).tolist() == [CONFIG.eos_token_id]

    def test_no_end(self, model, free):
        ids, new = free
        out = opt.generate(model, ids, max_new_tokens=NEW, eos_token_id=())
        np.testing.assert_array_equal(out[:, 6:], new)
        for own in (None, 1000):
            config = dataclasses.replace(CONFIG, eos_token_id=own)
            assert not generation_request._end_tokens(config, None).any()

    @pytest.mark.parametrize("pad", [None, -1, 1000])
    def test_without_padding_token_rows_are_filled_with_an_end(self, free, pad):
        ids, new = free
        end = int(new[0, 0])
        other = _model(pad_token_id=pad)
        out = opt.generate(other, ids, max_new_tokens=NEW, eos_token_id=end)
        assert (np.asarray(out)[0, 6:] == end).all()

    def test_the_loop_ends_with_the_last_row(self, model, free, monkeypatch):
        states = []
        decode = generate_module._decode

        def spy(*args):
            result = decode(*args)
            states.append(result[0])
            return result

        monkeypatch.setattr(generate_module, "_decode", spy)
        ids, new = free
        ends = new[:, 2].tolist()
        cut = self._cut(new, ends)
        steps = int((cut != CONFIG.pad_token_id).sum(axis=1).max())
        assert steps < NEW
        opt.generate(model, ids, max_new_tokens=NEW, eos_token_id=ends)
        assert [int(s.step) for s in states] == [steps]
        streamed = list(
            opt.generate_stream(model, ids, max_new_tokens=NEW, eos_token_id=ends)
        )
        np.testing.assert_array_equal(np.stack(streamed, axis=1), cut[:, :steps])

    def test_min_new_tokens(self, model, free):
        ids, new = free
        end = int(new[1, 0])
        for minimum in (0, 1, 3, NEW):
            options = {"max_new_tokens": NEW, "min_new_tokens": minimum}
            out = opt.generate(model, ids, eos_token_id=end, **options)
            out = np.asarray(out)[:, 6:]
            assert (out[:, :minimum] != end).all()
            if minimum == 0:
                np.testing.assert_array_equal(out, self._cut(new, [end]))
            else:
                # The best token but the end, and nothing else is touched.
                logits = np.array(_logits(model, jnp.asarray(ids))[:, -1])
                logits[:, end] = -np.inf
                np.testing.assert_array_equal(out[:, 0], logits.argmax(axis=-1))

    def test_finished_rows_leave_the_others_alone(self, model, free):
        ids, new = free
        # An end for the first row only.
        end = next(int(t) for t in new[0] if t not in new[1])
        out = opt.generate(model, ids, max_new_tokens=NEW, eos_token_id=end)
        np.testing.assert_array_equal(out[1, 6:], new[1])


SAMPLING = [
    {},
    {"temperature": 1.0},
    {"temperature": 1.5, "top_k": 7, "top_p": 0.9, "seed": 3},
]


@pytest.mark.parametrize("options", SAMPLING, ids=str)
def test_stream_yields_what_generate_returns(model, options):
    ids, mask = _batch()
    options = {"max_new_tokens": NEW, "eos_token_id": -1, **options}
    out = opt.generate(model, ids, mask, **options)
    streamed = list(opt.generate_stream(model, ids, mask, **options))
    assert all(type(t) is np.ndarray and t.dtype == np.int32 for t in streamed)
    np.testing.assert_array_equal(np.stack(streamed, axis=1), out[:, 8:])


def test_stream_keeps_what_it_has_yielded(model):
    # A token array must not be a view of a buffer that the next step reuses.
    ids, mask = _batch()
    kept, copies = [], []
    for tokens in opt.generate_stream(model, ids, mask, max_new_tokens=NEW):
        kept.append(tokens)
        copies.append(tokens.copy())
    np.testing.assert_array_equal(kept, copies)


def test_streams_do_not_disturb_each_other(model):
    ids, mask = _batch()
    options = {"max_new_tokens": NEW, "temperature": 1.0, "eos_token_id": -1}
    alone = [
        list(opt.generate_stream(model, ids, mask, seed=seed, **options))
        for seed in (0, 1)
    ]
    pairs = zip(
        *(
            opt.generate_stream(model, ids, mask, seed=seed, **options)
            for seed in (0, 1)
        ),
        strict=True,
    )
    for together, one in zip(zip(*pairs, strict=True), alone, strict=True):
        np.testing.assert_array_equal(together, one)


def test_an_abandoned_stream(model):
    ids, mask = _batch()
    stream = opt.generate_stream(model, ids, mask, max_new_tokens=NEW)
    next(stream)
    stream.close()
    assert not list(stream)


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
    model = _model(vocab_size=7, init_std=0.2)
    prompt = np.array([[3, 4, 6]])
    rows = 4000
    drawn = opt.generate(
        model,
        np.tile(prompt, (rows, 1)),
        max_new_tokens=1,
        temperature=0.7,
        eos_token_id=-1,
    )[:, 3]
    expected = jax.nn.softmax(_logits(model, jnp.asarray(prompt))[0, -1] / 0.7)
    shares = np.bincount(drawn, minlength=7) / rows
    np.testing.assert_allclose(shares, expected, atol=0.04)


def test_the_second_call_compiles_nothing(model):
    ids, mask = _batch(length=6)
    greedy = [
        {"max_new_tokens": 7},
        {"max_new_tokens": 6, "min_new_tokens": 5, "eos_token_id": (3, 4)},
        {"max_new_tokens": 8, "temperature": 0.0, "seed": 5, "eos_token_id": -1},
    ]
    plain = [
        {"max_new_tokens": 7, "temperature": t, "seed": s}
        for t, s in [(1.0, 0), (0.5, 1)]
    ]
    filtered = [
        {"max_new_tokens": 7, "temperature": 1.0, **filters}
        for filters in (
            {"top_k": 5},
            {"top_k": 3, "top_p": 0.5},
            {"top_p": 0.9, "seed": 1 << 40},
        )
    ]
    for calls in (greedy, plain, filtered):
        opt.generate(model, ids, mask, **calls[0])
        with _count_compilations() as events:
            for options in calls:
                opt.generate(model, ids, mask, **options)
                list(opt.generate_stream(model, ids, mask, **options))
            # Lengths of one bucket share a compiled step as well.
            opt.generate(model, ids[:, 1:], mask[:, 1:], **calls[0])
        assert not events


def test_equal_structures_share_the_compiled_step(model):
    ids, mask = _batch()
    opt.generate(model, ids, mask, max_new_tokens=NEW)
    other = _model(seed=1)
    with _count_compilations() as events:
        out = opt.generate(other, ids, mask, max_new_tokens=NEW, eos_token_id=-1)
    assert not events
    np.testing.assert_array_equal(out[:, 8:], _naive(other, PROMPTS, NEW))


def test_changed_weights_are_used():
    model = _model()
    ids, mask = _batch()
    opt.generate(model, ids, mask, max_new_tokens=NEW)
    table = model.embed_tokens.embedding
    table[...] = table[...][::-1]
    out = opt.generate(model, ids, mask, max_new_tokens=NEW, eos_token_id=-1)
    np.testing.assert_array_equal(out[:, 8:], _naive(model, PROMPTS, NEW))


def test_models_are_freed():
    model = _model()
    ids, mask = _batch()
    opt.generate(model, ids, mask, max_new_tokens=NEW)
    list(opt.generate_stream(model, ids, mask, max_new_tokens=NEW, temperature=1.0))
    alive = [
        weakref.ref(model),
        weakref.ref(model.embed_tokens.embedding[...]),
        weakref.ref(model.layers[0].fc1.kernel[...]),
    ]
    del model
    gc.collect()
    assert [r() for r in alive] == [None] * 3


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision(dtype):
    model = _model(dtype)
    ids, mask = _batch()
    out = opt.generate(model, ids, mask, max_new_tokens=NEW, eos_token_id=-1)
    np.testing.assert_array_equal(out[:, 8:], _naive(model, PROMPTS, NEW))


@pytest.mark.parametrize("donated", ["cache", "tokens"])
def test_the_state_is_donated(model, donated, monkeypatch):
    given = []
    decode = generate_module._decode
    monkeypatch.setattr(
        generate_module, "_decode", lambda *a: given.append(a[3]) or decode(*a)
    )
    opt.generate(model, *_batch(), max_new_tokens=NEW)
    leaves = jax.tree.leaves(getattr(given[0], donated))
    assert all(leaf.is_deleted() for leaf in leaves)


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
    with _count_compilations() as events, pytest.raises(error, match=message):
        function(model, **options)
    assert not events


def test_under_jit(model):
    with pytest.raises(TypeError, match="cannot be called under jit"):
        jax.jit(lambda ids: opt.generate(model, ids, max_new_tokens=1))(
            jnp.ones((1, 2), jnp.int32)
        )


def _sparse_and_dense(dtype, **changes):
    """A model with pruned layers, and the same one with the zeros stored."""
    changes = {"hidden_size": 64, "ffn_size": 160, **changes}
    models = [_model(dtype, **changes) for _ in "ab"]
    for model in models:
        for layer in model.layers:
            attention = layer.self_attn
            for linear in (layer.fc1, layer.fc2, attention.q_proj, attention.out_proj):
                kernel = linear.kernel
                kernel[...] = jnp.asarray(fj.prune.magnitude(kernel[...], 0.7))
    return fj.sparsify(models[0]), models[1]


@pytest.mark.parametrize(
    ("dtype", "rows"),
    # What is above the kernel's rows is expanded.
    [
        (jnp.float16, 3),
        (jnp.bfloat16, 3),
        (jnp.bfloat16, matmul.KERNEL_ROWS["cpu"] + 16),
    ],
    ids=str,
)
def test_sparse_models_generate_as_dense_ones(dtype, rows):
    sparse, dense = _sparse_and_dense(dtype, init_std=0.2)
    ids, mask = _batch()
    ids, mask = (np.resize(a, (rows, 8)) for a in (ids, mask))
    options = {"max_new_tokens": NEW, "eos_token_id": -1}
    out = opt.generate(sparse, ids, mask, **options)
    np.testing.assert_array_equal(out, opt.generate(dense, ids, mask, **options))
    streamed = list(opt.generate_stream(sparse, ids, mask, **options))
    np.testing.assert_array_equal(np.stack(streamed, axis=1), out[:, 8:])
    with _count_compilations() as events:
        opt.generate(sparse, ids, mask, seed=3, **options)
    assert not events


@pytest.mark.parametrize(
    ("platform", "hidden_size"),
    # cuBLAS takes a workspace of 32 MiB, which the weights have to exceed by far.
    [("cpu", 128), pytest.param("cuda", 2048, marks=pytest.mark.gpu)],
)
def test_expanded_weights_do_not_stay(platform, hidden_size):
    # More rows than the kernel takes: every layer expands its weights.
    rows = matmul.KERNEL_ROWS[platform] + 16
    model = _model(
        jnp.float16, num_layers=6, hidden_size=hidden_size, ffn_size=4 * hidden_size
    )
    layers = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model.layers)))
    if platform == "cpu":
        layers *= 2  # it expands to float32
    sparse = fj.sparsify(model)
    graphdef, params = nnx.split(sparse)
    options = opt.GenerationConfig(max_new_tokens=2)
    request = generation_request.make_request(
        sparse.config, np.full((rows, 1), 3), None, options
    )
    arguments = (graphdef, params, request.settings)
    prefill = generate_module._prefill.lower(
        *arguments,
        request.padded,
        request.mask,
        width=request.width,
        logprobs=False,
        on_cpu=platform == "cpu",
    )
    state = generate_module._start(graphdef, params, request)
    decode = generate_module._decode.lower(*arguments, state, np.int32(2))
    for program in (prefill, decode):
        assert program.compile().memory_analysis().temp_size_in_bytes < layers / 2
