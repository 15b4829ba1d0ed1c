"""Progress on a terminal: bars that vanish, and lines that stay."""

import contextlib
import math
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from .training import Record

# Lines that a phase leaves behind.
_LINES = 10


@contextlib.contextmanager
def phase_progress(
    console: Console, name: str, steps: int, epochs: int
) -> Iterator[tuple[Callable[[int], None], Callable[[Record], None]]]:
    """Shows how far a phase is; no bar is drawn into a pipe or file.

    Args:
      console: where to.
      name: of the phase.
      steps: optimizer steps of the phase.
      epochs: of the phase.

    Yields:
      The callbacks `advance(steps)` and `report(record)` of `run_phase`.
    """
    bar = Progress(
        TextColumn(name),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    every = max(1, epochs // _LINES)

    def report(record: Record) -> None:
        if record.epoch % every and record.epoch != epochs:
            return
        console.print(
            f"{name}: epoch {record.epoch}/{epochs}, perplexity in training "
            f"{math.exp(record.train_loss):.2f}, on validation text "
            f"{math.exp(record.validation_loss):.2f}, zeros {record.sparsity:.1%}",
            highlight=False,
        )

    with bar:
        task = bar.add_task(name, total=steps)
        yield lambda done: bar.update(task, advance=done), report
