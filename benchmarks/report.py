"""Result files: figures together with where and when they were measured."""

import pathlib
from typing import Any

from flashjax.cli.environment import save_results

RESULTS = pathlib.Path(__file__).parent / "results"


def save(name: str, content: dict[str, Any]) -> pathlib.Path:
    """Writes `results/NAME-DEVICE.json` and returns its path."""
    return save_results(RESULTS, name, content)
