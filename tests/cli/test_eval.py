"""``flashjax eval``."""

import json
import shutil

import jax.numpy as jnp
import pytest
from cli_support import assert_error

from flashjax.models import opt
from flashjax.models.opt.evaluation import perplexity

TEXT = "It is a truth universally acknowledged, that a single man " * 5


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def expected(folder, dtype=jnp.float16, **options):
    model, tokenizer = opt.from_pretrained(folder, dtype=dtype)
    return perplexity(model, tokenizer.encode(TEXT).ids, **options)


def test_eval(cli, sparse_folder, text):
    result = cli("eval", sparse_folder, "--text", text)
    found = expected(sparse_folder)
    assert result.code == 0, result.err
    assert f"perplexity {found.perplexity:.4f}" in result.out
    assert f"in {found.windows} windows of 64, stride 64, float16" in result.out
    assert result.err == ""


def test_json(cli, sparse_folder, text):
    options = ("--window", 32, "--stride", 20, "--json", "--quiet")
    result = cli("eval", sparse_folder, "--text", text, *options)
    content = json.loads(result.out)
    found = expected(sparse_folder, window=32, stride=20)
    assert content["perplexity"] == found.perplexity
    assert (content["window"], content["stride"]) == (32, 20)
    assert content["tokens"] == content["predicted"] + 1
    assert result.err == ""


def test_quiet(cli, dense_folder, text):
    result = cli("eval", dense_folder, "--text", text, "--dtype", "float32", "-q")
    found = expected(dense_folder, dtype=jnp.float32)
    assert float(result.out) == pytest.approx(found.perplexity, abs=1e-3)
    assert len(result.out.splitlines()) == 1
    assert result.err == ""


@pytest.mark.parametrize(
    ("content", "options", "messages"),
    [
        (None, [], ["No such file"]),
        (b" \n", [], ["expected text, got nothing but white space"]),
        (b"\xff", [], ["expected UTF-8 text, got byte 0xff at 0"]),
        (b"hello", ["--window", 65], ["window", "64 positions, got 65"]),
        (b"hello", ["--window", 8, "--stride", 9], ["stride", "got 9"]),
    ],
)
def test_errors(cli, sparse_folder, tmp_path, content, options, messages):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert_error(cli("eval", sparse_folder, "--text", path, *options), *messages)


def test_no_tokenizer(cli, sparse_folder, text, tmp_path, monkeypatch):
    monkeypatch.setattr(opt, "from_pretrained", None)  # not reached
    folder = shutil.copytree(sparse_folder, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    assert_error(cli("eval", folder, "--text", text), "expected a tokenizer.json")


def test_bad_folders(cli, bad_folder, text):
    folder, message = bad_folder
    assert_error(cli("eval", folder, "--text", text), message)
