"""Lowering for CUDA where the CUDA module was not built: lowering runs nothing."""

import contextlib
import types

import jax
import pytest

from flashjax import _native, packing


@contextlib.contextmanager
def cuda_module():
    """Stands in for the CUDA module if it is missing."""
    if _native.cuda is not None:
        yield
        return
    module = types.SimpleNamespace(workspace_bytes=lambda n, m, k: 4096)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "cuda", module)
        patch.setattr(packing, "can_lower_for_cuda", lambda: True)
        jax.clear_caches()
        yield
    jax.clear_caches()
