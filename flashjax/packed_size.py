"""How many bytes a packed matrix takes, without packing one.

All of the layout (`cpu/lscd_layout.h`) follows from the shape but the values. Their
number is that of the nonzeros and of the explicit zeros that keep the streams of a
chain together. Here the packer's counters run on random numbers of nonzeros.
"""

import functools
import math

import numpy as np

from flashjax import reference

# kMaxSpread: segments that streams may be apart; one less if neither small nor large.
_MAX_SPREAD = 4
_SMALL_ELEMENTS, _LARGE_ELEMENTS = 1 << 22, 400_000_000
_STREAMS = 2 * reference.LANES
_SEGMENT_BYTES = 4 * reference.SEGMENT_WORDS * reference.LANES
# Chains are alike: the mean of a few stands for all.
_CHAINS = 8


@functools.lru_cache(maxsize=1024)
def packed_bytes(shape: tuple[int, int], sparsity: float) -> int:
    """Bytes of a `SparseMatrix` whose zeros are anywhere.

    Args:
      shape: (in_features, out_features).
      sparsity: share of zeros, 0 to 1.

    Returns:
      The expected `nbytes`, within 1% for independent zeros and a million elements or
      more. Patterns with more zeros in some rows than in others may take more.

    Raises:
      ValueError: sparsity is out of range.
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"expected sparsity from 0 to 1, got {sparsity}")
    shapes = reference.leaf_shapes(shape)
    words = sum(
        math.prod(d for d in leaf if d is not None)
        for name, leaf in shapes.items()
        if name != "values"
    )
    return 4 * words + round(_segments(shape, 1 - sparsity) * _SEGMENT_BYTES)


def _segments(shape: tuple[int, int], density: float) -> float:
    """Expected number of segments of all chains."""
    k, m = shape
    if not k or not m or not density:
        return 0.0
    spread = _MAX_SPREAD - (_SMALL_ELEMENTS <= k * m <= _LARGE_ELEMENTS)
    chains = reference.chain_count(shape)
    strips = -(-m // reference.STRIP_ROWS)
    chain_strips = reference.chain_strips(shape)
    last = strips - (chains - 1) * chain_strips
    total = _chain_segments(
        k, last, m - (strips - 1) * reference.STRIP_ROWS, density, spread
    )
    if chains > 1:
        whole = _chain_segments(k, chain_strips, reference.STRIP_ROWS, density, spread)
        total += (chains - 1) * whole
    return total


@functools.lru_cache(maxsize=1024)
def _chain_segments(
    k: int, strips: int, last_rows: int, density: float, spread: int
) -> float:
    """Expected segments of a chain whose last strip has `last_rows` rows."""
    rng = np.random.default_rng(0)
    capacity = np.tile(_capacity(k), (strips, 1))
    rows = np.arange(_STREAMS) % reference.LANES // 4 + 8 * (
        np.arange(_STREAMS) // reference.LANES
    )
    capacity[-reference.step_count(k) :, rows >= last_rows] = 0
    nonzeros = rng.binomial(
        capacity[:, None], density, (len(capacity), _CHAINS, _STREAMS)
    )
    following = np.concatenate([nonzeros[1:], np.zeros_like(nonzeros[:1])])
    stored = np.zeros((_CHAINS, _STREAMS), np.int64)
    for here, ahead in zip(nonzeros, following, strict=True):
        after = stored + here
        peak = np.max(after + ahead, axis=1, keepdims=True)
        least = reference.SEGMENT_WORDS * (_ceil_segments(peak) - spread)
        stored = np.maximum(after, least)
    return float(_ceil_segments(stored.max(axis=1)).mean())


def _capacity(k: int) -> np.ndarray:
    """(steps, streams): positions of a stream in a step that lie within K."""
    i = np.arange(reference.POSITIONS)
    t = np.arange(_STREAMS) % 4
    columns = 16 * (i // 4) + 8 * (i // 2 % 2) + i % 2 + 2 * t[:, None]
    starts = reference.STEP_K * np.arange(reference.step_count(k))
    return (starts[:, None, None] + columns < k).sum(axis=2)


def _ceil_segments(words: np.ndarray) -> np.ndarray:
    return -(-words // reference.SEGMENT_WORDS)
