"""A stored model, and what tests change and compare in its folder."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from flashjax.nn import SparseDense

DATA = Path(__file__).parent / "models/opt/data"
TOKENS = np.array([[2, 5, 9, 11, 4]], np.int32)
LINEARS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
FC1 = "model.decoder.layers.0.fc1.weight"
LM_HEAD = "lm_head.weight"
EMBED = "model.decoder.embed_tokens.weight"


@contextlib.contextmanager
def edited(folder):
    """The tensors of a folder with one file, written back afterwards."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    yield tensors
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def leaves(model):
    """All arrays by path; packed kernels unpacked."""
    found = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        value = leaf.get_value()
        dense = value.to_dense() if hasattr(value, "to_dense") else value
        found[".".join(map(str, path))] = np.asarray(dense)
    return found


def assert_same(model, other):
    ours, theirs = leaves(model), leaves(other)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype, name
        assert array.tobytes() == theirs[name].tobytes(), name


def prune(folder, share=0.8):
    """Zeroes a share of every linear layer of the decoder in a folder."""
    rng = np.random.default_rng(0)
    with edited(folder) as tensors:
        for name, array in tensors.items():
            if name.split(".")[-2] in LINEARS and array.ndim == 2:
                array[rng.random(array.shape) < share] = 0


def sparse_layers(model):
    return [
        path for path, node in nnx.iter_modules(model) if isinstance(node, SparseDense)
    ]


def write_pickles(folder, files):
    torch = pytest.importorskip("torch", reason="pip install 'flashjax[torch]'")
    tensors = {
        name: torch.from_numpy(array)
        for name, array in load_file(folder / "model.safetensors").items()
    }
    (folder / "model.safetensors").unlink()
    if files == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    weight_map = {}
    for i, name in enumerate(tensors):
        weight_map[name] = f"pytorch_model-{i % files + 1:05}-of-{files:05}.bin"
    for file in set(weight_map.values()):
        part = {n: t for n, t in tensors.items() if weight_map[n] == file}
        torch.save(part, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
