"""The fine-tuning demo, end to end on a tiny model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_support import invoke
from flax import nnx

from flashjax.models import opt


@pytest.fixture(scope="module")
def script():
    import finetune_demo

    return finetune_demo


@pytest.fixture(scope="module")
def folder(script, tmp_path_factory):
    """A random model with a tokenizer and held-out text."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 4)) for _ in range(60)]
    lines = [" ".join(rng.choice(words, 12)) for _ in range(200)]
    content = "\n\n".join(lines)
    tokenizer = script.text.train_tokenizer([content], 300)
    config = opt.OPTConfig(
        vocab_size=300,
        hidden_size=32,
        num_layers=1,
        ffn_size=48,
        num_heads=2,
        max_positions=32,
    )
    folder = tmp_path_factory.mktemp("finetune") / "model"
    opt.save_pretrained(opt.OPT(config, rngs=nnx.Rngs(0)), tokenizer, folder)
    (folder / "heldout.txt").write_text("\n\n".join(lines[-20:]), encoding="utf-8")
    (folder.parent / "book.txt").write_text(content, encoding="utf-8")
    return folder


def test_sparse_training_follows_the_masked_one(script, folder, tmp_path):
    out, docs = tmp_path / "out", tmp_path / "docs"
    docs.mkdir()
    (docs / "fine-tuning.md").write_text(f"# x\n{script.MARKS[0]}\n{script.MARKS[1]}\n")
    options = ["--steps", 4, "--batch", 2, "--length", 16, "--docs", docs]
    options += ["--text", folder.parent / "book.txt", "--learning-rate", 3e-3]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        result = invoke(script.main, "--out", out, "--model", folder, *options)
    assert result.exit_code == 0, result.output
    record = json.loads((out / "finetune.json").read_text())
    sparse, dense = record["sparse"], record["dense, masked"]
    assert record["sparsity"] == pytest.approx(0.8, abs=0.01)
    for name in ("perplexity", "train_loss"):
        np.testing.assert_allclose(sparse[name], dense[name], rtol=5e-3)
    assert sparse["train_loss"][-1] < sparse["train_loss"][0]
    assert sparse["optimizer_bytes"] < dense["optimizer_bytes"]
    model, _ = opt.from_pretrained(out, jnp.float16)
    assert model.layers[0].fc1.kernel[...].sparsity == pytest.approx(0.8, abs=0.02)
    assert (out / "finetune.png").is_file()
    assert "held-out perplexity" in (docs / "fine-tuning.md").read_text()


def test_errors_leave_nothing(script, folder, tmp_path):
    out = tmp_path / "out"
    for arguments, message in (
        (["--model", tmp_path / "none"], "expected a model folder"),
        (["--model", folder, "--sparsity", 2], "sparsity from 0 to 1"),
        (["--model", folder, "--text", tmp_path / "none.txt"], "none.txt"),
    ):
        result = invoke(script.main, "--out", out, *arguments)
        assert result.exit_code == 1
        assert message in result.output
        assert not out.exists()
