"""How errors end a command: one line, an exit code, no traceback."""

import errno
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Ends a command that fails with one line on stderr.

    With debug=True among the command's arguments the error goes through.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            typer.echo("flashjax: interrupted", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                # The reader of our output has gone; nothing is left to say to it.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(EXIT_BROKEN_PIPE) from None
            if kwargs.get("debug"):
                raise
            typer.echo(f"flashjax: error: {describe(error)}", err=True)
            raise typer.Exit(EXIT_ERROR) from None

    return run


def describe(error: Exception) -> str:
    """One line for an error, naming its type where the message alone says little."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines)
    if isinstance(error, MemoryError):
        return f"out of memory: {text}" if text else "out of memory"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, KeyError) or not text:
        return f"{type(error).__name__}: {text} (--debug shows where)"
    expected = ValueError, OSError, TypeError, NotImplementedError, ImportError
    if isinstance(error, expected):
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"
