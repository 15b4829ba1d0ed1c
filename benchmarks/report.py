"""Result files: figures together with where and when they were measured."""

import datetime
import json
import os
import pathlib
import platform
import re
import subprocess
from typing import Any

import jax

import flashjax as fj

RESULTS = pathlib.Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Device, driver, versions, commit and date."""
    device = jax.devices()[0]
    facts = {
        "device": device.device_kind if device.platform != "cpu" else _cpu_name(),
        "platform": device.platform,
        "driver": _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        ),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flashjax": fj.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    return {name: fact for name, fact in facts.items() if fact}


def save(name: str, content: dict[str, Any]) -> pathlib.Path:
    """Writes `results/NAME-DEVICE.json` and returns its path."""
    facts = environment()
    device = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    path = RESULTS / f"{name}-{device}.json"
    path.parent.mkdir(exist_ok=True)
    text = json.dumps({"environment": facts, **content}, indent=1)
    # One result a line.
    text = re.sub(r"\{\s+([^{}]*?)\s+\}", _on_one_line, text)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _on_one_line(match: re.Match) -> str:
    line = re.sub(r"\s*\n\s*", " ", match.group(1))
    return "{" + line + "}" if len(line) < 240 else match.group(0)


def _commit() -> str:
    folder = str(RESULTS.parent)
    # The variable is for a copy of the tree without its repository.
    commit = os.environ.get("FLASHJAX_COMMIT") or _output(
        "git", "-C", folder, "rev-parse", "--short", "HEAD"
    )
    changed = _output("git", "-C", folder, "status", "--porcelain", "-uno")
    return f"{commit} with changes" if commit and changed else commit


def _cpu_name() -> str:
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or "cpu"
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1) if found else platform.machine()


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""
