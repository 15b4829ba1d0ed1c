"""A model with the kernel of a decode step, whose place plain JAX takes on a CPU."""

import cuda_stand_in
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_attention_cases import in_plain_jax
from flax import nnx
from generate_support import CONFIG, PROMPTS, batch, generate_module

from flashjax import decode_attention as kernel
from flashjax.models import opt
from flashjax.models.opt import attention

SIZES = {"hidden_size": 128, "num_heads": 2, "ffn_size": 256}


@pytest.fixture
def with_kernel(monkeypatch):
    """Begins to take the branches of a GPU, but for the layout of the cache."""
    calls = []
    choose = jax.lax.platform_dependent

    def call(*operands):
        calls.append(operands)
        return in_plain_jax(*operands)

    def choose_kernel(*operands, default=None, **branches):
        if getattr(branches.get("cuda"), "__name__", "") == "kernel":
            return branches["cuda"](*operands)
        return choose(*operands, default=default, **branches)

    def begin():
        jax.clear_caches()
        monkeypatch.setattr(jax.lax, "platform_dependent", choose_kernel)
        monkeypatch.setattr(kernel, "_call", call)
        return calls

    with cuda_stand_in.cuda_module():
        yield begin
    jax.clear_caches()


def make_model(dtype=jnp.float16, cache_dtype=None):
    config = opt.OPTConfig(**{**vars(CONFIG), **SIZES})
    return opt.OPT(config, dtype=dtype, cache_dtype=cache_dtype, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("cache_dtype", [None, "float8_e4m3fn"])
def test_tokens_are_those_of_plain_jax(cache_dtype, with_kernel):
    model = make_model(cache_dtype=cache_dtype)
    ids, mask = batch(PROMPTS)
    options = {"max_new_tokens": 10, "return_logprobs": True, "eos_token_id": -1}
    tokens, logprobs = opt.generate(model, ids, mask, **options)
    calls = with_kernel()
    found, found_logprobs = opt.generate(model, ids, mask, **options)
    assert calls
    np.testing.assert_array_equal(found, tokens)
    np.testing.assert_allclose(found_logprobs, logprobs, atol=2e-2)


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "count"),
    [
        (jnp.float16, None, 1),
        (jnp.bfloat16, "float8_e4m3fn", 1),
        (jnp.float32, "float8_e4m3fn", 2),
    ],
)
def test_one_loop_where_the_kernel_serves(
    dtype, cache_dtype, count, monkeypatch, with_kernel
):
    model = make_model(dtype, cache_dtype)
    with_kernel()
    monkeypatch.setattr(generate_module, "_platform", lambda arrays: "gpu")
    monkeypatch.setattr(opt.generation_request, "_LEAST_READ", 4)
    loops, decode = [], generate_module._decode

    def spy(*args, slots):
        loops.append(slots)
        return decode(*args, slots=slots)

    monkeypatch.setattr(generate_module, "_decode", spy)
    opt.generate(model, *batch(), max_new_tokens=12, eos_token_id=-1)
    assert len(loops) == count
    assert loops[-1] == 24


@pytest.mark.usefixtures("with_kernel")
def test_derivatives_and_maps_are_those_of_plain_jax():
    rng = np.random.default_rng(0)
    queries = jnp.asarray(rng.standard_normal((3, 2, 4, 1, 64)), jnp.float16)
    keys, values = (
        jnp.asarray(rng.standard_normal((3, 2, 4, 8, 64)), jnp.float16)
        for _ in range(2)
    )
    mask, slot = jnp.ones((3, 2, 8), bool), jnp.int32(5)
    assert kernel.is_supported(queries.dtype, keys[0])

    def attend(queries, keys, values, mask, slot):
        return attention.decode_attention(
            queries, keys, values, mask=mask, slot=slot, slots=8
        )

    mapped = jax.vmap(attend, (0, 0, 0, 0, None))(queries, keys, values, mask, slot)
    for i in range(3):
        one = attend(queries[i], keys[i], values[i], mask[i], slot)
        np.testing.assert_allclose(mapped[i], one, atol=2e-3)

    def loss(queries, keys):
        y = attend(queries, keys, values[0], mask[0], slot)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    for gradient in jax.jit(jax.grad(loss, (0, 1)))(queries[0], keys[0]):
        assert np.isfinite(gradient).all()
        assert np.any(np.asarray(gradient) != 0)
