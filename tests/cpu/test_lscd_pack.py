"""The host packer and unpacker, bit for bit against tests/layout_reference.py."""

import os
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import layout_reference as reference
import numpy as np
import pytest

from flashjax import _native

SHAPES = [
    (0, 0),
    (0, 5),
    (5, 0),
    (1, 1),
    (1, 17),
    (63, 16),
    (64, 15),
    (256, 16),
    (257, 33),
    (300, 37),
    (1021, 19),
    (33, 1037),
    (4099, 21),
]

NAMES = ("bitmap", "entries", "values", "counts")


def random_bits(seed: int, k: int, m: int, sparsity: float) -> np.ndarray:
    """Any bit patterns, NaN, infinities and -0.0 among them."""
    rng = np.random.default_rng(seed)
    dense = rng.integers(0, 1 << 16, (k, m), np.uint16)
    dense[rng.random((k, m)) < sparsity] = 0
    dense[rng.random((k, m)) < 0.02] = 0x8000
    dense[rng.random((k, m)) < 0.02] = 0x7E01
    dense[rng.random((k, m)) < 0.02] = 0xFC00
    return dense


def _zeros(k, m):
    return np.zeros((k, m), np.uint16)


def _ones(k, m):
    return np.full((k, m), 0x3C00, np.uint16)


def _one_row(k, m):
    dense = _zeros(k, m)
    dense[k // 2] = 0x3C00
    return dense


def _one_column(k, m):
    dense = _zeros(k, m)
    dense[:, m // 2] = 0x3C00
    return dense


def _tiles(k, m):
    """Dense and empty steps and strips in turn, with sparse ones between."""
    dense = random_bits(1, k, m, 0.5)
    kind = (np.arange(k)[:, None] // 64 + np.arange(m)[None, :] // 16) % 3
    dense[kind == 0] = 0
    dense[kind == 1] = 0x4000
    return dense


def _one_stream(k, m):
    """Only one lane's columns: all other streams need as many explicit zeros."""
    dense = _zeros(k, m)
    dense[np.arange(k) % 8 < 2, ::16] = 0x3C00
    return dense


def _far_apart(k, m):
    """A lone nonzero late, and one stream that ran ahead."""
    dense = _one_stream(k, m)
    dense[-1, -1] = 0x8001
    return dense


def _negative_zeros(k, m):
    """-0.0 in the places that explicit zeros take."""
    dense = np.full((k, m), 0x8000, np.uint16)
    dense[:, 0] = 0x3C00
    return dense


PATTERNS = [
    _zeros,
    _ones,
    _one_row,
    _one_column,
    _tiles,
    _one_stream,
    _far_apart,
    _negative_zeros,
]


def check_packed(packed, dense, for_few_tokens=False):
    wanted = reference.pack(dense, for_few_tokens)
    for name, got, want in zip(NAMES, packed, wanted, strict=True):
        assert got.dtype == np.uint32, name
        assert got.shape == want.shape, name
        np.testing.assert_array_equal(got, want, err_msg=name)


def without_negative_zeros(dense):
    return np.where(dense == 0x8000, 0, dense)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_pack_random(simd, shape, sparsity, threads):
    dense = random_bits(0, *shape, sparsity)
    packed = _native.cpu.pack(dense, threads=threads)
    check_packed(packed, dense)
    unpacked = _native.cpu.unpack(*packed[:3], *shape, threads=threads)
    np.testing.assert_array_equal(unpacked, without_negative_zeros(dense))


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda f: f.__name__[1:])
@pytest.mark.parametrize("shape", [(2100, 70), (300, 333), (8200, 17)])
def test_pack_pattern(simd, shape, pattern):
    dense = pattern(*shape)
    packed = _native.cpu.pack(dense, threads=2)
    check_packed(packed, dense)
    unpacked = _native.cpu.unpack(*packed[:3], *shape, threads=2)
    np.testing.assert_array_equal(unpacked, without_negative_zeros(dense))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pack_for_few_tokens(simd, pattern):
    dense = pattern(8200, 17)
    packed = _native.cpu.pack(dense, threads=2, for_few_tokens=True)
    check_packed(packed, dense, for_few_tokens=True)
    unpacked = _native.cpu.unpack(*packed[:3], *dense.shape)
    np.testing.assert_array_equal(unpacked, without_negative_zeros(dense))


def test_reference_unpacks_what_it_packs():
    for pattern in PATTERNS:
        dense = pattern(600, 50)
        packed = reference.pack(dense)
        unpacked = reference.unpack(*packed[:3], *dense.shape)
        np.testing.assert_array_equal(unpacked, without_negative_zeros(dense))


@st.composite
def blocky(draw):
    """Matrices of blocks that are empty, full, or filled to some degree."""
    k = draw(st.integers(1, 700))
    m = draw(st.integers(1, 70))
    rows = draw(st.sampled_from([1, 2, 8, 64, 100]))
    columns = draw(st.sampled_from([1, 2, 16, 40]))
    blocks = (-(-k // rows), -(-m // columns))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    levels = draw(st.lists(st.floats(0, 1), min_size=1, max_size=4))
    density = rng.choice(np.array([0.0, 1.0, *levels]), blocks)
    density = density.repeat(rows, 0).repeat(columns, 1)[:k, :m]
    dense = rng.integers(0, 1 << 16, (k, m), np.uint16)
    return np.where(rng.random((k, m)) < density, dense, 0).astype(np.uint16)


@hypothesis.given(blocky())
@hypothesis.settings(max_examples=60, deadline=None)
def test_pack_property(dense):
    packed = _native.cpu.pack(dense)
    check_packed(packed, dense)
    check_ring(packed, *dense.shape)
    unpacked = _native.cpu.unpack(*packed[:3], *dense.shape)
    np.testing.assert_array_equal(unpacked, without_negative_zeros(dense))


def check_ring(packed, k, m, chains=None):
    """Walks along every chain as a kernel does, with the ring of the layout.

    Before a step is decoded, the segments it needs and kPrefetch more are there and
    none of them took the slot of a word that some stream still needs. The entries
    must say where each stream stands and when a segment is needed.
    """
    bitmap, entries, values, _ = packed
    s = reference.sizes(k, m)
    bits = bitmap.transpose(0, 1, 3, 2).reshape(s["strips"], s["steps"], 32)
    counts = np.concatenate([bits & 0xFFFF, bits >> 16], axis=2)
    counts = np.bitwise_count(counts).astype(np.int64)
    words, first = reference.SEGMENT_WORDS, 0
    for chain in range(chains or s["chains"]):
        begin = chain * s["chain_strips"]
        end = min(begin + s["chain_strips"], s["strips"])
        n = np.zeros(reference.STREAMS, np.int64)
        fetched = 0
        for strip in range(begin, end):
            for step in range(s["steps"]):
                entry = entries[strip, step // reference.ENTRY_STEPS]
                j = step % reference.ENTRY_STEPS
                resident = -(-n.max() // words)
                if j == 0:
                    base = n.min() // words
                    assert entry[0] == first + base
                    assert entry[1] & 0xFFFF == resident - base
                    offsets = entry[2:].astype("<u4").view(np.uint8)
                    np.testing.assert_array_equal(offsets, n - base * words)
                needs = resident + (entry[1] >> (16 + j) & 1)
                assert needs == -(-(n + counts[strip, step]).max() // words)
                fetched = max(fetched, needs + reference.PREFETCH)
                overwritten = fetched - 1 - reference.RING_SEGMENTS
                assert n.min() // words > overwritten
                n = n + counts[strip, step]
        first += -(-n.max() // words)
    assert first == len(values)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda f: f.__name__[1:])
@pytest.mark.parametrize("shape", [(2100, 70), (8200, 40), (70, 400)])
def test_ring_never_overwrites(shape, pattern):
    check_ring(_native.cpu.pack(pattern(*shape)), *shape)


@pytest.mark.parametrize(
    ("columns", "share"),
    [
        (reference.SMALL_ELEMENTS // 2048 - 16, 1.0),
        (reference.SMALL_ELEMENTS // 2048, 1.02),
        (195_312, 1.02),
        (195_328, 1.0),
    ],
)
def test_streams_of_small_and_large_matrices_may_be_further_apart(columns, share):
    """Matrices with values in the first chain alone, beside that chain alone."""
    chain = random_bits(5, 2048, 1024, 0.8)
    dense = np.zeros((2048, columns), np.uint16)
    dense[:, :1024] = chain
    packed = _native.cpu.pack(dense)
    check_ring(packed, *dense.shape, chains=1)
    small = _native.cpu.pack(chain)  # two million elements
    assert len(packed[2]) / len(small[2]) == pytest.approx(share, abs=0.01)
    unpacked = _native.cpu.unpack(*packed[:3], *dense.shape)
    np.testing.assert_array_equal(unpacked[:, :1024], without_negative_zeros(chain))
    assert not unpacked[:, 1024:].any()


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8, 0.95])
def test_ring_never_overwrites_random(sparsity):
    dense = random_bits(3, 4096, 100, sparsity)
    check_ring(_native.cpu.pack(dense), *dense.shape)


@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.7, 0.8])
@pytest.mark.parametrize("shape", [(4096, 512), (1024, 4096)])
def test_bytes_per_element(shape, sparsity):
    rng = np.random.default_rng(0)
    dense = np.where(rng.random(shape) < sparsity, 0, 0x3C00).astype(np.uint16)
    packed = _native.cpu.pack(dense)
    limit = 1.06 * (2 * (1 - sparsity) + 0.125)
    assert sum(a.nbytes for a in packed) / dense.size <= limit


def test_counts_are_nonzeros_of_strips(simd):
    dense = random_bits(5, 500, 100, 0.7)
    counts = _native.cpu.pack(dense)[3]
    nonzero = np.pad((dense & 0x7FFF) != 0, ((0, 0), (0, 12)))
    wanted = nonzero.sum(axis=0).reshape(7, 16).sum(axis=1)
    np.testing.assert_array_equal(counts, wanted)


@pytest.mark.parametrize(
    "dense",
    [
        np.zeros((4, 4), np.float16),
        np.zeros((4, 4), np.uint32),
        np.zeros(4, np.uint16),
        np.zeros((2, 3, 4), np.uint16),
        np.zeros((8, 8), np.uint16)[:, ::2],
        np.zeros((8, 8), np.uint16).T[1:],
        [[1, 2], [3, 4]],
    ],
    ids=["float16", "uint32", "1-D", "3-D", "strided", "column-major", "list"],
)
def test_pack_refuses(dense):
    with pytest.raises(TypeError, match="uint16"):
        _native.cpu.pack(dense)


def test_unpack_refuses_shapes_that_do_not_fit():
    bitmap, entries, values, _ = _native.cpu.pack(np.ones((300, 40), np.uint16))
    unpack = _native.cpu.unpack
    with pytest.raises(ValueError, match=r"bitmap: expected shape \(3, 1, 32, 4\)"):
        unpack(bitmap, entries, values, 200, 40)
    with pytest.raises(ValueError, match=r"entries: expected shape \(3, 1, 18\), got"):
        unpack(bitmap, entries[:2], values, 300, 40)
    with pytest.raises(ValueError, match="values: expected shape"):
        unpack(bitmap, entries, values[:, :8].copy(), 300, 40)
    with pytest.raises(ValueError, match="negative"):
        unpack(bitmap, entries, values, -1, 40)
    with pytest.raises(TypeError, match="uint32"):
        unpack(bitmap.astype(np.int64), entries, values, 300, 40)


def test_unpack_survives_entries_that_no_packer_wrote(simd):
    bitmap, entries, values, _ = _native.cpu.pack(random_bits(0, 3000, 100, 0.5))
    rng = np.random.default_rng(0)
    for _ in range(3):
        entries = rng.integers(0, 1 << 32, entries.shape, np.uint32)
        _native.cpu.unpack(bitmap, entries, values, 3000, 100)


def test_large_results_have_pages_of_their_own():
    """In a thread's heap the C library would keep their memory."""
    bits = np.full((1024, 2048), 0x3C00, np.uint16)
    for leaf in _native.cpu.pack(bits):
        assert leaf.flags.writeable
        assert leaf.ctypes.data % 4096 == 0 or leaf.nbytes < 1 << 20


def test_simd_names():
    assert _native.cpu.simd() in ("portable", "avx2", "avx512")
    with pytest.raises(ValueError, match="expected 'portable', 'avx2' or 'avx512'"):
        _native.cpu.set_simd("sse9")


def _simd_with(variable):
    command = [sys.executable, "-c", "import flashjax._cpu as c; print(c.simd())"]
    environment = {**os.environ, "FLASHJAX_CPU_SIMD": variable}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_simd_variable():
    assert _simd_with("portable").stdout == "portable\n"
    assert _simd_with("avx512").returncode == 0  # takes less where there is less
    unknown = _simd_with("sse9")
    assert unknown.returncode != 0
    assert "expected portable, avx2 or avx512, got sse9" in unknown.stderr
