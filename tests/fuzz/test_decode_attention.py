"""The attention of a decode step, on the emulated device and on GPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import pytest
from decode_attention_cases import check, random_case
from emulation import emulator
from fuzz import cases
from hypothesis import settings
from hypothesis import strategies as st

from flashjax.decode_attention import HEAD_DIMS, decode_attention

# (batch, heads, slots): few, as each is compiled for.
SHAPES = [(1, 1, 1), (1, 3, 2), (2, 1, 31), (3, 2, 64), (1, 5, 65), (2, 2, 257)]
LARGE_SHAPES = [*SHAPES, (17, 7, 129), (33, 3, 509), (16, 3, 1024), (1, 20, 2111)]
MASKS = ["random", "all", "none", "last", "few"]


def mask(kind: str, shape: tuple[int, int], used: int, seed: int) -> np.ndarray:
    """(batch, slots); a row of none attends to all slots in use alike."""
    found = np.random.default_rng(seed).random(shape)
    masks = {
        "random": found < 0.8,
        "all": found >= 0,
        "none": (found < 0.5) & (np.arange(shape[0]) > 0)[:, None],
        "last": np.broadcast_to(np.arange(shape[1]) == used - 1, shape),
        "few": found < 2 / shape[1],
    }
    return np.ascontiguousarray(masks[kind])


def attention(attend, shapes):
    """A test of a function that attends."""

    @cases.given(
        st.sampled_from(shapes),
        st.sampled_from(HEAD_DIMS),
        st.sampled_from(op_cases.HALVES),
        st.booleans(),
        st.sampled_from(MASKS),
        st.sampled_from([0.0, 1.0, 30.0]),
        st.floats(0, 1),
        cases.seeds,
    )
    def test(shape, head_dim, dtype, is_float8, kind, scale, share, seed):
        used = 1 + int(share * (shape[2] - 1))
        cache_dtype = jnp.float8_e4m3fn if is_float8 else None
        case = random_case((*shape, head_dim), jnp.dtype(dtype), cache_dtype, seed)
        queries, keys, values, _ = case
        queries = (scale * queries).astype(queries.dtype)
        # What is not in use must not be read.
        keys[:, :, used:] = values[:, :, used:] = np.nan
        case = queries, keys, values, mask(kind, (shape[0], shape[2]), used, seed)
        check(np.asarray(attend(*case, used)), case, used)

    return test


def test_emulated():
    emulator.set_device(multiprocessors=3)
    few = max(5, settings.default.max_examples // 30)
    settings(max_examples=few)(attention(emulator.decode_attention, SHAPES))()


attend = jax.jit(decode_attention)


@pytest.mark.gpu
@cases.in_parts
def test_on_a_gpu(part):
    def attend_there(*operands):
        *arrays, used = operands
        placed = jax.device_put(arrays, jax.devices("gpu")[0])
        return attend(*placed, jnp.int32(used))

    cases.of_a_part(attention(attend_there, LARGE_SHAPES[part :: cases.PARTS]))()
