"""``python -m flashjax.cli``."""

from flashjax.cli.app import entry_point

entry_point()
