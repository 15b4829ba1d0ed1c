"""The command line as a whole."""

import errno
import os
import subprocess
import sys

import jax
import pytest
import typer
from cli_support import run_process

import flashjax as fj
from flashjax.cli.errors import describe, reported


def test_version(cli):
    assert cli("--version").out == f"flashjax {fj.__version__}\n"


def test_is_a_module_to_run():
    command = [sys.executable, "-m", "flashjax", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"flashjax {fj.__version__}\n"


COMMANDS = ["", "generate", "prune", "eval", "info", "bench", "bench generate"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help(cli, command):
    result = cli(*command.split(), "--help")
    assert result.code == 0
    assert "Usage: flashjax" in result.out


@pytest.mark.parametrize(
    ("command", "default"),
    [
        ("generate", "the model's, or 64"),
        ("prune", "0.6"),
        ("eval", "the model's, at most 2048"),
        ("info", "all positions"),
        ("bench generate", "--dtype"),
    ],
)
def test_help_says_what_an_option_is_without_a_value(
    cli, command, default, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    assert f"[default: ({default})]" in cli(*command.split(), "--help").out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("flashjax ge", {"generate"}),
        ("flashjax prune --me", {"--method"}),
        ("flashjax prune --method spa", {"sparsegpt"}),
    ],
)
def test_shell_completion(words, expected):
    variables = {
        "_FLASHJAX_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    result = run_process(env=os.environ | variables)
    assert set(result.stdout.split()) == expected, result.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_of_shells_that_show_help(shell):
    variables = {
        "_FLASHJAX_COMPLETE": f"complete_{shell}",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        "_TYPER_COMPLETE_ARGS": "flashjax ge",
    }
    result = run_process(env=os.environ | variables)
    assert "generate" in result.stdout, result.stderr
    assert "Continue prompts" in result.stdout
    assert "prune" not in result.stdout


@pytest.mark.parametrize("module", ["flashjax", "flashjax.cli"])
@pytest.mark.parametrize("code", [1, 130, 143])
def test_a_process_ends_at_once_after_a_signal(module, code):
    """What was printed comes out; what else runs at an exit is left out."""
    script = f"""
import atexit, runpy, sys
import flashjax.cli
def end():
    print("text", end="")
    sys.exit({code})
sys.modules["flashjax.cli.app"].main = end
atexit.register(print, "; an orderly exit", end="")
runpy.run_module("{module}", run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (code, "")
    assert done.stdout == ("text; an orderly exit" if code == 1 else "text")


def test_help_loads_no_jax():
    code = """
import sys
from flashjax import cli
sys.argv = ["flashjax", "--help"]
try:
    cli.main()
finally:
    assert not {"jax", "flax", "numpy"} & set(sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["nonsense"],
        ["generate"],
        ["generate", "x", "--batch", "two"],
        ["generate", "x", "--batch", "0"],
        ["prune", "x"],
        ["eval", "x", "--text", "x", "--window", "1"],
        ["eval", "x", "--text", "x", "--stride", "0"],
        ["info", "--config", "opt-125m", "-s", "2"],
        ["info", "--config", "opt-125m", "--length", "0"],
        ["info", "--config", "opt-125m", "--prompt", "0"],
        ["bench", "generate", "--dtype", "foo"],
        ["bench", "generate", "--cache-dtype", "int8"],
    ],
)
def test_usage_errors(cli, args):
    result = cli(*args)
    assert result.code == 2
    assert "Traceback" not in result.err


def test_process(tmp_path):
    result = run_process("info", tmp_path / "nothing")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("flashjax: error: ")
    assert "expected a model folder, got nothing" in result.stderr


def test_debug_shows_the_traceback(cli, tmp_path):
    from flashjax.checkpoint import CheckpointError

    with pytest.raises(CheckpointError):
        cli("info", tmp_path / "nothing", "--debug")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("one\n  two"), "one two"),
        (OSError(errno.EACCES, "Permission denied", "x"), "x: Permission denied"),
        (MemoryError(), "out of memory"),
        (KeyError("x"), "KeyError: 'x' (--debug shows where)"),
        (RuntimeError("x"), "RuntimeError: x (--debug shows where)"),
        (FloatingPointError("logits are NaN"), "logits are NaN"),
        (ValueError(), "ValueError:  (--debug shows where)"),
        (ValueError("(overwrite replaces it)"), "(--overwrite replaces it)"),
        (ValueError("(--overwrite replaces it)"), "(--overwrite replaces it)"),
        (
            ValueError("(resume goes on with it, overwrite starts again)"),
            "(--resume goes on with it, --overwrite starts again)",
        ),
        (ValueError("go on by resume"), "go on by --resume"),
    ],
)
def test_describe(error, text):
    assert describe(error) == text


@pytest.mark.parametrize("platforms", ["cuda", ""])
@pytest.mark.parametrize("starts", [False, True])
def test_jax_that_does_not_start(monkeypatch, platforms, starts):
    def fail():
        raise AssertionError

    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    if not starts:
        monkeypatch.setattr(jax, "devices", fail)
    found = "JAX found no device with JAX_PLATFORMS=cuda: AssertionError"
    expected = found if platforms and not starts else "AssertionError: "
    assert describe(AssertionError()) == f"{expected} (--debug shows where)"


@pytest.mark.skipif(fj.cuda_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["generate", "eval", "prune", "bench"])
def test_no_gpu_where_one_was_asked_for(sparse_folder, tmp_path, command):
    text = tmp_path / "text"
    text.write_text("hello " * 50)
    args = {
        "generate": ["generate", sparse_folder, "-p", "hello", "-n", 4],
        "eval": ["eval", sparse_folder, "--text", text],
        "prune": ["prune", sparse_folder, tmp_path / "out", "--method", "wanda"],
        "bench": ["bench", "generate", "--layers", 1, "--out", tmp_path],
    }[command]
    result = run_process(*args, env=os.environ | {"JAX_PLATFORMS": "cuda"})
    assert result.returncode == 1
    message = "JAX found no device with JAX_PLATFORMS=cuda: AssertionError"
    assert result.stderr == f"flashjax: error: {message} (--debug shows where)\n"


@pytest.mark.parametrize(
    ("args", "closed", "message"),
    [
        ("info", ">&-", "expected an open standard output"),
        ("generate model -f -", "<&-", "--file: expected an open standard input"),
    ],
)
def test_closed_standard_files(args, closed, message):
    command = f"{sys.executable} -m flashjax.cli {args} {closed}"
    result = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr.startswith(f"flashjax: error: {message}"), result.stderr
    assert len(result.stderr.splitlines()) == 1


class PanicException(BaseException):
    """What Rust's panics are in Python, by name."""


def test_a_panic_is_an_error():
    @reported
    def command():
        raise PanicException("no entry found")

    with pytest.raises(typer.Exit) as ended:
        command()
    assert ended.value.exit_code == 1


@pytest.mark.parametrize("kind", [SystemExit, GeneratorExit])
def test_what_is_no_error_goes_through(kind):
    @reported
    def command():
        raise kind

    with pytest.raises(kind):
        command()


@pytest.mark.parametrize("form", ["", "--json"])
def test_exit_code_when_the_reader_has_gone(sparse_folder, form):
    command = f"{sys.executable} -m flashjax.cli info {sparse_folder} {form}"
    result = subprocess.run(
        ["bash", "-c", command + " | true; exit ${PIPESTATUS[0]}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (141, "")


def test_reader_that_goes_away(sparse_folder):
    command = (
        f"{sys.executable} -m flashjax.cli info {sparse_folder} --json | head -c 1"
    )
    result = subprocess.run(
        ["bash", "-c", f"{command} | head -c 1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "{"
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("given", [None, "0"])
def test_warnings_of_xla_are_left_out(cli, monkeypatch, given):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", given or "")
    if given is None:
        monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL")
    assert cli("info", "nothing").code == 1
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == (given or "2")


@pytest.mark.parametrize(
    ("args", "given", "expected"),
    [
        ([], None, "{home}/flashjax/jax"),
        (["--no-cache"], None, None),
        (["--no-cache"], "elsewhere", None),
        ([], "elsewhere", "elsewhere"),
    ],
)
def test_compiled_programs_are_kept(cli, monkeypatch, tmp_path, args, given, expected):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", given or "")
    if given is None:
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    assert cli(*args, "info", tmp_path / "nothing").code == 1
    found = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    assert found == (expected and expected.format(home=tmp_path))
