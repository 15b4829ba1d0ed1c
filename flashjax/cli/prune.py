"""``flashjax prune``."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from flashjax.cli.report import format_bytes
from flashjax.models.opt.pruning import prune_pretrained


def run(
    folder: str,
    out: Path,
    *,
    sparsity: float,
    method: str,
    dtype: str,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Prunes a model folder and prints what came of it.

    The arguments are those of prune_pretrained(); quiet prints nothing.
    """
    columns = (
        TextColumn("[progress.percentage]{task.percentage:>3.0f}%"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    bar = Progress(*columns, console=Console(stderr=True), disable=quiet)
    task = bar.add_task("", total=None)

    def progress(name: str, done: int, total: int) -> None:
        if not done:
            bar.start()  # not before, so that errors of the input come alone
        name = name.removeprefix("model.decoder.")
        bar.update(task, completed=done, total=total, description=escape(name))

    try:
        result = prune_pretrained(
            folder,
            out,
            sparsity=sparsity,
            method=method,
            dtype=dtype,
            overwrite=overwrite,
            progress=progress,
        )
    finally:
        if bar.live.is_started:
            bar.stop()
    if quiet:
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{escape(str(out))}: {result.matrices} matrices pruned to "
        f"{result.sparsity:.1%} zeros; all weights {format_bytes(result.stored_bytes)}"
        f", {format_bytes(result.dense_bytes)} if they were dense {dtype}"
    )
