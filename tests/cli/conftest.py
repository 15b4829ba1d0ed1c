"""A tiny OPT with a tokenizer, and a way to run the command line."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from cli_support import byte_tokenizer
from flax import nnx

from flashjax.models import opt
from flashjax.models.opt.pruning import prune_pretrained


@pytest.fixture(scope="session")
def config() -> opt.OPTConfig:
    return opt.OPTConfig(
        vocab_size=260,
        hidden_size=64,
        num_layers=2,
        ffn_size=128,
        num_heads=4,
        max_positions=64,
        init_std=0.2,
    )


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory, config) -> Path:
    """A random dense OPT in the Hugging Face layout."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    model = opt.OPT(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    opt.save_pretrained(model, byte_tokenizer(), folder)
    return folder


@pytest.fixture(scope="session")
def sparse_folder(tmp_path_factory, dense_folder) -> Path:
    """The same OPT, pruned to 70%."""
    folder = tmp_path_factory.mktemp("models") / "sparse"
    prune_pretrained(dense_folder, folder, sparsity=0.7)
    return folder


@pytest.fixture(params=["missing", "file", "empty", "foreign", "truncated", "config"])
def bad_folder(request, tmp_path, dense_folder) -> tuple[Path, str]:
    """What is no model, and a part of what the error says about it."""
    folder = tmp_path / "bad"
    if request.param == "missing":
        return folder, "expected a model folder, got nothing"
    if request.param == "file":
        folder.write_text("hello")
        return folder, "expected a model folder, got a file"
    if request.param == "empty":
        folder.mkdir()
        return folder, "expected"
    shutil.copytree(dense_folder, folder)
    if request.param == "truncated":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        return folder, "expected a whole safetensors file"
    config = json.loads((folder / "config.json").read_text())
    if request.param == "foreign":
        config["model_type"] = "llama"
        message = "llama"
    else:
        config["num_hidden_layers"] = 3
        message = "layers.2"
    (folder / "config.json").write_text(json.dumps(config))
    return folder, message


@dataclasses.dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys, monkeypatch):
    """Runs the command line in this process, through main()."""
    from flashjax import cli

    def run(*args) -> Result:
        monkeypatch.setattr(sys, "argv", ["flashjax", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        code = ended.value.code
        return Result(0 if code is None else code, captured.out, captured.err)

    return run
