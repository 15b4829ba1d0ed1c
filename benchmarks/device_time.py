"""The time that a compiled program takes on a GPU, from JAX's profiler (CUPTI)."""

import collections
import contextlib
import pathlib
import statistics
import tempfile
from collections.abc import Iterator

import jax
from jax.profiler import ProfileData

EXECUTIONS = 7

Kernel = tuple[float, float, str]  # start and end in nanoseconds, name


@contextlib.contextmanager
def profile() -> Iterator[list[Kernel]]:
    """What runs on the streams of a GPU meanwhile, sorted; filled in at the end."""
    found: list[Kernel] = []
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            yield found
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        found += sorted(_kernels(ProfileData.from_file(str(path))))


def microseconds(program, *operands) -> float:
    """Median time from a program's first kernel to the end of its last one.

    What lies between programs (the host, updates of CUDA graphs) is not in it; gaps
    between a program's kernels are.
    """
    jax.block_until_ready(program(*operands))
    with profile() as events:
        for _ in range(EXECUTIONS):
            jax.block_until_ready(program(*operands))
    count, rest = divmod(len(events), EXECUTIONS)
    if count == 0 or rest:
        raise RuntimeError(
            f"expected the same kernels in each of {EXECUTIONS} executions, "
            f"got {len(events)}: {collections.Counter(name for _, _, name in events)}"
        )
    spans = []
    for first in range(0, len(events), count):
        execution = events[first : first + count]
        spans.append(max(end for _, end, _ in execution) - execution[0][0])
    return statistics.median(spans) / 1e3


def _kernels(profile: ProfileData) -> Iterator[Kernel]:
    for plane in profile.planes:
        for line in plane.lines if "GPU" in plane.name else ():
            if "Stream" in line.name:
                for event in line.events:
                    start = event.start_ns
                    yield start, start + event.duration_ns, event.name
