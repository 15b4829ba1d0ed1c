"""Models in PyTorch's own format."""

import builtins
import os

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from opt_folders import DATA, EMBED, FC1, LM_HEAD, assert_same, write_pickles
from safetensors.numpy import load_file

from flashjax.checkpoint import CheckpointError
from flashjax.models import opt


@pytest.mark.parametrize("files", [1, 3])
def test_pickles(folder, files):
    write_pickles(folder, files)
    assert_same(
        opt.from_pretrained(folder)[0], opt.from_pretrained(DATA / "pre_norm")[0]
    )


def test_pickle_of_bfloat16_in_the_old_format(folder):
    torch = pytest.importorskip("torch", reason="pip install 'flashjax[torch]'")
    stored = load_file(folder / "model.safetensors")
    tensors = {n: torch.from_numpy(a).bfloat16() for n, a in stored.items()}
    tensors[LM_HEAD] = tensors[EMBED]
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    model, _ = opt.from_pretrained(folder, dtype=jnp.bfloat16)
    expected = stored[FC1].astype(ml_dtypes.bfloat16).T
    np.testing.assert_array_equal(model.layers[0].fc1.kernel[...], expected)


def test_safetensors_are_preferred_to_pickles(folder):
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    opt.from_pretrained(folder)


def test_pickles_without_torch(folder, monkeypatch):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    original = builtins.__import__

    def no_torch(name, *args, **kwargs):
        if name == "torch":
            raise ImportError("No module named 'torch'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_torch)
    with pytest.raises(CheckpointError, match=r"pip install 'flashjax\[torch\]'"):
        opt.from_pretrained(folder)


def test_pickle_that_would_run_code(folder):
    torch = pytest.importorskip("torch", reason="pip install 'flashjax[torch]'")

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(folder / "was_run"),)

    (folder / "model.safetensors").unlink()
    torch.save({"x": Code()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: expected a whole"):
        opt.from_pretrained(folder)
    assert not (folder / "was_run").exists()


@pytest.mark.parametrize("kind", ["truncated", "garbage", "empty", "list", "shard"])
def test_damaged_pickles(folder, kind):
    torch = pytest.importorskip("torch", reason="pip install 'flashjax[torch]'")
    write_pickles(folder, 1 if kind != "shard" else 2)
    path = folder / "pytorch_model.bin"
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "garbage":
        path.write_bytes(b"garbage" * 100)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "list":
        torch.save([torch.ones(2)], path)
    else:
        (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match="pytorch_model"):
        opt.from_pretrained(folder)
