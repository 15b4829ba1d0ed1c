"""Where and when figures were measured."""

import contextlib
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Device, driver, versions, commit, date.

    Also XLA's variables where they are set, and how many matrices `flashjax.autotune`
    timed on such a device. What is unknown is left out.
    """
    import jax

    import flashjax as fj
    from flashjax import tuned_rows
    from flashjax.devices import device_name

    device = jax.devices()[0]
    cpu = device.platform == "cpu"
    facts = {
        "device": device_name(device)[5:-1] if cpu else device.device_kind,
        "platform": device.platform,
        "driver": _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        ),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "plugin": "" if cpu else _plugins(),
        "flashjax": fj.__version__,
        "tuned": len(tuned_rows.known(tuned_rows.device_kind(device.platform))),
        "commit": _commit(),
        "variables": " ".join(
            f"{name}={value}"
            for name, value in sorted(os.environ.items())
            if name.startswith("XLA_")
        ),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    return {name: fact for name, fact in facts.items() if fact}


def results_path(folder: Path, name: str, device: str) -> Path:
    """`NAME-DEVICE.json` in the folder."""
    stem = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return folder / f"{name}-{stem}.json"


def save_results(folder: Path, name: str, content: dict[str, Any]) -> Path:
    """Writes `NAME-DEVICE.json` with the environment and returns its path."""
    facts = environment()
    path = results_path(folder, name, facts["device"])
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": facts, **content}, indent=1)
    # One result a line.
    text = re.sub(r"\{\s+([^{}]*?)\s+\}", _on_one_line, text)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _on_one_line(match: re.Match[str]) -> str:
    line = re.sub(r"\s*\n\s*", " ", match.group(1))
    return "{" + line + "}" if len(line) < 480 else match.group(0)


def _plugins() -> str:
    """What lets JAX use CUDA 12 or 13, with its version."""
    found = []
    for name in ("jax-cuda12-plugin", "jax-cuda13-plugin"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


@functools.cache  # results that are written make the folder look changed
def _commit() -> str:
    folder = str(Path(__file__).resolve().parent)
    # The variable is for a copy of the tree without its repository.
    if given := os.environ.get("FLASHJAX_COMMIT"):
        return given
    commit = _output("git", "-C", folder, "rev-parse", "--short", "HEAD")
    changed = _output("git", "-C", folder, "status", "--porcelain", "-uno")
    return f"{commit} with changes" if commit and changed else commit


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""
