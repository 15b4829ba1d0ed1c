"""Result files: figures together with where and when they were measured."""

import json
import os
import pathlib
from typing import Any

from flashjax.cli.environment import environment, results_path, save_results

# What flashjax.autotune has kept on this machine would change what is measured.
os.environ["FLASHJAX_TUNING"] = ""

RESULTS = pathlib.Path(__file__).parent / "results"


def load(name: str) -> dict[str, Any]:
    """What this device's `results/NAME-DEVICE.json` has; nothing if there is none."""
    path = results_path(RESULTS, name, environment()["device"])
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def save(name: str, content: dict[str, Any]) -> pathlib.Path:
    """Writes `results/NAME-DEVICE.json` and returns its path."""
    return save_results(RESULTS, name, content)
