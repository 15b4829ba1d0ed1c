"""The progress bar of long commands, on stderr."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextlib.contextmanager
def progress_bar(
    *, disable: bool, transient: bool = False
) -> Iterator[Callable[[str, int, int], None]]:
    """Shows a bar with the time left from the first call of what it yields.

    Not before, so that errors of the input come alone; and on a terminal alone, since
    what is piped to a file would only say that the bar has come to its end.

    Args:
      disable: show nothing.
      transient: take it away at the end.

    Yields:
      A function of what is being done, how much is done and how much there is.
    """
    columns = (
        TextColumn("[progress.percentage]{task.percentage:>3.0f}%"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    console = Console(stderr=True)
    disable = disable or not console.is_terminal
    bar = Progress(*columns, console=console, disable=disable, transient=transient)
    task = bar.add_task("", start=False, total=None)

    def advance(what: str, done: int, total: int) -> None:
        if not bar.live.is_started:
            bar.start()
            bar.start_task(task)
        bar.update(task, completed=done, total=total, description=escape(what))

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()


@contextlib.contextmanager
def reading_weights(*, disable: bool) -> Iterator[Callable[[int, int], None]]:
    """The bar of `opt.from_pretrained(progress=)`."""
    with progress_bar(disable=disable, transient=True) as advance:
        yield lambda done, total: advance("reading weights", done, total)
