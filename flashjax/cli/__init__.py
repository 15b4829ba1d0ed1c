"""The command line ``flashjax``: generate, prune, eval, info, bench.

Only typer is imported before a command runs, so that --help is fast.
"""

from flashjax.cli.app import app, entry_point, main

__all__ = ["app", "entry_point", "main"]
