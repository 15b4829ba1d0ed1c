"""Predicted bytes beside those of real arrays and of XLA's programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from generate_support import generate_module

from flashjax import matmul_impl
from flashjax.models import opt
from flashjax.models.opt import generation_request, memory
from flashjax.models.opt.generation_request import make_request
from flashjax.nn import parameter_bytes
from flashjax.testing import random_opt

CONFIG = opt.OPTConfig(
    vocab_size=500,
    hidden_size=256,
    num_layers=2,
    ffn_size=1024,
    num_heads=8,
    max_positions=384,
)


@pytest.mark.parametrize(
    ("sparsity", "dtype"), [(0.0, jnp.float32), (0.0, jnp.bfloat16), (0.8, jnp.float16)]
)
@pytest.mark.parametrize("fuse_qkv", [True, False])
def test_weights_and_cache(sparsity, dtype, fuse_qkv):
    model = random_opt(CONFIG, sparsity, dtype=dtype, fuse_qkv=fuse_qkv)
    predicted = memory.predict(
        CONFIG, sparsity=sparsity, batch=3, length=320, prompt=64, dtype=dtype
    )
    # Exact where dense; a segment or two of each small matrix otherwise.
    rel = 0.02 if sparsity else 0
    assert predicted.weights == pytest.approx(parameter_bytes(model), rel=rel)
    assert predicted.kv_cache == model.init_cache(3, 320).nbytes


@pytest.fixture(params=[2048, 128])
def most_prefilled(request, monkeypatch):
    """Tokens at once; no program is left to another test."""
    monkeypatch.setattr(generation_request, "_MOST_PREFILLED", request.param)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("most_prefilled")
def test_programs():
    # In float32, which CPUs do not convert to anything else.
    model = random_opt(CONFIG, 0, dtype=jnp.float32)
    batch, prompt, new = 4, 64, 256
    predicted = memory.predict(
        CONFIG,
        sparsity=0,
        batch=batch,
        length=prompt + new,
        prompt=prompt,
        dtype=jnp.float32,
    )
    options = opt.GenerationConfig(max_new_tokens=new)
    request = make_request(CONFIG, np.full((batch, prompt), 3), None, options)
    graphdef, params = nnx.split(model)
    prefill = generate_module._prefill.lower(
        graphdef,
        params,
        request.settings,
        request.padded,
        request.mask,
        width=request.width,
        logprobs=False,
        on_cpu=True,
    )
    state = generate_module._start(graphdef, params, request)
    limit = np.int32(new)
    decode = generate_module._decode.lower(
        graphdef, params, request.settings, state, limit, slots=state.cache.max_length
    )
    prefill, decode = (
        program.compile().memory_analysis() for program in (prefill, decode)
    )
    arguments = predicted.weights + predicted.kv_cache
    assert decode.argument_size_in_bytes == pytest.approx(arguments, rel=0.01)
    for real, bound in (
        (prefill.temp_size_in_bytes, predicted.prefill_temporaries),
        (decode.temp_size_in_bytes, predicted.decode_temporaries),
    ):
        assert bound / 4 < real < 1.05 * bound


def test_published_sizes():
    def predict(config, sparsity, **kwargs):
        return memory.predict(config, sparsity=sparsity, batch=8, length=128, **kwargs)

    huge, gpu = opt.OPTConfig.opt_175b(), 150_000_000_000
    assert not predict(huge, 0.0, device_bytes=gpu).fits
    sparse = predict(huge, 0.8, device_bytes=gpu)
    assert sparse.fits
    assert 90e9 < sparse.weights < 100e9
    assert predict(huge, 0.0, device_bytes=gpu, devices=4).fits
    halved = predict(huge, 0.8, devices=2)
    quartered = predict(huge, 0.8, devices=4).linear_weights
    assert quartered == pytest.approx(halved.linear_weights / 2, rel=0.01)
    # The layout stores more zeros in matrices that are not large (LscdShape::spread).
    assert 1 < halved.linear_weights / (sparse.linear_weights / 2) < 1.015
    half_of_the_vocabulary = 50272 // 2 * 12288 * 2  # bytes
    assert sparse.other_weights - halved.other_weights == half_of_the_vocabulary
    assert halved.fits is halved.fits_by_default is None  # a CPU has no limit
    assert predict(huge, 0.8, device_bytes=100_000_000_000).fits_by_default is False


@pytest.mark.parametrize("has_wgmma", [False, True])
def test_an_expanded_kernel_counts_above_the_rows_that_cuda_takes(
    has_wgmma, monkeypatch
):
    monkeypatch.setattr(matmul_impl, "_has_wgmma", lambda: has_wgmma)

    def temporaries(batch, sparsity):
        huge = opt.OPTConfig.opt_175b()
        predicted = memory.predict(
            huge, sparsity=sparsity, batch=batch, length=64, prompt=64
        )
        return predicted.prefill_temporaries

    expanded = 0 if has_wgmma else 12288 * 49152 * 2
    # 64 and 128 tokens; 67 sequences are not prefilled in pieces: 4288.
    for batch, more in ((1, 0), (2, expanded), (67, expanded)):
        expected = temporaries(batch, 0) + memory._WORKSPACE + more
        assert temporaries(batch, 0.8) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 1.5}, "sparsity from 0 to 1, got 1.5"),
        ({"dtype": jnp.float32}, "float16 or bfloat16, got float32"),
        ({"dtype": "int8"}, "dtype must be float32"),
        ({"batch": 0}, "batch of at least 1, got 0"),
        ({"length": 0}, "length of at least 1, got 0"),
        ({"length": 385}, "384 positions, got 385"),
        ({"prompt": 9}, "prompt from 1 to length=8, got 9"),
        ({"devices": 3}, "divides 8 heads, got 3"),
    ],
)
def test_bad_values(change, message):
    with pytest.raises(ValueError, match=message):
        memory.predict(CONFIG, **({"sparsity": 0.5, "batch": 1, "length": 8} | change))
