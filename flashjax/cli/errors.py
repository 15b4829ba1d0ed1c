"""How errors end a command: one line, an exit code, no traceback."""

import errno
import functools
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

import typer

from flashjax.cli.signals import arrived
from flashjax.rust_panic import is_panic

EXIT_ERROR = 1
EXIT_USAGE = 2  # what typer ends with at an option that it does not know
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
EXIT_TERMINATED = 143

# Where messages of the Python API name options, which are flags here.
_OPTIONS = re.compile(
    r"(?<!-)\b(?:overwrite|resume)(?= (?:replaces|starts|goes on))|(?<=by )resume\b"
)


class UsageError(ValueError):
    """A command line that is wrong whatever the files are that it names."""


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Ends a command that fails with one line on stderr.

    With debug=True among the command's arguments the error goes through.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            if sys.stdout is None:  # and the next file to be opened would be it
                raise ValueError("expected an open standard output, got a closed one")
            command(*args, **kwargs)
            sys.stdout.flush()
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except BaseException as error:
            number = arrived()
            if number == signal.SIGTERM:
                raise typer.Exit(EXIT_TERMINATED) from None
            if number == signal.SIGINT or isinstance(error, KeyboardInterrupt):
                typer.echo("flashjax: interrupted", err=True)
                raise typer.Exit(EXIT_INTERRUPTED) from None
            if _is_broken_pipe(error):
                # The reader of our output has gone; nothing is left to say to it.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(EXIT_BROKEN_PIPE) from None
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            if kwargs.get("debug"):
                raise
            typer.echo(f"flashjax: error: {describe(error)}", err=True)
            usage = isinstance(error, UsageError)
            raise typer.Exit(EXIT_USAGE if usage else EXIT_ERROR) from None

    return run


def _is_broken_pipe(error: BaseException | None) -> bool:
    if isinstance(error, SystemExit):  # which rich makes of it
        error = error.__context__
    return isinstance(error, OSError) and error.errno == errno.EPIPE


def describe(error: BaseException, *, hint: bool = True) -> str:
    """One line for an error, naming its type where the message alone says little.

    Args:
      error: what was raised.
      hint: name --debug beside the type.
    """
    debug = " (--debug shows where)" if hint else ""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = _OPTIONS.sub(r"--\g<0>", " ".join(lines))
    if isinstance(error, MemoryError):
        return f"out of memory: {text}" if text else "out of memory"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    platforms = os.environ.get("JAX_PLATFORMS")
    if not text and platforms and not _has_backend():
        kind = type(error).__name__
        return f"JAX found no device with JAX_PLATFORMS={platforms}: {kind}{debug}"
    if isinstance(error, KeyError) or not text:
        return f"{type(error).__name__}: {text}{debug}"
    expected: tuple[type[BaseException], ...] = (
        ValueError,
        OSError,
        TypeError,
        NotImplementedError,
        ImportError,
        FloatingPointError,
    )
    if isinstance(error, expected):
        return text
    return f"{type(error).__name__}: {text}{debug}"


def _has_backend() -> bool:
    """Whether JAX starts; an error's traceback has lost the frames that would say."""
    import jax

    try:
        jax.devices()
    except Exception:
        return False
    return True
