"""``python -m flashjax.cli``."""

from flashjax.cli.app import main

main()
