"""Forks processes that overwrite a model again and again, and kills them.

Usage: killed_saver.py calls|moments FOLDER COUNT. After each kill the folder must hold
what one of the saves wrote, whole. Prints the number of kills.

It is a program of its own, in which no backend of JAX runs, because only then a process
can be forked.
"""

import itertools
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np

from flashjax.checkpoint import CheckpointReader, CheckpointWriter, atomic_folder

# What says that a call of the system follows.
AUDITED = ("open", "os.", "shutil.", "ctypes.")


def save(target: Path, version: int) -> None:
    weight = np.full((48, 64), version, np.float16)
    weight[::2] = 0
    with (
        atomic_folder(target, overwrite=True) as folder,
        CheckpointWriter(folder, shard_bytes=1000) as writer,
    ):
        for name in "abc":
            writer.add_sparse(name, weight)
            writer.add(f"{name}.bias", np.full(64, version, np.float32))
        writer.close()


def check(target: Path) -> int:
    """Returns the version that all tensors have."""
    with CheckpointReader(target) as reader:
        assert len(reader.names()) == 6, reader.names()
        found = {float(reader.load(name).max()) for name in reader.names()}
    (version,) = found
    return int(version)


def fork(work) -> int:
    with warnings.catch_warnings(action="ignore"):
        child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def was_killed(child: int) -> bool:
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def kill_at_call(target: Path, version: int, number: int) -> bool:
    """Saves and is killed before the numbered call; False if there are fewer."""
    count = itertools.count(1)

    def hook(event, args):
        if event.startswith(AUDITED) and next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def work():
        sys.addaudithook(hook)
        save(target, version)

    return was_killed(fork(work))


def kill_after(target: Path, seconds: float) -> bool:
    def work():
        for version in itertools.count(1):
            save(target, version % 1000 + 1)

    child = fork(work)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return was_killed(child)


def main() -> None:
    mode, target, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    save(target, version := 1)
    kills = 0
    for number in range(1, count + 1):
        if mode == "calls":
            new = number % 1000 + 2
            killed = kill_at_call(target, new, number)
            found = check(target)
            assert found in (version, new), (found, version, new)
            version = found
            if not killed:
                break
        else:
            assert kill_after(target, random.uniform(0, 0.05))
            check(target)
        kills += 1
    leftovers = [p.name for p in target.parent.iterdir() if p.name.endswith(".old")]
    assert not leftovers, leftovers
    print(kills)


if __name__ == "__main__":
    main()
