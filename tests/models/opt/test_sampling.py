import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from flashjax.models.opt.sampling import Sampler, filter_sorted, key_data, make_key

VOCAB = 11


@jax.jit
def _draw(sampler, logits, key_words, step):
    return sampler.sample(logits, make_key(key_words), step)


@jax.jit
def _draw_steps(sampler, logits, key_words, steps):
    return jax.vmap(lambda s: sampler.sample(logits, make_key(key_words), s))(steps)


def _frequencies(sampler, logits):
    """Shares of the tokens in 50 rows and 400 steps, all with the same logits."""
    batch = np.tile(np.asarray(logits), (50, 1))
    drawn = _draw_steps(sampler, batch, key_data(0), np.arange(400, dtype=np.int32))
    return np.bincount(np.asarray(drawn).ravel(), minlength=logits.size) / drawn.size


def _padded(*logits):
    """VOCAB logits, those that are not given too low to be drawn."""
    low = np.full(VOCAB, -np.inf, np.float32)
    low[: len(logits)] = logits
    return low


def _expected(logits, temperature, top_k=None, top_p=None):
    """Probabilities by the definition, in float64."""
    scaled = np.asarray(logits, np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")
    kept = order[:top_k]
    weights = np.exp(scaled[kept] - scaled.max())
    weights /= weights.sum()
    if top_p is not None:
        count = int(np.searchsorted(np.cumsum(weights), top_p)) + 1
        kept, weights = kept[:count], weights[:count] / weights[:count].sum()
    result = np.zeros(len(logits))
    result[kept] = weights
    return result


@pytest.fixture(scope="module")
def logits():
    return jnp.asarray(np.random.default_rng(3).normal(size=VOCAB) * 2, jnp.float32)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.5, "top_k": 4},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 2.0, "top_k": VOCAB + 5},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 1.5, "top_p": 0.9},
        {"temperature": 1.0, "top_p": 1.0},
        {"temperature": 2.0, "top_k": 6, "top_p": 0.8},
        {"temperature": 2.0, "top_k": 3, "top_p": 1e-30},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(logits, options):
    drawn = _frequencies(Sampler.create(VOCAB, **options), logits)
    expected = _expected(logits, **options)
    assert not drawn[expected == 0].any()
    # 20000 draws: five standard deviations are at most 0.018.
    np.testing.assert_allclose(drawn, expected, atol=0.018)


def test_greedy_takes_the_highest_and_of_equals_the_first():
    logits = jnp.asarray([[0, 3, 3, 1], [5, 5, 5, 5], [-9, -7, -8, -7]], jnp.float32)
    sampler = Sampler.create(4)
    assert _draw(sampler, logits, key_data(0), 0).tolist() == [1, 0, 1]
    assert _draw(sampler, logits, key_data(1), 7).tolist() == [1, 0, 1]


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-45, 1e-30, 1e-4])
def test_tiny_temperatures_are_greedy(logits, temperature):
    sampler = Sampler.create(VOCAB, temperature=temperature)
    drawn = _frequencies(sampler, logits)
    assert drawn[int(logits.argmax())] == 1


@pytest.mark.parametrize("temperature", [1e30, 1e300])
def test_huge_temperatures_are_uniform(logits, temperature):
    drawn = _frequencies(Sampler.create(VOCAB, temperature=temperature), logits)
    np.testing.assert_allclose(drawn, 1 / VOCAB, atol=0.018)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_top_k_keeps_exactly_k_of_equal_logits(k):
    logits = _padded(1, 2, 2, 2, 2, 0)
    drawn = _frequencies(Sampler.create(VOCAB, temperature=1.0, top_k=k), logits)
    assert np.flatnonzero(drawn).tolist() == sorted([1, 2, 3, 4, 0][:k])


def test_top_p_keeps_one_token_at_least():
    values = jnp.zeros((1, 1000), jnp.float32)
    kept = filter_sorted(values, np.int32(1000), np.float32(1e-38))
    assert np.flatnonzero(np.isfinite(kept[0])).tolist() == [0]


def test_top_p_stops_at_the_token_that_reaches_it():
    values = jnp.log(jnp.asarray([[0.5, 0.25, 0.125, 0.125]], jnp.float32))
    for p, count in [(0.4, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.9, 4), (1.0, 4)]:
        kept = filter_sorted(values, np.int32(4), np.float32(p))
        assert np.isfinite(kept).sum() == count, p


def test_top_p_of_one_keeps_every_token_despite_rounding():
    values = -jnp.linspace(0, 60, 5000, dtype=jnp.float32)[None, :]
    kept = filter_sorted(values, np.int32(5000), np.float32(1))
    assert np.isfinite(kept).all()


def test_top_p_counts_after_top_k():
    # Of all tokens the first has 0.4, of the two highest 4/7 > 0.5.
    values = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1]], jnp.float32))
    assert np.isfinite(filter_sorted(values, np.int32(4), np.float32(0.5))).sum() == 2
    assert np.isfinite(filter_sorted(values, np.int32(2), np.float32(0.5))).sum() == 1


def test_tokens_at_minus_infinity_are_never_drawn():
    logits = _padded(0.0, -np.inf, 1.0)
    for options in ({}, {"top_k": 3}, {"top_p": 0.999}):
        drawn = _frequencies(Sampler.create(VOCAB, temperature=5.0, **options), logits)
        assert np.flatnonzero(drawn).tolist() == [0, 2]


def test_filters_that_leave_nothing_out_change_no_draw(logits):
    plain = Sampler.create(VOCAB, temperature=1.3)
    almost = Sampler.create(VOCAB, temperature=1.3, top_p=0.9999999)
    assert (plain.kind, almost.kind) == ("full", "filtered")
    np.testing.assert_array_equal(
        _frequencies(plain, logits), _frequencies(almost, logits)
    )


def test_a_draw_depends_on_seed_step_and_row_alone(logits):
    sampler = Sampler.create(VOCAB, temperature=2.0)
    batch = jnp.tile(logits[None, :], (40, 1))
    drawn = _draw(sampler, batch, key_data(5), 3)
    np.testing.assert_array_equal(drawn, _draw(sampler, batch, key_data(5), 3))
    np.testing.assert_array_equal(drawn[:7], _draw(sampler, batch[:7], key_data(5), 3))
    others = np.asarray(batch) * np.eye(40, 1, dtype=np.float32)
    assert drawn[0] == _draw(sampler, others, key_data(5), 3)[0]
    assert len(set(drawn.tolist())) > 1
    assert (drawn != _draw(sampler, batch, key_data(6), 3)).any()
    assert (drawn != _draw(sampler, batch, key_data(5), 4)).any()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_logits(logits, dtype):
    half = logits.astype(dtype)
    sampler = Sampler.create(VOCAB, temperature=1.0, top_k=4, top_p=0.9)
    np.testing.assert_array_equal(
        _frequencies(sampler, half), _frequencies(sampler, half.astype(jnp.float32))
    )


def test_values_do_not_recompile():
    def kinds(top_ks, top_ps):
        samplers = [
            Sampler.create(100, temperature=t, top_k=k, top_p=p)
            for t in (0.5, 2)
            for k in top_ks
            for p in top_ps
        ]
        return {jax.tree.structure(s) for s in samplers}

    # jax.jit compiles again for another structure or dtype, not for another value.
    assert len(kinds((None, 100, 1000), (None, 1.0))) == 1
    assert len(kinds((1, 50, 64), (None, 0.3, 0.9))) == 1
    assert len(kinds((None,), (0.3, 0.9))) == 1


def test_key_is_jax_random_key():
    with jax.default_prng_impl("rbg"):
        key = make_key(jnp.asarray(key_data(123)))
    expected = jax.random.key(123, impl="threefry2x32")
    assert (jax.random.key_data(key) == jax.random.key_data(expected)).all()
    assert key_data((1 << 64) - 2).tolist() == [0xFFFFFFFF, 0xFFFFFFFE]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": -0.1}, ValueError, "temperature .* at least 0, got -0.1"),
        ({"temperature": float("nan")}, ValueError, "finite .* got nan"),
        ({"temperature": float("inf")}, ValueError, "finite .* got inf"),
        ({"temperature": "1"}, TypeError, "temperature must be a real number"),
        ({"temperature": None}, TypeError, "temperature must be a real number"),
        ({"temperature": True}, TypeError, "temperature must be a real number"),
        ({"temperature": 1j}, TypeError, "temperature must be a real number"),
        ({"temperature": [1.0]}, TypeError, "temperature must be a real number"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_k": -3}, ValueError, "top_k must be at least 1, got -3"),
        ({"top_k": 2.0}, TypeError, "top_k must be an integer, got 2.0"),
        ({"top_k": True}, TypeError, "top_k must be an integer"),
        ({"top_p": 0}, ValueError, "top_p must be greater than 0 .* got 0.0"),
        ({"top_p": 1.01}, ValueError, "top_p .* at most 1, got 1.01"),
        ({"top_p": float("nan")}, ValueError, "top_p .* got nan"),
        ({"top_p": "0.9"}, TypeError, "top_p must be a real number"),
    ],
    ids=str,
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        Sampler.create(VOCAB, **options)


@pytest.mark.parametrize("number", [np.float32, np.float64, ml_dtypes.bfloat16])
def test_numpy_and_jax_scalars_are_numbers(number):
    for one in (number(1), jnp.asarray(number(1))):
        sampler = Sampler.create(VOCAB, temperature=one, top_p=one)
        assert sampler.temperature == 1
    assert Sampler.create(VOCAB, temperature=1.0, top_k=np.int64(3)).top_k == 3
    assert Sampler.create(VOCAB, temperature=1.0, top_k=jnp.int32(3)).top_k == 3


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_seed_out_of_range(seed):
    with pytest.raises(ValueError, match=f"seed .* got {seed}"):
        key_data(seed)


@pytest.mark.parametrize("seed", [0.5, "1", None, False])
def test_seed_of_a_wrong_type(seed):
    with pytest.raises(TypeError, match="seed must be an integer"):
        key_data(seed)
