"""The command lines of the pages run, each page's in their order.

Where pages name published models there are folders with tiny ones.
"""

import json
import shutil

import doc_pages as pages
import pytest
from typer.testing import CliRunner

from flashjax.cli.app import app

MODELS = ("facebook/opt-1.3b", "opt-1.3b", "opt-125m", "MODEL", "opt-1.3b-60", "opt-60")
# What writes into a reader's shell, and a model of a published size without a name.
LEFT_OUT = (["--install-completion"], ["--show-completion"], ["bench", "generate"])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    pages.save_models(tmp_path, MODELS)
    (tmp_path / "test.txt").write_text("It was the best of times. " * 20)
    lines = [json.dumps({"prompt": text}) for text in ("It is", "A house")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flashjax_commands(page):
    for words in pages.commands(page):
        program, *arguments = words
        if program == "flashjax" and arguments not in LEFT_OUT:
            yield arguments


@pytest.mark.parametrize(
    "page", [p for p in pages.PAGES if list(flashjax_commands(p))], ids=pages.name
)
def test_commands_of(page, folder):
    for arguments in flashjax_commands(page):
        if arguments[0] == "prune":  # the page makes it
            shutil.rmtree(folder / arguments[2], ignore_errors=True)
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, (arguments, result.output, result.exception)
