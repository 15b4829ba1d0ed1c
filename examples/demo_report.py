"""Writes the figures of a trained demo model into the documentation.

    python examples/demo_report.py examples/demo-opt --docs docs

Takes everything from the folder's training.json: the tables of demo-model.md and the
loss curve.
"""

from pathlib import Path
from typing import Annotated

import typer
from demo_training import report

HERE = Path(__file__).resolve().parent


def main(
    folder: Annotated[Path, typer.Argument(help="Model folder.")] = HERE / "demo-opt",
    docs: Annotated[
        Path, typer.Option(help="Folder of demo-model.md and images.")
    ] = HERE.parent / "docs",
) -> None:
    """Writes the figures of a trained demo model into the documentation."""
    try:
        record = report.read_record(folder)
        report.plot(record, docs / "images" / "demo-loss.png")
        report.update_page(docs / "demo-model.md", record)
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
