"""The demo's training script, end to end on a tiny model, and its parts."""

import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_support import invoke
from flax import nnx

from flashjax.models import opt

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnoprstuvwy"))
    words = ["".join(rng.choice(letters, rng.integers(2, 7))) for _ in range(300)]
    paragraphs = []
    for _ in range(300):
        chosen = rng.choice(words, rng.integers(20, 60), p=_zipf(len(words)))
        paragraphs.append(" ".join(chosen).capitalize() + ".")
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return path


def _zipf(count):
    weights = 1 / np.arange(1, count + 1)
    return weights / weights.sum()


@pytest.fixture(scope="module")
def run(book, tmp_path_factory):
    """A folder that the script has written, and the record it returned."""
    import train_demo
    from demo_training.settings import settings
    from rich.console import Console

    folder = tmp_path_factory.mktemp("run") / "model"
    chosen = settings("tiny", vocab_size=300, batch_size=16, num_layers=1)
    console = Console(quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_demo, "PROMPTS", ("Some words",))
        return folder, train_demo.train(chosen, [book], folder, None, console)


def _nll(model, ids, length):
    """Straight from the definition, piece by piece."""
    forward = nnx.jit(lambda model, tokens: jax.nn.log_softmax(model(tokens)))
    total = 0.0
    for at in range(0, len(ids), length):
        piece = ids[at : at + length]
        inputs = np.full((1, length), 1, np.int32)  # what comes after has no influence
        inputs[0, : len(piece)] = [2, *piece[:-1]]
        log_probs = np.asarray(forward(model, inputs))[0, : len(piece)]
        total -= np.take_along_axis(log_probs, piece[:, None], axis=1).sum()
    return total / len(ids)


def test_run_writes_a_pruned_model(run):
    folder, record = run
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "heldout.txt",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    ]
    assert list(folder.parent.iterdir()) == [folder]
    assert json.loads((folder / "training.json").read_text()) == json.loads(
        json.dumps(record)
    )
    model, tokenizer = opt.from_pretrained(
        folder, dtype=jnp.float32, sparse=False, fuse_qkv=False
    )
    layer = model.layers[0]
    attention = layer.self_attn
    for linear in (
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.out_proj,
        layer.fc1,
        layer.fc2,
    ):
        kernel = np.asarray(linear.kernel[...])
        assert np.count_nonzero(kernel == 0) == round(0.65 * kernel.size)
    assert record["sparsity"] == pytest.approx(0.65, abs=1e-3)
    assert record["nonzero_parameters"] < record["parameters"]

    excerpt = (folder / "heldout.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(excerpt, add_special_tokens=False).ids
    stated = record["held_out"]["excerpt"]
    assert len(ids) == stated["tokens"]
    loss = _nll(model, np.asarray(ids), model.config.max_positions)
    assert math.exp(loss) == pytest.approx(stated["pruned_perplexity"], rel=1e-4)
    assert tokenizer.encode("A word").ids[0] == 2


def test_training_lowers_the_loss(run):
    _, record = run
    dense = record["history"][0]["validation_loss"]
    assert dense[-1] < dense[0] < math.log(300)
    assert record["history"][1]["sparsity"] == [0.65, 0.65]


def test_run_without_pruning_writes_the_dense_model(book, tmp_path):
    import pruning_study
    import train_demo
    from demo_training.settings import settings
    from rich.console import Console

    chosen = settings("tiny", vocab_size=300, batch_size=16, num_layers=1, epochs=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_demo, "PROMPTS", ())
        record = train_demo.train(
            chosen, [book], tmp_path / "m", None, Console(quiet=True), prune=False
        )
    assert "pruned_perplexity" not in record
    assert record["dense_perplexity"] > 1
    assert record["sparsity"] == 0
    model, _ = opt.from_pretrained(tmp_path / "m", dtype=jnp.float32)
    assert np.count_nonzero(model.layers[0].fc1.kernel[...] == 0) == 0
    facts = pruning_study.training_facts(tmp_path / "m")
    assert facts["epochs"] == 1
    assert facts["texts"] == ["book"]


def test_tokenizer_and_model_never_see_held_out_text(book):
    from demo_training import text

    books = text.read_books([book], 0.015, 0.05)
    whole = text.clean(book.read_text(encoding="utf-8"))
    parts = books["book"]
    assert "\n\n".join([parts.train, parts.validation, parts.held_out]) == whole
    assert len(parts.held_out) == pytest.approx(0.05 * len(whole), rel=0.1)
    assert parts.validation


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (f"{'a ' * 30}\n{'b ' * 30}\nend.\n\n\nNext.", "wrapped"),
        (
            "ROMEO.\nO, she doth teach\nthe torches",
            "ROMEO.\nO, she doth teach\nthe torches",
        ),
        ("One. \u00b6 Two.", "One.\n\nTwo."),
        (f"{'x' * 200}\n {'y' * 200}\n", f"{'x' * 200}\n\n{'y' * 200}"),
        ("\ufeffan _italic_\r\nword", "an italic\nword"),
    ],
)
def test_clean(source, expected):
    from demo_training import text

    if expected == "wrapped":
        expected = f"{'a ' * 30}{'b ' * 30}end.\n\nNext."
    assert text.clean(source) == expected


def test_pieces_tokenize_as_the_whole(book):
    from demo_training import text

    content = text.clean(book.read_text(encoding="utf-8"))
    tokenizer = text.train_tokenizer([content], 300)
    ids = text.encode(tokenizer, content)
    assert len(content) > 20_000
    assert ids.tolist() == tokenizer.encode(content, add_special_tokens=False).ids
    assert tokenizer.decode(ids.tolist()) == content
    assert [tokenizer.token_to_id(t) for t in ("<pad>", "</s>", "<unk>")] == [1, 2, 3]


@pytest.fixture(scope="module")
def functions():
    from demo_training.model import ModelFunctions
    from demo_training.settings import TINY

    return ModelFunctions(TINY.model_config(), TINY.batch_size)


def test_training_forward_is_the_model(functions):
    params = functions.init(seed=3)
    ids = np.random.default_rng(0).integers(0, 512, (2, 9)).astype(np.int32)
    key = jax.random.key(0)
    forward = jax.jit(
        lambda params, rate: functions.training_logits(
            params, ids, jnp.float32, rate, key
        )
    )
    logits = forward(params, np.float32(0))
    expected = jax.jit(lambda p: functions.build(p, jnp.float32)(ids))(params)
    np.testing.assert_allclose(logits, expected, atol=2e-6)
    dropped = forward(params, np.float32(0.5))
    assert float(jnp.max(jnp.abs(dropped - expected))) > 1e-2


@pytest.mark.parametrize("tokens", [1, 700])
def test_negative_log_likelihood(functions, tokens):
    from demo_training.model import negative_log_likelihood

    params = functions.init(seed=1)
    ids = np.random.default_rng(tokens).integers(0, 512, tokens).astype(np.int32)
    loss = negative_log_likelihood(functions, params, jnp.asarray(ids), jnp.float32)
    expected = _nll(functions.build(params, jnp.float32), ids, 32)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_epoch_covers_the_text_once():
    from demo_training.training import Corpus

    ids = np.where(np.arange(1000) % 10 == 9, 7, 5).astype(np.int32)
    corpus = Corpus.create(ids, ids, newline=7)
    starts = corpus.epoch(50, np.random.default_rng(0))
    assert len(starts) == 19
    assert starts.min() >= 0
    assert starts.max() + 50 <= 1000
    # Each is where its share of the text starts, or at the start of that line.
    moved = starts % 10 == 0
    assert moved.any()
    assert len(set((starts[~moved] % 50).tolist())) <= 1


def test_cubic_sparsity():
    from demo_training.pruning import cubic_sparsity

    assert cubic_sparsity(0, 0.6) == 0
    assert cubic_sparsity(0.5, 0.8) == pytest.approx(0.7)
    assert cubic_sparsity(1, 0.6) == cubic_sparsity(9, 0.6) == pytest.approx(0.6)


def test_report(run, tmp_path):
    from demo_training import report

    folder, _ = run
    record = report.read_record(folder)
    report.plot(record, tmp_path / "images" / "curve.png")
    assert (tmp_path / "images" / "curve.png").read_bytes().startswith(b"\x89PNG")
    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs" / "demo-model.md").read_text(encoding="utf-8"))
    report.update_page(page, record)
    once = page.read_text(encoding="utf-8")
    report.update_page(page, record)
    assert page.read_text(encoding="utf-8") == once
    assert f"{record['pruned_perplexity']:.2f}" in once
    page.write_text("no marks")
    with pytest.raises(ValueError, match="expected the marks"):
        report.update_page(page, record)
    with pytest.raises(ValueError, match="expected the record"):
        report.read_record(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (
            ["--text", "BOOK", "--preset", "huge"],
            "expected a preset of demo, small, tiny",
        ),
        (["--text", "BOOK", "--no-prune", "--docs", "docs"], "--no-prune goes with"),
        (["--text", "BOOK", "--sparsity", "1.5"], r"sparsity must be in \[0, 1\)"),
        (["--text", "BOOK"], "expected text that yields 8192 tokenizer entries"),
        (["--text", "SHORT", "--preset", "tiny"], "expected a text of paragraphs"),
        (
            ["--text", "BOOK", "--preset", "tiny", "--out", "DOCS"],
            "only a model folder",
        ),
    ],
)
def test_bad_input_ends_in_one_error(book, tmp_path, arguments, message):
    import train_demo

    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "letter.txt").write_text("keep me")
    paths = {"BOOK": str(book), "SHORT": str(short), "DOCS": str(documents)}
    arguments = [paths.get(argument, argument) for argument in arguments]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "model")]
    result = invoke(train_demo.main, *arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    output = result.output.replace("\n", " ")
    assert re.search(message, output), result.output
    assert (documents / "letter.txt").read_text() == "keep me"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["documents", "short.txt"]
