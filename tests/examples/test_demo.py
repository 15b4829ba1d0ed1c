"""What `make demo` runs, on a tiny model."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cli_support import byte_tokenizer
from flax import nnx

from flashjax.models import opt
from flashjax.models.opt.pruning import prune_pretrained
from flashjax.nn import sparse_layers

TEXT = "It was the best of times, it was the worst of times. " * 6


@pytest.fixture(scope="module")
def demo():
    import demo

    return demo


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    config = opt.OPTConfig(
        vocab_size=260,
        hidden_size=32,
        num_layers=2,
        ffn_size=64,
        num_heads=2,
        max_positions=64,
        init_std=0.1,
    )
    model = opt.OPT(config, rngs=nnx.Rngs(0))
    opt.save_pretrained(model, byte_tokenizer(), root / "dense")
    prune_pretrained(root / "dense", root / "demo", sparsity=0.6)
    perplexities = {"dense_perplexity": 40.0, "pruned_perplexity": 41.0}
    record = perplexities | {"held_out": {"excerpt": perplexities}}
    (root / "demo" / "training.json").write_text(json.dumps(record))
    (root / "demo" / "heldout.txt").write_text(TEXT)
    return root / "demo"


def test_demo(demo, folder, capsys):
    demo.main(folder, new_tokens=8)
    out = capsys.readouterr().out
    for prompt in demo.PROMPTS:
        assert f"\n{prompt}" in out
    for part in (
        "implementation cpu",
        "tokens/s (16 tokens in",
        "8 layers, 60.0% zeros",  # q, k and v are one
        "dense 40.00, pruned 41.00 (+2.5%)",
        f"({len(TEXT):,} tokens)",
    ):
        assert part in out


def test_perplexity(demo, folder):
    model, tokenizer = opt.from_pretrained(folder, dtype=jnp.float32)
    perplexity, tokens = demo.excerpt_perplexity(model, tokenizer, folder)
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert tokens == len(ids)
    total = 0.0
    for start in range(0, len(ids), 64):
        piece = ids[start : start + 64]
        logits = model(np.asarray([[2, *piece[:-1]]]))
        log_probs = jax.nn.log_softmax(logits[0])
        total -= sum(float(log_probs[i, token]) for i, token in enumerate(piece))
    assert perplexity == pytest.approx(math.exp(total / len(ids)), rel=1e-4)


@pytest.mark.parametrize("content", [None, "{", "{}", '{"held_out": 3}'])
def test_errors(demo, folder, tmp_path, capsys, content):
    broken = tmp_path / "demo"
    if content is not None:
        broken.mkdir()
        (broken / "training.json").write_text(content)
    with pytest.raises(Exception, match="1") as ended:
        demo.main(broken, new_tokens=8)
    assert ended.value.exit_code == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {broken}")
    assert len(err.splitlines()) == 1


def test_model_of_the_repository(demo):
    folder = demo.FOLDER
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 25_000_000
    record = demo.read_record(folder)
    assert record["sparsity"] >= 0.6
    assert record["pruned_perplexity"] <= 1.05 * record["dense_perplexity"]
    model, tokenizer = opt.from_pretrained(folder)
    for _, layer in sparse_layers(model):
        assert layer.kernel[...].sparsity >= 0.6
    # The stored figure was computed in float32, this one runs the sparse layers.
    perplexity, tokens = demo.excerpt_perplexity(model, tokenizer, folder)
    excerpt = record["held_out"]["excerpt"]
    assert tokens == excerpt["tokens"]
    assert perplexity == pytest.approx(excerpt["pruned_perplexity"], rel=5e-3)
