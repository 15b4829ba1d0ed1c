"""The time that a compiled program takes on a GPU, from JAX's profiler (CUPTI)."""

import collections
import pathlib
import statistics
import tempfile

import jax
from jax.profiler import ProfileData

EXECUTIONS = 7


def microseconds(program, *operands) -> float:
    """Median time from a program's first kernel to the end of its last one.

    What lies between programs (the host, updates of CUDA graphs) is not in it; gaps
    between a program's kernels are.
    """
    jax.block_until_ready(program(*operands))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(EXECUTIONS):
                jax.block_until_ready(program(*operands))
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        events = _kernels(ProfileData.from_file(str(path)))
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


def _kernels(profile: ProfileData) -> list[tuple[float, float, str]]:
    """(start, end, name) of everything on the streams of a GPU, in nanoseconds."""
    return sorted(
        (event.start_ns, event.start_ns + event.duration_ns, event.name)
        for plane in profile.planes
        if "GPU" in plane.name
        for line in plane.lines
        if "Stream" in line.name
        for event in line.events
    )
