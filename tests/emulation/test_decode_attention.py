"""The kernel of a decode step's attention on the CPU.

tests/test_decode_attention.py runs it on a GPU.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from decode_attention_cases import check, random_case
from emulation import emulator


@pytest.fixture(autouse=True)
def device():
    emulator.set_device(multiprocessors=2)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("cache_dtype", [None, jnp.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_dtypes_and_heads(dtype, cache_dtype, head_dim):
    case = random_case((2, 3, 70, head_dim), dtype, cache_dtype)
    check(emulator.decode_attention(*case, 67), case, 67)


# Of 16, 8 and 4 warps; one slot, a few, more than all warps take at once.
@pytest.mark.parametrize("multiprocessors", [100, 2, 1])
@pytest.mark.parametrize("used", [1, 31, 32, 33, 400])
def test_slots_in_use(used, multiprocessors):
    emulator.set_device(multiprocessors)
    case = random_case((1, 4, 401, 64), np.float16, None)
    check(emulator.decode_attention(*case, used), case, used)


def test_a_sequence_that_may_attend_to_nothing_is_finite():
    queries, keys, values, mask = random_case((2, 2, 40, 64), np.float16, None)
    mask[1] = False
    case = (queries, keys, values, mask)
    check(emulator.decode_attention(*case, 35), case, 35)


@pytest.mark.parametrize("cache_dtype", [None, jnp.float8_e4m3fn])
def test_nan_of_a_slot_in_use_is_seen_and_beyond_is_not(cache_dtype):
    queries, keys, values, mask = random_case((1, 2, 40, 64), np.float16, cache_dtype)
    mask[:] = True
    keys[0, 1, 35] = np.nan
    case = (queries, keys, values, mask)
    assert np.isfinite(emulator.decode_attention(*case, 35)).all()
    outputs = emulator.decode_attention(*case, 36)
    assert np.isnan(outputs[0, 1]).all()
    assert np.isfinite(outputs[0, 0]).all()


def test_large_scores_do_not_overflow():
    queries, keys, values, mask = random_case((1, 2, 40, 64), np.float16, None)
    case = (queries * np.float16(100), keys * np.float16(100), values, mask)
    check(emulator.decode_attention(*case, 40), case, 40)
