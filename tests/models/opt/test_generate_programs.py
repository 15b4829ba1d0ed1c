"""What is compiled for generation, and the memory that it takes."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from generate_support import (
    NEW,
    PROMPTS,
    batch,
    count_compilations,
    generate_module,
    make_model,
    naive,
)

import flashjax as fj
from flashjax import matmul
from flashjax.models import opt
from flashjax.models.opt import generation_request


def test_the_second_call_compiles_nothing(model):
    ids, mask = batch(length=6)
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
        with count_compilations() as events:
            for options in calls:
                opt.generate(model, ids, mask, **options)
                list(opt.generate_stream(model, ids, mask, **options))
            # Lengths of one bucket share a compiled step as well.
            opt.generate(model, ids[:, 1:], mask[:, 1:], **calls[0])
        assert not events


@pytest.fixture
def several_loops(monkeypatch):
    """Decodes as on a GPU, reading few slots at first."""
    monkeypatch.setattr(generate_module, "_platform", lambda arrays: "gpu")
    monkeypatch.setattr(generation_request, "_LEAST_READ", 4)


def test_slots_that_are_read():
    read = [generation_request.read_slots(used, 320) for used in (1, 128, 129, 256)]
    assert read == [128, 128, 256, 256]
    assert generation_request.read_slots(257, 320) == 320
    assert generation_request.read_slots(3, 72) == 72


@pytest.mark.usefixtures("several_loops")
def test_a_loop_reads_only_the_slots_in_use(model, monkeypatch):
    read, decode = [], generate_module._decode

    def spy(*args, slots):
        state, news = decode(*args, slots=slots)
        read.append((slots, int(args[-1])))
        return state, news

    monkeypatch.setattr(generate_module, "_decode", spy)
    ids, mask = batch()
    options = {"max_new_tokens": 12, "eos_token_id": -1}
    out = opt.generate(model, ids, mask, **options)
    np.testing.assert_array_equal(out[:, 8:], naive(model, PROMPTS, 12))
    # 24 slots; the token that goes to the last of 16 is the 9th.
    assert read == [(16, 9), (24, 12)]
    streamed = list(opt.generate_stream(model, ids, mask, **options))
    np.testing.assert_array_equal(np.stack(streamed, axis=1), out[:, 8:])


@pytest.mark.usefixtures("several_loops")
def test_later_loops_are_not_compiled_for_finished_rows(model, monkeypatch):
    calls, decode = [], generate_module._decode

    def spy(*args, **kwargs):
        calls.append(kwargs["slots"])
        return decode(*args, **kwargs)

    monkeypatch.setattr(generate_module, "_decode", spy)
    ids, mask = batch()
    every = tuple(range(model.config.vocab_size))
    options = {"max_new_tokens": 12, "min_new_tokens": 2, "eos_token_id": every}
    out = opt.generate(model, ids, mask, **options)
    assert calls == [16]
    assert out.shape == (len(ids), 8 + 12)


@pytest.mark.usefixtures("several_loops")
def test_compile_request_leaves_nothing_to_compile(model):
    ids, mask = batch()
    options = opt.GenerationConfig(max_new_tokens=12, eos_token_id=-1)
    request = generation_request.make_request(model.config, ids, mask, options)
    generate_module.compile_request(model, request)
    with count_compilations() as events:
        opt.generate(model, ids, mask, config=options)
    assert not events


@pytest.mark.parametrize(
    ("batch", "length", "most"),
    [(64, 64, 32), (8, 512, 4), (128, 64, 32), (60, 64, 30), (32, 64, 32)],
)
def test_prompts_that_are_prefilled_at_once(batch, length, most):
    assert generation_request.prefill_sequences(batch, length) == most


@pytest.mark.parametrize(("batch", "length"), [(61, 64), (1, 4096), (3, 1), (5, 2048)])
def test_prompts_are_not_prefilled_by_the_few(batch, length):
    most = generation_request.prefill_sequences(batch, length)
    assert most * length >= min(1024, batch * length)


@pytest.fixture
def pieces(monkeypatch):
    """Prefills 16 tokens at once; no program of either kind is left to another test."""

    def begin():
        jax.clear_caches()
        monkeypatch.setattr(generation_request, "_MOST_PREFILLED", 16)

    yield begin
    jax.clear_caches()


@pytest.mark.parametrize("cache_dtype", [None, "float8_e4m3fn"])
def test_prefill_in_pieces_gives_the_same(cache_dtype, pieces):
    config = make_model().config
    model = opt.OPT(
        config, dtype=jnp.float32, cache_dtype=cache_dtype, rngs=nnx.Rngs(0)
    )
    ids, mask = batch([*PROMPTS, [3], [9, 9], [20, 21, 22, 23]])
    options = {"max_new_tokens": NEW, "return_logprobs": True, "eos_token_id": -1}
    whole = opt.generate(model, ids, mask, **options)
    pieces()
    assert generation_request.prefill_sequences(*ids.shape) == 2
    found = opt.generate(model, ids, mask, **options)
    np.testing.assert_array_equal(found[0], whole[0])
    np.testing.assert_allclose(found[1], whole[1], rtol=1e-5)


def test_equal_structures_share_the_compiled_step(model):
    ids, mask = batch()
    opt.generate(model, ids, mask, max_new_tokens=NEW)
    other = make_model(seed=1)
    with count_compilations() as events:
        out = opt.generate(other, ids, mask, max_new_tokens=NEW, eos_token_id=-1)
    assert not events
    np.testing.assert_array_equal(out[:, 8:], naive(other, PROMPTS, NEW))


def test_changed_weights_are_used():
    model = make_model()
    ids, mask = batch()
    opt.generate(model, ids, mask, max_new_tokens=NEW)
    table = model.embed_tokens.embedding
    table[...] = table[...][::-1]
    out = opt.generate(model, ids, mask, max_new_tokens=NEW, eos_token_id=-1)
    np.testing.assert_array_equal(out[:, 8:], naive(model, PROMPTS, NEW))


def test_models_are_freed():
    model = make_model()
    ids, mask = batch()
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


@pytest.mark.parametrize("donated", ["cache", "tokens"])
def test_the_state_is_donated(model, donated, monkeypatch):
    given = []
    decode = generate_module._decode

    def spy(*args, **kwargs):
        given.append(args[3])
        return decode(*args, **kwargs)

    monkeypatch.setattr(generate_module, "_decode", spy)
    opt.generate(model, *batch(), max_new_tokens=NEW)
    leaves = jax.tree.leaves(getattr(given[0], donated))
    assert all(leaf.is_deleted() for leaf in leaves)


def _sparse_and_dense(dtype, **changes):
    """A model with pruned layers, and the same one with the zeros stored."""
    changes = {"hidden_size": 64, "ffn_size": 160, **changes}
    models = [make_model(dtype, **changes) for _ in "ab"]
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
    ids, mask = batch()
    ids, mask = (np.resize(a, (rows, 8)) for a in (ids, mask))
    options = {"max_new_tokens": NEW, "eos_token_id": -1}
    out = opt.generate(sparse, ids, mask, **options)
    np.testing.assert_array_equal(out, opt.generate(dense, ids, mask, **options))
    streamed = list(opt.generate_stream(sparse, ids, mask, **options))
    np.testing.assert_array_equal(np.stack(streamed, axis=1), out[:, 8:])
    with count_compilations() as events:
        opt.generate(sparse, ids, mask, seed=3, **options)
    assert not events


# Nothing is pruned here.
@pytest.mark.filterwarnings("ignore:sparsify. expected pruned kernels:UserWarning")
@pytest.mark.parametrize(
    ("platform", "hidden_size"),
    # cuBLAS takes a workspace of 32 MiB, which the weights have to exceed by far.
    [("cpu", 128), pytest.param("cuda", 2048, marks=pytest.mark.gpu)],
)
def test_expanded_weights_do_not_stay(platform, hidden_size, monkeypatch):
    # More rows than the kernel takes: every layer expands its weights.
    monkeypatch.setitem(matmul.KERNEL_ROWS, "cuda", 2048)
    rows = matmul.KERNEL_ROWS[platform] + 16
    monkeypatch.setattr(generation_request, "_MOST_PREFILLED", rows)
    model = make_model(
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
    decode = generate_module._decode.lower(
        *arguments, state, np.int32(2), slots=state.cache.max_length
    )
    for program in (prefill, decode):
        assert program.compile().memory_analysis().temp_size_in_bytes < layers / 2
