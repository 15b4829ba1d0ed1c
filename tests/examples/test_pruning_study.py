"""The study of pruning, end to end on a tiny model, and its report."""

import json
from pathlib import Path

import example_support
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flashjax.models import opt
from flashjax.models.opt.evaluation import perplexity

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdeimnorst"), 4)) for _ in range(60)]
    paragraphs = [" ".join(rng.choice(words, 40)) + "." for _ in range(200)]
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(book, tmp_path_factory):
    """A random model of 16 positions; its tokenizer has seen the text."""
    from demo_training import text

    tokenizer = text.train_tokenizer([text.clean(book.read_text())], 300)
    config = opt.OPTConfig(
        vocab_size=300,
        hidden_size=16,
        num_layers=1,
        ffn_size=32,
        num_heads=2,
        max_positions=16,
    )
    folder = tmp_path_factory.mktemp("model") / "dense"
    made = opt.OPT(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    opt.save_pretrained(made, tokenizer, folder)
    return folder


def invoke(*arguments):
    import pruning_study

    return example_support.invoke(pruning_study.main, *arguments)


@pytest.fixture(scope="module")
def finished(book, model, tmp_path_factory):
    """Folder and arguments of a study that has run."""
    folder = tmp_path_factory.mktemp("study")
    docs = folder / "docs"
    docs.mkdir()
    page = (ROOT / "docs" / "pruning.md").read_text(encoding="utf-8")
    (docs / "pruning.md").write_text(page, encoding="utf-8")
    arguments = ["--model", model, "--text", book, "--docs", docs, "--quiet"]
    arguments += ["--results", folder / "results", "--work", folder / "work"]
    arguments += ["--method", "magnitude", "--method", "sparsegpt", "--samples", 8]
    arguments += ["--sparsity", 0.4, "--sparsity", 0.6, "--held-out", 1000]
    arguments += ["--fine-tune-method", "magnitude", "--fine-tune-sparsity", 0.8]
    arguments += ["--fine-tune-steps", 3, "--batch", 2]
    done = invoke(*arguments)
    assert done.exit_code == 0, done.output
    return folder, arguments


def test_study_measures_every_cell(finished, book, model):
    folder, _ = finished
    (path,) = (folder / "results").iterdir()
    assert path.name.startswith("pruning-study-")
    record = json.loads(path.read_text())
    assert record["environment"]["jax"]
    rows = record["rows"]
    # dense, uniform, OWL, patterns, fine-tuned: control, masked, sparse
    assert len(rows) == 1 + 2 * 2 + 2 * 1 + 2 * 2 + 1 + 1 + 1
    assert all(row["perplexity"] > 1 for row in rows)
    for row in rows:
        expected = 0.5 if row["pattern"] else row["sparsity"]
        assert row["zeros"] == pytest.approx(expected, abs=0.02)
        assert (row["error"] is None) == (row["method"] in ("dense", "magnitude"))
    # The dense row is what `flashjax eval` says of the held-out text.
    from demo_training import text

    loaded, tokenizer = opt.from_pretrained(model, dtype=jnp.float32, sparse=False)
    held_out = text.excerpt(text.read_books([book], 0.015, 0.05), 1000)
    ids = np.asarray(tokenizer.encode(held_out).ids, np.int32)
    assert rows[0]["perplexity"] == pytest.approx(
        perplexity(loaded, ids).perplexity, abs=1e-4
    )


def test_fine_tuning_trains_and_keeps_zeros(finished):
    folder, _ = finished
    (path,) = (folder / "results").iterdir()
    rows = json.loads(path.read_text())["rows"]
    dense = rows[0]["perplexity"]
    tuned = {(r["tuning"], r["sparsity"]): r for r in rows if r["steps"]}
    assert tuned["dense", 0.0]["perplexity"] < dense
    masked, sparse = tuned["masked", 0.8], tuned["sparse", 0.8]
    assert masked["zeros"] == sparse["zeros"] == pytest.approx(0.8, abs=0.01)
    assert sparse["perplexity"] == pytest.approx(masked["perplexity"], rel=0.01)


def test_second_run_takes_what_is_known(finished):
    folder, arguments = finished
    page = (folder / "docs" / "pruning.md").read_text(encoding="utf-8")
    rows = (folder / "work" / "rows.json").stat().st_mtime_ns
    assert (folder / "docs" / "images" / "pruning-study.png").read_bytes()[1:4] == (
        b"PNG"
    )
    again = invoke(*arguments)
    assert again.exit_code == 0, again.output
    assert (folder / "work" / "rows.json").stat().st_mtime_ns == rows
    lines = (folder / "docs" / "pruning.md").read_text(encoding="utf-8").splitlines()
    # The date may differ.
    assert [line for line in lines if "jax" not in line] == [
        line for line in page.splitlines() if "jax" not in line
    ]
    known = invoke(*arguments, "--sparsity", 0.7, "--report-only")
    assert known.exit_code == 0, known.output
    text = (folder / "docs" / "pruning.md").read_text(encoding="utf-8")
    assert "4 models have not been measured yet" in text
    other = invoke(*arguments, "--seed", 1)
    assert other.exit_code == 1
    assert "expected a study of the same seed" in other.output


def test_report_says_where_papers_fail():
    from study.report import page

    def row(method, perplexity, sparsity=0.6, **others):
        fixed = {"budget": "uniform", "pattern": None, "tuning": "none", "steps": 0}
        content = {"method": method, "sparsity": sparsity, "perplexity": perplexity}
        return fixed | content | {"zeros": sparsity} | others

    rows = [
        row("dense", 10.0, 0.0),
        row("wanda", 12.0),
        row("sparsegpt", 13.0),
        row("alps", 12.99),
        row("alps", 11.0, budget="owl"),
    ]
    model = {
        "layers": 1,
        "width": 2,
        "positions": 3,
        "vocabulary": 4,
        "prunable_weights": 5,
        "zeros_before": 0,
        "held_out_tokens": 6,
        "calibration_tokens": 7,
    }
    text = page(
        {
            "settings": {"samples": 1, "seed": 0},
            "environment": {"device": "CPU", "jax": "1", "date": "today"},
            "training": {},
            "missing": 0,
            "model": model,
            "rows": rows,
        }
    )
    assert "`alps` with OWL budgets, 11.00 (+10.0% over dense)" in text
    assert "Not here: `sparsegpt` is worse than `wanda` at 60%." in text
    assert "Equal within 0.5%: `alps` and `sparsegpt` at 60%." in text
    assert "uniform budgets: `alps` -15.3% at 60%." in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--method", "best"], "expected a method of magnitude, wanda"),
        (["--sparsity", 1.5], r"expected a sparsity in (0, 1), got 1.5"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_ends_in_one_error(book, model, tmp_path, changes, message):
    arguments = ["--text", book, "--model", model, "--work", tmp_path / "work"]
    result = invoke(*arguments, *changes)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert message in result.output.replace("\n", " ")
    assert not (tmp_path / "work").exists()
