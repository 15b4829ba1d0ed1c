"""Models in PyTorch's own format."""

import builtins
import json
import os
import pickle
import sys
import types
import zipfile

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


class FakeTensor:
    """As much of a torch.Tensor as is asked of one."""

    def __init__(self, array, dtype=None):
        self.array, self.shape = array, array.shape
        self.dtype = dtype or f"torch.{array.dtype}"
        self.layout = "torch.strided"

    def detach(self):
        return self

    contiguous = detach

    def view(self, dtype):
        assert dtype == "torch.int16"
        return FakeTensor(self.array.view(np.int16))

    def numpy(self):
        assert self.dtype != "torch.bfloat16", "NumPy has none"
        return self.array


class FakeTorch(types.ModuleType):
    """torch, which reads what a test has put into `files`; notes how it was called."""

    __version__ = "2.6.0+cpu"
    Tensor = FakeTensor
    bfloat16, int16 = "torch.bfloat16", "torch.int16"
    strided = "torch.strided"

    def __init__(self):
        super().__init__("torch")
        self.files, self.calls = {}, []

    def load(self, path, **options):
        self.calls.append((path.name, options))
        content = self.files[path.name]
        if isinstance(content, Exception):
            raise content
        return content


@pytest.fixture
def torch(monkeypatch):
    torch = FakeTorch()
    monkeypatch.setitem(sys.modules, "torch", torch)
    return torch


def fake_pickles(folder, torch, *names, as_zip=True):
    """Moves a folder's tensors into files that only the stand-in can read."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for i, name in enumerate(names):
        part = list(tensors.items())[i :: len(names)]
        torch.files[name] = {n: FakeTensor(array) for n, array in part}
        if as_zip:
            with zipfile.ZipFile(folder / name, "w") as archive:
                archive.writestr("data.pkl", b"")
        else:
            (folder / name).write_bytes(b"old format")
    if len(names) > 1:
        weight_map = {n: file for file, part in torch.files.items() for n in part}
        write_index(folder, weight_map)


def write_index(folder, weight_map):
    path = folder / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("as_zip", [True, False])
def test_torch_is_told_to_read_weights_only(folder, torch, as_zip):
    fake_pickles(folder, torch, "pytorch_model.bin", as_zip=as_zip)
    model, _ = opt.from_pretrained(folder)
    assert_same(model, opt.from_pretrained(DATA / "pre_norm")[0])
    options = {"map_location": "cpu", "weights_only": True, "mmap": as_zip}
    assert torch.calls == [("pytorch_model.bin", options)]


def test_every_shard_is_read_weights_only(folder, torch):
    names = [f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)]
    fake_pickles(folder, torch, *names)
    model, _ = opt.from_pretrained(folder)
    assert_same(model, opt.from_pretrained(DATA / "pre_norm")[0])
    assert {name for name, _ in torch.calls} == set(names)
    assert all(options["weights_only"] is True for _, options in torch.calls)


def test_bfloat16_of_the_stand_in(folder, torch):
    fake_pickles(folder, torch, "pytorch_model.bin")
    tensors = torch.files["pytorch_model.bin"]
    kernel = tensors[FC1].array.astype(ml_dtypes.bfloat16)
    tensors[FC1] = FakeTensor(kernel, "torch.bfloat16")
    model, _ = opt.from_pretrained(folder, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(model.layers[0].fc1.kernel[...], kernel.T)


def test_sparse_tensor_of_the_stand_in(folder, torch):
    fake_pickles(folder, torch, "pytorch_model.bin")
    torch.files["pytorch_model.bin"][FC1].layout = "torch.sparse_coo"
    with pytest.raises(CheckpointError, match=r"fc1.*expected a dense.*sparse_coo"):
        opt.from_pretrained(folder)


@pytest.mark.parametrize(
    "version", ["1.13.1", "2.5.1+cu124", "2.6.0a0+gitdf5bbc0", "2.6.0rc3", "unknown"]
)
def test_torch_that_could_run_code_is_refused(folder, torch, version):
    torch.__version__ = version
    fake_pickles(folder, torch, "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"torch 2\.6 or newer.* got torch") as e:
        opt.from_pretrained(folder)
    assert f"got torch {version}: pip install" in str(e.value)
    assert not torch.calls


@pytest.mark.parametrize(
    "version", ["2.6.0", "2.6.1+cu126", "2.10.0", "2.7.0a0", "3.0"]
)
def test_torch_that_is_new_enough(folder, torch, version):
    torch.__version__ = version
    fake_pickles(folder, torch, "pytorch_model.bin")
    opt.from_pretrained(folder)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            pickle.UnpicklingError("Weights only load failed: mkdir\nTo go on anyway"),
            r"got: Weights only load failed: mkdir$",
        ),
        (RuntimeError("PytorchStreamReader failed"), "got: PytorchStreamReader failed"),
        (EOFError(), "got: EOFError"),
    ],
)
def test_what_torch_refuses(folder, torch, error, reason):
    fake_pickles(folder, torch, "pytorch_model.bin")
    torch.files["pytorch_model.bin"] = error
    with pytest.raises(CheckpointError, match=reason) as raised:
        opt.from_pretrained(folder)
    assert str(raised.value).startswith(f"{folder}/pytorch_model.bin: expected a whole")
    assert raised.value.__cause__ is error
    assert len(torch.calls) == 1  # not tried again in another way


@pytest.mark.parametrize(
    "content", [[], {"x": 1}, {3: FakeTensor(np.ones(2))}, {"x": {"y": 1}}]
)
def test_pickles_that_are_no_state_dict(folder, torch, content):
    fake_pickles(folder, torch, "pytorch_model.bin")
    torch.files["pytorch_model.bin"] = content
    with pytest.raises(CheckpointError, match="expected a state dict of tensors"):
        opt.from_pretrained(folder)


def test_dtypes_that_numpy_does_not_know(folder, torch):
    fake_pickles(folder, torch, "pytorch_model.bin")
    tensors = torch.files["pytorch_model.bin"]
    tensors[FC1] = FakeTensor(tensors[FC1].array, "torch.qint8")
    with pytest.raises(CheckpointError, match=r"float32, got torch\.qint8"):
        opt.from_pretrained(folder)


@pytest.mark.parametrize("file", ["../outside.bin", "/etc/passwd", "a\0b", "", 3, None])
def test_an_index_leads_nowhere_else(folder, torch, file):
    (folder.parent / "outside.bin").touch()
    (folder / "model.safetensors").unlink()
    write_index(folder, {FC1: file})
    with pytest.raises(CheckpointError, match=r"index\.json: "):
        opt.from_pretrained(folder)
    assert not torch.calls


def test_tensors_that_are_not_where_the_index_says(folder, torch):
    fake_pickles(folder, torch, "a.bin", "b.bin")
    write_index(folder, dict.fromkeys(torch.files["a.bin"], "b.bin"))
    with pytest.raises(CheckpointError, match=r"b\.bin: the tensor .* is missing"):
        opt.from_pretrained(folder)
    write_index(folder, {EMBED: "a.bin", FC1: "b.bin"})
    torch.files["a.bin"] = torch.files["b.bin"] = {
        name: FakeTensor(np.ones(2, np.float16)) for name in (EMBED, FC1)
    }
    with pytest.raises(CheckpointError, match=r"b\.bin: .* is also in a\.bin"):
        opt.from_pretrained(folder)
