"""What the tests of examples/ share."""

from pathlib import Path

import typer
from typer.testing import CliRunner

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def invoke(main, *arguments):
    """Runs a script's main function as its command line does."""
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
