"""The kernel of a decode step's attention: on a GPU, lowered, and over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flashjax import decode_attention as module

from . import cuda_stand_in
from .decode_attention_cases import check, in_plain_jax, random_case
from .mesh_support import collectives, make_mesh

TARGET = "flashjax_decode_attention_cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [None, jnp.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("batch", [1, 30, 60])
def test_on_a_gpu(batch, head_dim, dtype, cache_dtype):
    case = random_case((batch, 12, 333, head_dim), dtype, cache_dtype)
    operands = jax.device_put(case, jax.devices("gpu")[0])
    attend = jax.jit(module.decode_attention)
    for used in (1, 64, 333):
        outputs = attend(*operands, jnp.int32(used))
        check(np.asarray(outputs), case, used)
        np.testing.assert_array_equal(outputs, attend(*operands, jnp.int32(used)))


@pytest.mark.gpu
def test_nan_on_a_gpu():
    queries, keys, values, mask = random_case((1, 2, 40, 64), np.float16, None)
    for dtype in (jnp.float16, jnp.float8_e4m3fn):
        found = keys.astype(dtype)
        found[0, 1, 35] = np.nan
        mask[:] = True
        operands = jax.device_put((queries, found, values.astype(dtype), mask))
        assert np.isfinite(module.decode_attention(*operands, jnp.int32(35))).all()
        outputs = np.asarray(module.decode_attention(*operands, jnp.int32(36)))
        assert np.isnan(outputs[0, 1]).all()
        assert np.isfinite(outputs[0, 0]).all()


def test_lowers_for_a_gpu():
    case = random_case((2, 3, 40, 64), np.float16, None)
    with cuda_stand_in.cuda_module():
        assert module.is_supported(np.float16, jnp.asarray(case[1]))
        traced = jax.jit(module.decode_attention).trace(*case, np.int32(7))
        lowered = traced.lower(lowering_platforms=("cuda",))
    assert TARGET in lowered.as_text()


@pytest.mark.parametrize(
    ("shape", "dtype", "cache_dtype"),
    [
        ((2, 3, 40, 80), "float16", "float16"),
        ((2, 3, 40, 64), "float32", "float32"),
        ((2, 3, 40, 64), "float16", "bfloat16"),
        ((2, 0, 40, 64), "float16", "float16"),
    ],
)
def test_what_the_kernel_does_not_take(shape, dtype, cache_dtype):
    with cuda_stand_in.cuda_module():
        assert not module.is_supported(dtype, jnp.zeros(shape, cache_dtype))


@pytest.mark.parametrize(
    "spec", [P("data"), P(None, "model"), P("data", "model"), P(("data", "model"))]
)
def test_every_device_computes_its_own(spec, monkeypatch):
    monkeypatch.setattr(module, "_call", in_plain_jax)
    case = random_case((8, 4, 40, 64), np.float16, None)
    mesh = make_mesh((2, 2), ("data", "model"))
    by_head, by_batch = NamedSharding(mesh, spec), NamedSharding(mesh, P(*spec[:1]))
    operands = jax.device_put(case, (by_head, by_head, by_head, by_batch))
    compiled = jax.jit(module.decode_attention).lower(*operands, np.int32(33)).compile()
    assert not collectives(compiled)
    outputs = compiled(*operands, np.int32(33))
    assert outputs.sharding.is_equivalent_to(by_head, 3)
    check(np.asarray(outputs), case, 33)


def test_inside_a_manual_axis(monkeypatch):
    monkeypatch.setattr(module, "_call", in_plain_jax)
    case = random_case((4, 2, 40, 64), np.float16, None)
    mesh = make_mesh((2,), ("data",))
    attend = jax.shard_map(
        module.decode_attention,
        mesh=mesh,
        in_specs=(*[P("data")] * 4, P()),
        out_specs=P("data"),
    )
    check(np.asarray(jax.jit(attend)(*case, np.int32(40))), case, 40)
