"""The time that a compiled program takes on a GPU, from JAX's profiler (CUPTI)."""

import collections
import contextlib
import pathlib
import re
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
from jax.profiler import ProfileData

EXECUTIONS = 7
# Seconds that a program runs before these: at its limit of power a GPU takes tenths of
# a second to slow down, and it cools while it waits for a compiler.
SETTLE = 0.25


class Kernel(NamedTuple):
    """A kernel or copy that ran: start and end in nanoseconds, name, operation of HLO.

    The operation is empty where the profiler does not know it.
    """

    start: float
    end: float
    name: str
    operation: str


@contextlib.contextmanager
def profile() -> Iterator[list[Kernel]]:
    """What runs on the streams of a GPU meanwhile, sorted; filled in at the end."""
    found: list[Kernel] = []
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            yield found
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        found += sorted(_kernels(ProfileData.from_file(str(path))))


def microseconds(program, *operands, settle: float = SETTLE) -> float:
    """Median time from a program's first kernel to the end of its last one.

    What lies between programs (the host, updates of CUDA graphs) is not in it; gaps
    between a program's kernels are.

    Args:
      program: compiled.
      *operands: what it is called with.
      settle: seconds that it runs before it is timed.
    """
    begin = time.perf_counter()
    jax.block_until_ready(program(*operands))
    while time.perf_counter() - begin < settle:
        jax.block_until_ready(program(*operands))
    with profile() as events:
        for _ in range(EXECUTIONS):
            jax.block_until_ready(program(*operands))
    count, rest = divmod(len(events), EXECUTIONS)
    if count == 0 or rest:
        raise RuntimeError(
            f"expected the same kernels in each of {EXECUTIONS} executions, "
            f"got {len(events)}: {collections.Counter(event.name for event in events)}"
        )
    spans = []
    for first in range(0, len(events), count):
        execution = events[first : first + count]
        spans.append(span(execution))
    return statistics.median(spans) / 1e3


def span(kernels: list[Kernel]) -> float:
    """Nanoseconds from the first kernel to the end of the last one."""
    return max(kernel.end for kernel in kernels) - kernels[0].start


def by_name(kernels: Iterable[Kernel], times: int) -> list[dict]:
    """Calls and microseconds of every kernel in one of so many times, longest first.

    Numbers that are parts of names do not count.
    """
    found = collections.defaultdict(list)
    for kernel in kernels:
        name, operation = (
            re.sub(r"[._]\d+(?=[._-]|$)", "", text)
            for text in (kernel.name, kernel.operation)
        )
        found[name, operation].append((kernel.end - kernel.start) / 1e3)
    rows = [
        {
            "kernel": name[:100],
            "operation": operation[:60],
            "calls": round(len(durations) / times, 2),
            "us": round(sum(durations) / times, 2),
        }
        for (name, operation), durations in found.items()
    ]
    return sorted(rows, key=lambda row: -row["us"])


def _kernels(profile: ProfileData) -> Iterator[Kernel]:
    for plane in profile.planes:
        for line in plane.lines if "GPU" in plane.name else ():
            if "Stream" in line.name:
                for event in line.events:
                    operation = dict(event.stats).get("hlo_op") or ""
                    start = event.start_ns
                    end = start + event.duration_ns
                    yield Kernel(start, end, event.name, str(operation))
