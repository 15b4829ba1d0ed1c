"""Commands, files and names in the pages exist."""

import importlib
import re
import tomllib

import doc_pages as pages
import pytest
import typer
from doc_pages import PAGES, ROOT

import flashjax as fj
from flashjax.cli.app import app
from flashjax.models import opt

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TARGETS = set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE))
FOLDERS = "benchmarks|bindings|cpu|cuda|docs|examples|flashjax|models|tests"


def commands():
    for page in PAGES:
        for words in pages.commands(page):
            yield pytest.param(words, id=f"{pages.name(page)}: {' '.join(words)[:60]}")


@pytest.mark.parametrize("words", list(commands()))
def test_command(words):
    program, *arguments = words
    if program == "flashjax":
        check_flashjax(typer.main.get_command(app), arguments)
    elif program == "make":
        check_make(arguments)
    elif program == "pip":
        extras = PROJECT["project"]["optional-dependencies"]
        for extra in re.findall(r"\[(.*?)\]", " ".join(arguments)):
            assert extra in extras
    elif re.fullmatch(r"python[\d.]*", program):
        if arguments[0] != "-m":
            check_script(arguments)
    else:
        assert (ROOT / program).is_file(), f"unknown command {program}"


def check_flashjax(command, arguments):
    """Parses the arguments as the command line does, without running it."""
    name = "flashjax"
    if arguments[0] in {option for p in command.params for option in p.opts}:
        return
    while hasattr(command, "commands"):
        name, *arguments = arguments
        assert name in command.commands, f"no command {name}"
        command = command.commands[name]
    command.make_context(name, list(arguments))


def check_make(arguments):
    for argument in arguments:
        variable, assigned, value = argument.partition("=")
        if not assigned:
            assert argument in TARGETS
            continue
        assert re.search(rf"\b{variable}\b", MAKEFILE), f"make knows no {variable}"
        for path in re.findall(rf"\b(?:{FOLDERS})/[\w/.-]+", value):
            assert (ROOT / path).exists()


def check_script(arguments):
    script, *options = arguments
    text = (ROOT / script).read_text(encoding="utf-8")
    for option in options:
        if option.startswith("--"):
            names = (option, option[2:].replace("-", "_"))
            assert any(re.search(rf"\b{n}\b|{n}\b", text) for n in names), option


@pytest.mark.parametrize("page", PAGES, ids=pages.name)
def test_named_files_and_objects_exist(page):
    code = re.findall(
        r"`([^`\n]+)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    )
    for name in code:
        path = re.fullmatch(rf"(?:{FOLDERS})/[\w/.-]+", name)
        if path and "results" not in name:
            assert (ROOT / name).exists(), f"no file {name}"
        if re.fullmatch(r"(fj|flashjax|opt)(\.\w+)+(\(\))?", name):
            check_object(name.removesuffix("()"))


def check_object(name):
    first, *rest = name.split(".")
    value = {"fj": fj, "flashjax": fj, "opt": opt}[first]
    path = value.__name__
    for part in rest:
        path = f"{path}.{part}"
        if not hasattr(value, part):
            importlib.import_module(path)
        value = getattr(value, part)


@pytest.mark.parametrize("page", PAGES, ids=pages.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"no file {target}"


def test_reference_is_complete():
    """Every public name has its place in docs/api."""
    text = "\n".join(p.read_text() for p in (ROOT / "docs" / "api").glob("*.md"))
    documented = set(re.findall(r"^::: ([\w.]+)", text, re.MULTILINE))
    expected = {f"flashjax.{name}" for name in fj.__all__ if not name.startswith("_")}
    expected |= {f"flashjax.models.opt.{name}" for name in opt.__all__}
    # Modules that are documented by their parts, and parts by their modules.
    expected -= {"flashjax.nn", "flashjax.linen", "flashjax.CheckpointError"}
    expected -= {"flashjax.models.opt.generate"}
    expected |= {"flashjax.models.opt.generate.generate", "flashjax.linen.SparseDense"}
    assert expected <= documented
