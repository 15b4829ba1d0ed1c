"""What the tests on several devices share."""

import re

import jax
import pytest
from jax.sharding import AxisType

_COLLECTIVE = re.compile(
    r"= .*?\b(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"
    r"(?:-start)?\("
)


def make_mesh(shape=(4,), names=("model",), kind=AxisType.Auto):
    """A mesh of CPU devices, or a skip."""
    count = 1
    for size in shape:
        count *= size
    devices = jax.local_devices(backend="cpu")[:count]
    if len(devices) < count:
        pytest.skip(f"needs {count} CPU devices: run without FLASHJAX_TEST_PLATFORM")
    return jax.make_mesh(shape, names, (kind,) * len(shape), devices=devices)


def collectives(compiled) -> list[str]:
    """The names of the collectives in a compiled computation."""
    return _COLLECTIVE.findall(compiled.as_text())
