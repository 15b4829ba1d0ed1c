"""A process that is killed while it saves leaves the old model or the new one."""

import os
import subprocess
import sys
from pathlib import Path

SAVER = Path(__file__).with_name("killed_saver.py")


def run(mode: str, folder: Path, count: int) -> int:
    """Runs the saver; returns how many of its processes were killed."""
    command = [sys.executable, str(SAVER), mode, str(folder), str(count)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_killed_at_every_call_of_the_system(tmp_path):
    killed = run("calls", tmp_path / "model", 1000)
    # It ended because a process came to its end, after some tens of calls.
    assert 20 < killed < 1000


def test_killed_at_any_moment(tmp_path):
    assert run("moments", tmp_path / "model", 40) == 40
