"""A tiny OPT with a tokenizer, and a way to run the command line."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from flashjax.models import opt

TEXT = "the quick brown fox jumps over the lazy dog"


def byte_tokenizer() -> Tokenizer:
    """One token a byte, with OPT's special tokens in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    return tokenizer


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


def run_process(*args, **kwargs) -> subprocess.CompletedProcess:
    """Runs the command line in a process of its own."""
    command = [sys.executable, "-m", "flashjax.cli", *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, **kwargs
    )


def assert_error(result, *parts) -> None:
    """A command failed with one line on stderr and nothing else."""
    assert result.code == 1, result
    lines = result.err.strip().splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("flashjax: error: ")
    for part in parts:
        assert part in lines[0], lines[0]
    assert "Traceback" not in result.out + result.err
