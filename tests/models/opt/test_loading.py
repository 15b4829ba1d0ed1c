"""What the host holds while a checkpoint is loaded."""

import shutil
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from opt_folders import DATA, LINEARS, edited, sparse_layers

from flashjax.checkpoint import CheckpointError, CheckpointReader, CheckpointWriter
from flashjax.models import opt
from flashjax.models.opt import loading
from flashjax.models.opt.host_memory import put_in_pieces, read_ahead


@pytest.fixture
def loaders(monkeypatch):
    """Those that were made; each with the most that it held and made at a time."""
    made = []

    class Watched(loading._Loader):
        def __init__(self, *args):
            super().__init__(*args)
            self.peak = self.most_made = 0
            made.append(self)

        def take(self, size, must):
            taken = super().take(size, must)
            self.peak = max(self.peak, self._held)
            return taken

        def put_joined(self):
            super().put_joined()
            self.most_made = max(self.most_made, len(self._making))

    monkeypatch.setattr(loading, "_Loader", Watched)
    return made


@pytest.fixture
def folder(tmp_path):
    """Four layers whose matrices have different shares of zeros."""
    config = opt.OPTConfig(
        hidden_size=32, num_layers=4, ffn_size=128, num_heads=2, vocab_size=50
    )
    opt.save_pretrained(opt.OPT(config, rngs=nnx.Rngs(0)), None, tmp_path / "model")
    rng = np.random.default_rng(0)
    with edited(tmp_path / "model") as tensors:
        for name, array in tensors.items():
            part = name.split(".")[-2]
            if part in LINEARS and array.ndim == 2:
                share = 0.3 if part == "v_proj" else 0.8  # v is dense, the others not
                array[rng.random(array.shape) < share] = 0
    return tmp_path / "model"


@pytest.mark.parametrize("fuse_qkv", [True, False])
@pytest.mark.parametrize("sparse", ["auto", True, False])
def test_all_is_given_back(folder, loaders, sparse, fuse_qkv):
    model, _ = opt.from_pretrained(folder, sparse=sparse, fuse_qkv=fuse_qkv)
    # Queries, keys and values that are not alike become layers of their own.
    names = {path[-1] for path in sparse_layers(model)}
    parts = {"qkv_proj"} if fuse_qkv and sparse is True else {"q_proj", "k_proj"}
    expected = parts | {"out_proj", "fc1", "fc2"}
    if sparse is True and not fuse_qkv:
        expected.add("v_proj")
    assert names == (expected if sparse else set())
    (loader,) = loaders
    assert loader._held == 0
    assert not loader._waiting


def test_matrices_that_are_made_slowly_do_not_pile_up(folder, loaders, monkeypatch):
    put, lock, at_once, most = loading._OneDevice.put_sparse, threading.Lock(), 0, 0

    def slowly(*args):
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.02)
        with lock:
            at_once -= 1
        return put(*args)

    monkeypatch.setattr(loading._OneDevice, "put_sparse", slowly)
    monkeypatch.setattr(loading, "_LEAST_BYTES", 0)
    opt.from_pretrained(folder)
    (loader,) = loaders
    table = 2 * 50 * 32 * 4  # the largest tensor but the positions
    assert loader.peak <= max(loader._most, 2 * 2050 * 32 * 4, table)
    assert 1 < most <= loading._MAKERS
    # A layer has at most six, and two layers may be held, each matrix with its copy.
    assert loader.most_made <= 6


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("part", ["embed_tokens", "embed_positions", "fc1"])
def test_any_tensor_may_be_stored_sparse(folder, tmp_path, part, dtype):
    logits = []
    for form in ("dense", "sparse"):
        shutil.copytree(folder, tmp_path / form)
        (tmp_path / form / "model.safetensors").unlink()
        with (
            CheckpointReader(folder) as reader,
            CheckpointWriter(tmp_path / form) as writer,
        ):
            for name in reader.names():
                array = reader.load(name).astype(np.float16)
                sparse = form == "sparse" and part in name and array.ndim == 2
                (writer.add_sparse if sparse else writer.add)(name, array)
            writer.close()
        model, _ = opt.from_pretrained(tmp_path / form, dtype)
        logits.append(model(np.arange(12).reshape(2, 6)))
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("fuse_qkv", [True, False])
def test_values_that_do_not_fit_are_all_named(folder, loaders, fuse_qkv):
    large = [f"model.decoder.layers.{i}.self_attn.v_proj.weight" for i in (1, 3)]
    with edited(folder) as tensors:
        for name in large:
            tensors[name] = tensors[name].astype(np.float32)
            tensors[name][0, 0] = 1e5
    with pytest.raises(CheckpointError, match=", ".join(large)):
        opt.from_pretrained(folder, dtype=jnp.float16, fuse_qkv=fuse_qkv)
    (loader,) = loaders
    assert loader._held == 0


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("readers", [1, 3])
def test_reads_ahead(readers, in_order):
    """All tensors once, as many as there is room for, and large ones alone."""
    sizes = {str(i): 1000 if i % 50 < 5 else 300 for i in range(200)}
    loader = loading._Loader(None, None, 1, 700, False)
    lock, started, taken = threading.Lock(), [], []

    def read(name):
        with lock:
            started.append(name)
        return int(name)

    for name, number in read_ahead(read, sizes, loader.take, readers, in_order):
        assert int(name) == number
        taken.append(name)
        with lock:
            ahead = [sizes[name] for name in started if name not in taken]
        assert len(ahead) < readers
        assert sum(ahead) + sizes[name] <= max(700, sizes[name])
        loader.drop(sizes[name])
    assert taken == list(sizes) if in_order else sorted(taken) == sorted(sizes)
    assert loader._held == 0


def test_error_while_reading_ahead():
    def read(name):
        if name == "20":
            raise CheckpointError("broken")

    sizes = {str(i): 1 for i in range(50)}
    with pytest.raises(CheckpointError, match="broken"):
        for _ in read_ahead(read, sizes, lambda *_: True, 4, False):
            pass


# On JAX's default device, with -m gpu a GPU.
@pytest.mark.parametrize(
    "platform", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("rows", [1, 3, 7, 10, 11])
def test_puts_in_pieces(rows, platform):
    array = np.arange(30, dtype=np.float16).reshape(10, 3)
    np.testing.assert_array_equal(put_in_pieces(array, rows), array)
    np.testing.assert_array_equal(put_in_pieces(array[:, 0], rows), array[:, 0])


def test_variants_are_given_back(loaders):
    for path in sorted(DATA.glob("*/config.json")):
        opt.from_pretrained(path.parent)
        assert loaders.pop()._held == 0
