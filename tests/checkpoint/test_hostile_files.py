"""Damaged and hostile files end in CheckpointError or load as valid matrices."""

import contextlib
import json
import os
import shutil
import struct
import warnings

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opt_folders import DATA

import flashjax as fj
from flashjax import _native, checkpoint, checkpoint_files
from flashjax.checkpoint import (
    INDEX_NAME,
    WEIGHTS_NAME,
    CheckpointError,
    CheckpointReader,
    CheckpointWriter,
)
from flashjax.models import opt
from flashjax.sparse_rows import SparseRows

# Of each profile's (tests/conftest.py) examples, for what takes longer: 100 of 160.
some_examples = settings(max_examples=settings.default.max_examples * 5 // 8)


def write(folder, shard_bytes=1 << 30):
    rng = np.random.default_rng(0)
    with CheckpointWriter(folder, shard_bytes) as writer:
        for name, dtype in (("a", np.float16), ("b", ml_dtypes.bfloat16)):
            dense = rng.standard_normal((7, 9)) * (rng.random((7, 9)) < 0.4)
            writer.add_sparse(name, dense.astype(dtype))
            writer.add(f"{name}.bias", np.ones(7, np.float32))
        writer.close()
    return folder


def load_all(folder) -> dict[str, np.ndarray]:
    """Everything that can be asked of a folder; its sparse weights are packed."""
    loaded = {}
    with CheckpointReader(folder) as reader:
        for name in reader.names():
            shape, dtype = reader.shape(name), reader.dtype(name)
            reader.stored_bytes(name)
            if name in reader.sparse:
                reader.nnz(name)
                reader.counted_nnz(name)
            loaded[name] = reader.load(name)
            assert loaded[name].shape == shape
            assert loaded[name].dtype == dtype
            if name in reader.sparse:
                check_packing(reader.load_rows(name), loaded[name])
    return loaded


def check_packing(rows, dense):
    """As `opt.from_pretrained` packs what is stored sparse: without expanding it."""
    w = fj.SparseMatrix.from_rows(rows)
    assert w.nnz == np.count_nonzero(dense)
    expanded = _native.cpu.pack(np.ascontiguousarray(dense.T).view(np.uint16))
    for ours, theirs in zip(rows.pack(), expanded, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def loads_or_refuses(folder) -> dict[str, np.ndarray] | None:
    try:
        return load_all(folder)
    except CheckpointError as error:
        assert len(str(error)) < 2000  # noqa: PT017
        return None


@st.composite
def damages(draw):
    """A function that flips, cuts, inserts, repeats or moves some bytes."""
    kind = draw(st.sampled_from(["flip", "truncate", "insert", "delete", "splice"]))
    # Half of the damage is in the header, which is shorter than the file.
    a, b = (draw(st.floats(0, 1)) ** draw(st.sampled_from([1, 4])) for _ in "ab")
    data = draw(st.binary(min_size=1, max_size=9))

    def damage(content: bytes) -> bytes:
        i, j = sorted((int(a * len(content)), int(b * len(content))))
        if kind == "flip":
            return content[:i] + data + content[i + len(data) :]
        if kind == "truncate":
            return content[:i]
        if kind == "insert":
            return content[:i] + data + content[i:]
        if kind == "delete":
            return content[:i] + content[j:]
        return content[:i] + content[j:] + content[i:j]

    return damage


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model"), shard_bytes=1)


@pytest.mark.parametrize("which", ["weights", "index"])
def test_any_damage_is_found(folder, which):
    first = next(folder.glob("*.safetensors"))
    path = first if which == "weights" else folder / INDEX_NAME
    good, wanted = path.read_bytes(), load_all(folder)

    @given(st.lists(damages(), min_size=1, max_size=2))
    def check(some):
        content = good
        for damage in some:
            content = damage(content)
        path.write_bytes(content)
        loaded = loads_or_refuses(folder)
        for name, array in (loaded or {}).items():
            # What one accident damaged loads as it was written, or not at all.
            same = array.tobytes() == wanted.get(name, array).tobytes()
            assert same or len(some) > 1
        if which == "weights":
            with contextlib.suppress(CheckpointError):
                checkpoint_files.read_file(path)

    try:
        check()
    finally:
        path.write_bytes(good)


@given(damages())
def test_any_damage_without_checksums(tmp_path_factory, damage):
    folder = tmp_path_factory.getbasetemp() / "unchecked"
    folder.mkdir(exist_ok=True)
    dense = np.eye(5, 6, dtype=np.float16)
    bitmap, values = checkpoint.encode(dense)
    entries = {"a": checkpoint.SparseEntry(dense.shape, dense.dtype)}
    content = safetensors_bytes(
        {"a.bitmap": bitmap, "a.values": values}, checkpoint.format_metadata(entries)
    )
    (folder / WEIGHTS_NAME).write_bytes(damage(content))
    loads_or_refuses(folder)


NAMES = {"float16": "F16", "uint8": "U8", "float32": "F32"}


def safetensors_bytes(tensors, metadata, change=lambda header: header) -> bytes:
    """A safetensors file of our own making; `change` alters the header."""
    header, data = {"__metadata__": metadata}, b""
    for name, array in tensors.items():
        begin = len(data)
        data += array.tobytes()
        header[name] = {
            "dtype": NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [begin, len(data)],
        }
    header = change(header)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def hostile(tmp_path, change=lambda header: header, entry=None, **tensors):
    dense = np.eye(5, 6, dtype=np.float16)
    bitmap, values = checkpoint.encode(dense)
    parts = {"a.bitmap": bitmap, "a.values": values} | tensors
    entry = {"shape": [5, 6], "dtype": "float16"} | (entry or {})
    content = {"format": "flashjax-sparse", "version": 1, "sparse": {"a": entry}}
    metadata = {"flashjax": json.dumps(content)}
    data = safetensors_bytes(parts, metadata, change)
    (tmp_path / WEIGHTS_NAME).write_bytes(data)
    return tmp_path


def test_the_files_made_here_load(tmp_path):
    (loaded,) = load_all(hostile(tmp_path)).values()
    np.testing.assert_array_equal(loaded, np.eye(5, 6))


def offsets(name, begin, end):
    def change(header):
        return header | {name: header[name] | {"data_offsets": [begin, end]}}

    return change


def shape(name, *sizes):
    return lambda header: header | {name: header[name] | {"shape": list(sizes)}}


def dtype(name, code):
    return lambda header: header | {name: header[name] | {"dtype": code}}


@pytest.mark.parametrize(
    "change",
    [
        offsets("a.values", 0, 10),
        offsets("a.values", 4, 2**62),
        offsets("a.values", 2**63, 2**63 + 10),
        offsets("a.values", 14, 4),
        offsets("a.values", -4, 6),
        offsets("a.values", 4, 12),
        shape("a.values", 2**40),
        shape("a.values", 2**32, 2**32, 5),
        shape("a.values", -5),
        shape("a.values", 1, 5),
        shape("a.bitmap", 2, 2),
        dtype("a.values", "BF16"),
        dtype("a.bitmap", "I8"),
        dtype("a.bitmap", "F8_E4M3"),
        dtype("a.bitmap", "X3"),
        lambda header: header | {"a.values": None},
        lambda header: header | {"__metadata__": {"flashjax": 1}},
        lambda header: header | {"__metadata__": []},
        lambda header: [],
        lambda header: b"[" * 100_000,
        lambda header: b"\xff" * 50,
        lambda header: b"",
        lambda header: b" " * (100_000_001),
    ],
)
def test_lying_headers(tmp_path, change):
    with pytest.raises(CheckpointError):
        load_all(hostile(tmp_path, change))


@pytest.mark.parametrize("size", [0, 7, 2**31, 2**63, 2**64 - 1])
def test_lying_header_sizes(tmp_path, size):
    path = hostile(tmp_path) / WEIGHTS_NAME
    path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="expected a whole safetensors file"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [2**31 - 1, 2**31 - 1]},
        {"shape": [2**40, 1]},
        {"shape": [6, 6]},
        {"shape": [5, 6.0]},
        {"shape": [5, True]},
        {"dtype": "bfloat16"},
    ],
)
def test_lying_entries(tmp_path, entry):
    with pytest.raises(CheckpointError):
        load_all(hostile(tmp_path, entry=entry))


def test_every_dtype_of_the_format_is_read_or_refused(tmp_path):
    codes = ["F8_E5M2", "F8_E4M3", "F8_E8M0", "F4", "C64", "BOOL", "I8", "U8"]
    for code in codes:
        hostile(tmp_path, dtype("b", code), b=np.zeros(8, np.uint8))
        loads_or_refuses(tmp_path)


@pytest.mark.parametrize("begin", [0, 4])
def test_a_tensor_that_occurs_twice(tmp_path, begin):
    """Of two entries in a header one counts, and all checks are made of that."""

    def change(header):
        second = header["a.bitmap"] | {"data_offsets": [begin, begin + 4]}
        text = json.dumps(header)
        return f'{text[:-1]}, "a.bitmap": {json.dumps(second)}}}'.encode()

    loads_or_refuses(hostile(tmp_path, change))


def test_keys_that_occur_twice(tmp_path):
    write(tmp_path)
    (tmp_path / INDEX_NAME).write_text(
        f'{{"weight_map": {{"a": "{WEIGHTS_NAME}", "a": "other.safetensors"}}}}'
    )
    with pytest.raises(CheckpointError, match="the key 'a' twice"):
        CheckpointReader(tmp_path)


def test_a_changed_value_is_found(tmp_path):
    path = write(tmp_path) / WEIGHTS_NAME
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum of the content: expected"):
        load_all(tmp_path)


def test_links_out_of_the_folder_are_followed_only_as_files(tmp_path):
    """The hub's cache has links to files; a link to a folder or device is no file."""
    write(tmp_path)
    weights = tmp_path / WEIGHTS_NAME
    weights.rename(tmp_path / "blob")
    weights.symlink_to(tmp_path / "blob")
    assert load_all(tmp_path)
    for target in ("/dev/zero", str(tmp_path), "missing", WEIGHTS_NAME):
        weights.unlink()
        os.symlink(target, weights)
        with pytest.raises(CheckpointError):
            CheckpointReader(tmp_path)


@pytest.mark.parametrize("size", [[2**40, 0], [-1, 5], [5], 3, [2**31, 1]])
def test_lying_shapes_of_arrays(size):
    arrays = checkpoint.to_arrays(fj.SparseMatrix.from_dense(np.eye(2).astype("f2")))
    with pytest.raises(CheckpointError):
        checkpoint.from_arrays(arrays | {"shape": np.array(size)})


# Of a part: rows, and bytes of the bitmap, bits and values too many or too few.
slips = st.sampled_from([0, 0, 0, 0, 1, -1])
row_parts = st.tuples(st.integers(0, 40), slips, st.integers(0, 1), slips)


@given(
    st.lists(row_parts, min_size=1, max_size=3),
    st.integers(0, 70),
    st.none() | st.lists(st.integers(-1, 40), min_size=1),
    st.integers(0, 2**32 - 1),
)
def test_rows_that_may_not_belong_together(parts, columns, order, seed):
    """The native code by itself, without the checks that a reader makes first."""
    rng = np.random.default_rng(seed)
    made = []
    for count, more_bytes, more_bits, more_values in parts:
        bits = rng.random(count * columns + more_bits) < 0.3
        bitmap = np.packbits(bits, bitorder="little")
        bitmap = np.resize(bitmap, max(0, bitmap.size + more_bytes))
        values = rng.standard_normal(max(0, bits.sum() + more_values))
        made.append((bitmap, values.astype(np.float16), count))
    rows = SparseRows(tuple(made), columns, order and np.array(order, np.int64))
    try:
        dense = rows.to_dense()
    except ValueError as error:
        with pytest.raises(ValueError, match="stored rows: ") as again:
            rows.pack()
        assert str(again.value) == str(error)  # noqa: PT017
        return
    assert dense.shape == rows.shape
    check_packing(rows, dense)


JSON_FILES = {
    "config.json": ["quantization_config", "word_embed_proj_dim"],
    "generation_config.json": ["max_length", "do_sample", "num_beams", "seed"],
    "tokenizer_config.json": ["unk_token", "add_prefix_space"],
}
ODD = [0, -1, 2**31, 2**63, 10**400, 1e308, "\ud800", "relu", [[1], [2, 3]]]
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(ODD),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)


@pytest.fixture
def opt_folder(tmp_path):
    folder = shutil.copytree(DATA / "pre_norm", tmp_path / "opt")
    shutil.copytree(DATA / "tokenizer", folder, dirs_exist_ok=True)
    options = {
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "max_new_tokens": 9,
        "min_new_tokens": 1,
        "repetition_penalty": 1.5,
        "eos_token_id": [2, 3],
        "pad_token_id": 1,
    }
    (folder / "generation_config.json").write_text(json.dumps(options))
    tokens = {"add_bos_token": True, "bos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return folder


@pytest.mark.parametrize("name", JSON_FILES)
def test_any_json_of_a_model_is_read_or_refused(opt_folder, name):
    path = opt_folder / name
    good = path.read_bytes()
    keys = st.sampled_from([*json.loads(good), *JSON_FILES[name]])
    changes = st.dictionaries(keys, json_values | st.just(...), min_size=1, max_size=2)
    changed = st.builds(
        lambda changes: {
            k: v for k, v in (json.loads(good) | changes).items() if v is not ...
        },
        changes,
    )
    contents = (changed | json_values).map(lambda value: json.dumps(value).encode())

    @some_examples
    @given(contents | damages().map(lambda damage: damage(good)))
    def check(content):
        path.write_bytes(content)
        try:
            with warnings.catch_warnings(action="ignore"):
                opt.GenerationConfig.from_pretrained(opt_folder)
                opt.from_pretrained(opt_folder)
        except ValueError as error:  # CheckpointError is one
            assert 10 < len(str(error)) < 2000  # noqa: PT017

    check()
