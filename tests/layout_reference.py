"""A slow NumPy packer and unpacker, written from the text of cpu/lscd_layout.h.

The native packers are compared with it bit for bit.
"""

import numpy as np

STRIP_ROWS, STEP_K, GROUP_STEPS, LANES = 16, 64, 4, 32
STREAMS, POSITIONS, SEGMENT_WORDS = 64, 16, 16
RING_SEGMENTS, PREFETCH = 5, 1
SMALL_ELEMENTS, LARGE_ELEMENTS = 1 << 22, 400_000_000
ENTRY_STEPS, ENTRY_WORDS, CHAIN_STEPS = 16, 18, 2048


def sizes(k: int, m: int) -> dict[str, int]:
    """The sizes that follow from K and M alone."""
    strips = -(-m // STRIP_ROWS)
    groups = -(-k // (STEP_K * GROUP_STEPS))
    steps = groups * GROUP_STEPS
    chain_strips = -(-CHAIN_STEPS // steps) if steps else 1
    chain_strips = min(chain_strips, strips) or 1
    return {
        "strips": strips,
        "groups": groups,
        "steps": steps,
        "entries": -(-steps // ENTRY_STEPS),
        "chain_strips": chain_strips,
        "chains": -(-strips // chain_strips),
    }


def _columns() -> np.ndarray:
    """(64 streams, 16 positions): the column of a position within its step."""
    columns = np.empty((STREAMS, POSITIONS), np.int64)
    for stream in range(2):
        for lane in range(LANES):
            for i in range(POSITIONS):
                p = i // 2
                columns[32 * stream + lane, i] = (
                    16 * (p // 2) + 8 * (p % 2) + 2 * (lane % 4) + i % 2
                )
    return columns


_COLUMNS = _columns()
_ROWS = np.array([lane // 4 + 8 * s for s in range(2) for lane in range(LANES)])
_BITS = np.array([8 * (i % 2) + i // 2 for i in range(POSITIONS)], np.uint32)


def _blocks(dense: np.ndarray) -> np.ndarray:
    """(K, M) -> (strips, steps, 64 streams, 16 positions)."""
    k, m = dense.shape
    s = sizes(k, m)
    padded = np.zeros((s["steps"] * STEP_K, s["strips"] * STRIP_ROWS), np.uint16)
    padded[:k, :m] = dense
    tiles = padded.reshape(s["steps"], STEP_K, s["strips"], STRIP_ROWS)
    return tiles.transpose(2, 0, 3, 1)[:, :, _ROWS[:, None], _COLUMNS]


def pack(
    dense: np.ndarray, for_few_tokens: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Packs a dense matrix.

    Args:
        dense: (K, M) uint16 bit patterns.
        for_few_tokens: streams no further apart than two segments.

    Returns:
        bitmap (strips, groups, 32, 4), entries (strips, entries, 18), values
        (segments, 16, 32) and counts (strips,), all uint32.
    """
    k, m = dense.shape
    s = sizes(k, m)
    blocks = _blocks(dense)
    nonzero = (blocks & 0x7FFF) != 0
    blocks = np.where(nonzero, blocks, 0)
    stored = nonzero.copy()
    bitmap = np.zeros((s["strips"], s["groups"], LANES, GROUP_STEPS), np.uint32)
    entries = np.zeros((s["strips"], s["entries"], ENTRY_WORDS), np.uint32)
    counts = nonzero.sum(axis=(1, 2, 3), dtype=np.uint32).reshape(s["strips"])
    chains, first_segment = [], 0
    for chain in range(s["chains"]):
        begin = chain * s["chain_strips"]
        end = min(begin + s["chain_strips"], s["strips"])
        steps = [(a, b) for a in range(begin, end) for b in range(s["steps"])]
        n = np.zeros(STREAMS, np.int64)
        streams = [[] for _ in range(STREAMS)]
        for u, (strip, step) in enumerate(steps):
            resident = -(-n.max() // SEGMENT_WORDS)
            if step % ENTRY_STEPS == 0:
                entry = entries[strip, step // ENTRY_STEPS]
                base = n.min() // SEGMENT_WORDS
                entry[0] = first_segment + base
                entry[1] = resident - base
                offsets = (n - base * SEGMENT_WORDS).astype(np.uint8)
                entry[2:] = offsets.view("<u4")
            after = n + nonzero[strip, step].sum(axis=1)
            peak = after
            if u + 1 < len(steps):
                peak = after + nonzero[steps[u + 1]].sum(axis=1)
            spread = RING_SEGMENTS - PREFETCH
            spread -= SMALL_ELEMENTS <= k * m <= LARGE_ELEMENTS
            spread = 2 if for_few_tokens else spread
            bound = SEGMENT_WORDS * (-(-peak.max() // SEGMENT_WORDS) - spread)
            for q in np.flatnonzero(after < bound):
                unmarked = np.flatnonzero(~stored[strip, step, q])
                stored[strip, step, q, unmarked[: bound - after[q]]] = True
            n = n + stored[strip, step].sum(axis=1)
            if -(-n.max() // SEGMENT_WORDS) > resident:
                entry[1] |= np.uint32(1 << (16 + step % ENTRY_STEPS))
            words = (stored[strip, step] << _BITS).sum(axis=1, dtype=np.uint32)
            bitmap[strip, step // GROUP_STEPS, :, step % GROUP_STEPS] = (
                words[:LANES] | words[LANES:] << 16
            )
            for q in range(STREAMS):
                streams[q].extend(blocks[strip, step, q, stored[strip, step, q]])
        segments = -(-int(n.max()) // SEGMENT_WORDS)
        linear = np.zeros((STREAMS, segments * SEGMENT_WORDS), np.uint32)
        for q in range(STREAMS):
            linear[q, : len(streams[q])] = streams[q]
        words = linear[:LANES] | linear[LANES:] << 16
        chains.append(words.T.reshape(segments, SEGMENT_WORDS, LANES))
        first_segment += segments
    values = np.concatenate([np.zeros((0, SEGMENT_WORDS, LANES), np.uint32), *chains])
    return bitmap, entries, values, counts


def unpack(
    bitmap: np.ndarray, entries: np.ndarray, values: np.ndarray, k: int, m: int
) -> np.ndarray:
    """Unpacks to (K, M) uint16, from the strip's first entry on."""
    s = sizes(k, m)
    dense = np.zeros((s["steps"] * STEP_K, s["strips"] * STRIP_ROWS), np.uint16)
    flat = values.reshape(-1, LANES)
    linear = np.concatenate([flat & 0xFFFF, flat >> 16], axis=1).astype(np.uint16)
    for strip in range(s["strips"]):
        for step in range(s["steps"]):
            if step == 0:
                entry = entries[strip, 0]
                offsets = entry[2:].copy().astype("<u4").view(np.uint8)
                n = int(entry[0]) * SEGMENT_WORDS + offsets.astype(np.int64)
            words = bitmap[strip, step // GROUP_STEPS, :, step % GROUP_STEPS]
            words = np.concatenate([words & 0xFFFF, words >> 16])
            for q in range(STREAMS):
                marked = np.flatnonzero(words[q] >> _BITS & 1)
                rows = step * STEP_K + _COLUMNS[q, marked]
                taken = linear[n[q] : n[q] + len(marked), q]
                dense[rows, strip * STRIP_ROWS + _ROWS[q]] = taken
                n[q] += len(marked)
    return dense[:k, :m]
