"""Makes the scripts of examples/ importable as they are when run."""

import sys

import pytest
from example_support import EXAMPLES


@pytest.fixture(scope="module", autouse=True)
def _scripts():
    before = list(sys.path)
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path[:] = before
