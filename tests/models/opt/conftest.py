"""Models that several files test."""

import shutil
from pathlib import Path

import pytest

# What imports JAX is imported late: tests/conftest.py configures it first.


@pytest.fixture(scope="module")
def model():
    from generate_support import make_model

    return make_model()


@pytest.fixture
def folder(tmp_path):
    """A copy of a stored float16 model: pre-norm, tied, one safetensors file."""
    from opt_folders import DATA

    return Path(shutil.copytree(DATA / "pre_norm", tmp_path / "model"))
