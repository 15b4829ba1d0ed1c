"""Fixtures of the tests of the native CPU code."""

import pytest

from flashjax import _native

LEVELS = ("portable", "avx2", "avx512")


@pytest.fixture(params=LEVELS)
def simd(request):
    """Runs a test with each instruction set that the machine has."""
    before = _native.cpu.simd()
    try:
        _native.cpu.set_simd(request.param)
    except ValueError:
        pytest.skip(f"needs a CPU with {request.param}")
    yield request.param
    _native.cpu.set_simd(before)
