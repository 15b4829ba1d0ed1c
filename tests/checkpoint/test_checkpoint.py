"""The on-disk form, and files that contradict themselves."""

import errno
import json
import os
import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import flashjax as fj
from flashjax import checkpoint, checkpoint_files
from flashjax.checkpoint import (
    CheckpointError,
    CheckpointReader,
    CheckpointWriter,
    arrays,
    tensor_file,
)

HALVES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


def random_sparse(shape, dtype, sparsity=0.7, seed=0):
    rng = np.random.default_rng(seed)
    dense = rng.standard_normal(shape).astype(dtype)
    dense[rng.random(shape) < sparsity] = 0
    return dense


def same_bits(a, b):
    return a.dtype == b.dtype and np.array_equal(a.view(np.uint16), b.view(np.uint16))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "shape",
    [(0, 0), (0, 5), (1, 1), (7, 13), (16, 64), (3, 0), (521, 997), (512, 1024)],
)
@pytest.mark.parametrize("sparsity", [0.0, 0.6, 1.0])
def test_round_trip(shape, dtype, sparsity):
    dense = random_sparse(shape, dtype, sparsity)
    bitmap, values = checkpoint.encode(dense)
    assert bitmap.shape == (-(-dense.size // 8),)
    assert values.shape == (np.count_nonzero(dense.astype(np.float32)),)
    assert same_bits(checkpoint.decode(bitmap, values, shape), dense)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 2**16 - 1), max_size=60),
    st.sampled_from(HALVES),
)
def test_every_bit_pattern_survives(bits, dtype):
    dense = np.array(bits, np.uint16).view(dtype).reshape(1, -1)
    decoded = checkpoint.decode(*checkpoint.encode(dense), dense.shape)
    expected = np.array([0 if b == 0x8000 else b for b in bits], np.uint16)
    assert np.array_equal(decoded.view(np.uint16)[0], expected)


def test_encode_is_the_documented_form():
    dense = np.zeros((2, 5), np.float16)
    dense[0, 1], dense[1, 4] = 2, 3
    bitmap, values = checkpoint.encode(dense)
    assert bitmap.tolist() == [0b00000010, 0b00000010]
    assert values.tolist() == [2, 3]


@pytest.mark.parametrize(
    "dense", [np.zeros((2, 2), np.float32), np.zeros(4, np.float16)]
)
def test_encode_refuses(dense):
    with pytest.raises(ValueError, match="float16 or bfloat16 matrix, got"):
        checkpoint.encode(dense)


def sample():
    dense = random_sparse((3, 5), np.float16)
    return *checkpoint.encode(dense), dense.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b, v, s: (b[:-1], v, s), "bitmap shape.*expected"),
        (lambda b, v, s: (b, v, (2**30, 2**30)), "bitmap shape.*expected"),
        (lambda b, v, s: (b.astype(np.int8), v, s), "expected uint8, got int8"),
        (lambda b, v, s: (b, v[:-1], s), "number of values"),
        (lambda b, v, s: (b, np.append(v, v), s), "number of values"),
        (lambda b, v, s: (b, v.astype(np.float32), s), "got float32"),
        (lambda b, v, s: (b, v[None], s), "values rank: expected 1, got 2"),
        (lambda b, v, s: (b | np.uint8(0x80), v, s), "unused bits"),
    ],
)
def test_decode_refuses_contradictions(change, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoint.decode(*change(*sample()))


def test_decode_checks_the_promised_dtype():
    with pytest.raises(CheckpointError, match="expected bfloat16, got float16"):
        checkpoint.decode(*sample(), HALVES[1])


def metadata(**changes):
    content = {"format": "flashjax-sparse", "version": 1, "sparse": {}} | changes
    return {"flashjax": json.dumps(content)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"flashjax": "{"}, "expected JSON"),
        ({"flashjax": "[" * 100_000}, "expected JSON"),
        ({"flashjax": "3"}, "expected object, got int"),
        (metadata(format="other"), "expected flashjax-sparse, got other"),
        (metadata(version=2), "expected version 1, got 2; a newer FlashJAX"),
        (metadata(version=True), "expected version 1, got True"),
        (metadata(version="1"), "expected version 1, got '1'"),
        (metadata(sparse=None), "expected object, got nothing"),
        (metadata(sparse={"w": 1}), "entry 'w': expected object"),
        (metadata(sparse={"w": {"shape": [1], "dtype": "float16"}}), "shape of 'w'"),
        (metadata(sparse={"w": {"shape": [-1, 1], "dtype": "float16"}}), "shape"),
        (metadata(sparse={"w": {"shape": [1, 2**40], "dtype": "float16"}}), "shape"),
        (metadata(sparse={"w": {"shape": [1, 1.5], "dtype": "float16"}}), "shape"),
        (metadata(sparse={"w": {"shape": [1, 1], "dtype": "float32"}}), "got float32"),
        (metadata(sparse={"w": {"shape": [1, 1], "dtype": []}}), "dtype of 'w'"),
    ],
)
def test_metadata_refused(content, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoint.parse_metadata(content)


def test_metadata_of_others_is_ignored():
    assert checkpoint.parse_metadata(None) == {}
    assert checkpoint.parse_metadata({"format": "pt"}) == {}


def write(folder, tensors, sparse, shard_bytes=1 << 30):
    folder.mkdir(exist_ok=True)
    with CheckpointWriter(folder, shard_bytes) as writer:
        for name, array in tensors.items():
            (writer.add_sparse if name in sparse else writer.add)(name, array)
        return writer.close()


@pytest.mark.parametrize("shard_bytes", [1, 60, 1 << 30])
def test_folder_round_trip(tmp_path, shard_bytes):
    tensors = {
        "a.weight": random_sparse((6, 9), np.float16),
        "b.weight": random_sparse((9, 6), HALVES[1]),
        "a.bias": np.arange(6, dtype=np.float32),
        "scale": np.array(2.0, np.float32),
        "transposed": np.arange(6, dtype=np.float16).reshape(2, 3).T,
    }
    sparse = {"a.weight", "b.weight"}
    total = write(tmp_path, tensors, sparse, shard_bytes)
    with CheckpointReader(tmp_path) as reader:
        assert reader.names() == sorted(tensors)
        as_stored = reader.names_as_stored()
        if shard_bytes == 1:
            assert as_stored == list(tensors)  # a file each
        assert sorted(as_stored) == sorted(tensors)
        assert set(reader.sparse) == sparse
        assert sum(reader.stored_bytes(n) for n in reader.names()) == total
        for name, array in tensors.items():
            assert name in reader
            assert reader.shape(name) == array.shape
            assert reader.dtype(name) == array.dtype
            loaded = reader.load(name)
            assert loaded.dtype == array.dtype
            assert np.array_equal(loaded, array)
    sharded = (tmp_path / checkpoint.INDEX_NAME).exists()
    assert sharded == (shard_bytes < 1 << 30)
    assert not list(tmp_path.glob("part-*"))


def test_files_have_the_usual_mode(tmp_path):
    write(tmp_path, {"a": np.zeros(3, np.float32)}, ())
    (tmp_path / "other").touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_empty_folder_round_trip(tmp_path):
    write(tmp_path, {}, ())
    assert CheckpointReader(tmp_path).names() == []


LAYOUTS = {
    "transposed": lambda array: array.T,
    "strided": lambda array: np.repeat(array, 2, axis=1)[:, ::2],
    "backward": lambda array: array[::-1],
    "no elements": lambda array: array[:0],
    "one number": lambda array: array[0, 0],
    "big-endian": lambda array: array.astype(array.dtype.newbyteorder(">")),
    "JAX": jnp.asarray,
    "JAX, transposed": lambda array: jnp.asarray(array).T,
    "list": lambda array: array.tolist(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_any_layout_is_stored_as_it_reads(tmp_path, layout, dtype):
    array = LAYOUTS[layout](np.arange(1, 7, dtype=dtype).reshape(2, 3))
    expected = np.asarray(array)
    tensors, sparse = {"w": array}, set()
    if expected.ndim == 2 and expected.dtype.type is np.float16:
        tensors["s"] = array
        sparse.add("s")
    write(tmp_path, tensors, sparse)
    path = tmp_path / "other"
    checkpoint.save_tensors(str(path), {"w": array}, {})
    found = [checkpoint_files.read_file(path)["w"]]
    with CheckpointReader(tmp_path) as reader:
        found += [reader.load(name) for name in tensors]
    for loaded in found:
        assert loaded.dtype == expected.dtype.newbyteorder("=")
        np.testing.assert_array_equal(loaded, expected)


@pytest.mark.parametrize("dtype", arrays.DTYPES.values(), ids=str)
def test_every_dtype_that_is_written_is_read(tmp_path, dtype):
    array = np.array([[0, 1, 1], [1, 0, 3]]).astype(dtype)
    write(tmp_path, {"w": array, "n": array[0, 1]}, ())
    with CheckpointReader(tmp_path) as reader:
        assert reader.dtype("w") == reader.load("n").dtype == dtype
        np.testing.assert_array_equal(reader.load("w"), array)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(3, ml_dtypes.float8_e4m3fn),
        np.zeros(3, ml_dtypes.int4),
        np.zeros(3, np.complex64),
        np.array(["a"]),
        np.array([None]),
        np.zeros(3, "f4,f4"),
    ],
    ids=lambda array: str(array.dtype),
)
def test_dtypes_that_no_reader_takes(tmp_path, array):
    message = re.escape("w: dtype: expected float64, float32, float16, bfloat16, int64")
    with CheckpointWriter(tmp_path) as writer:
        writer.add("before", np.ones(2))
        with pytest.raises(CheckpointError, match=f"{message}.*, got "):
            writer.add("w", array)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save_tensors(tmp_path / "other", {"w": array}, {})
    assert CheckpointReader(tmp_path).names() == ["before"]
    assert not (tmp_path / "other").exists()


MATRIX = fj.SparseMatrix.from_dense(np.eye(4, dtype=np.float16))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: w.add("w", MATRIX), "^w: expected .* array, got SparseMatrix"),
        (lambda w: w.add_sparse("w", MATRIX), "^w: expected .*, got SparseMatrix"),
        (lambda w: w.add("w", None), "^w: expected .* array, got NoneType"),
        (lambda w: w.add(3, np.ones(2)), "string as a tensor's name, got int"),
        (lambda w: w.add_sparse(3, np.eye(2)), "string as a tensor's name, got int"),
        (lambda w: checkpoint.encode(MATRIX), "expected .* array, got SparseMatrix"),
        (lambda w: checkpoint.to_arrays(np.eye(2)), "SparseMatrix, got ndarray"),
        (lambda w: checkpoint.save_tensors("x", {"w": MATRIX}, {}), "^w: expected"),
    ],
)
def test_wrong_types(tmp_path, call, message):
    with CheckpointWriter(tmp_path) as writer, pytest.raises(TypeError, match=message):
        call(writer)


@pytest.mark.parametrize("name", ["__metadata__", "\ud800"])
def test_names_that_no_file_can_have(tmp_path, name):
    with (
        CheckpointWriter(tmp_path) as writer,
        pytest.raises(CheckpointError, match="expected a tensor's name in UTF-8"),
    ):
        writer.add(name, np.ones(2))


@pytest.mark.parametrize("shard_bytes", [1, 1 << 30])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("add", "w"), ("add", "w")),
        (("add", "w"), ("add_sparse", "w")),
        (("add_sparse", "w"), ("add", "w")),
        (("add_sparse", "w"), ("add_sparse", "w")),
        (("add_sparse", "w"), ("add", "w.values")),
        (("add", "w.bitmap"), ("add_sparse", "w")),
    ],
)
def test_a_name_that_is_added_twice(tmp_path, first, second, shard_bytes):
    method, name = first
    weight = np.eye(3, dtype=np.float16)
    with CheckpointWriter(tmp_path, shard_bytes) as writer:
        getattr(writer, method)(name, weight)
        with pytest.raises(CheckpointError, match=r"every tensor once, got 'w.* twice"):
            getattr(writer, second[0])(second[1], weight * 2)
    with CheckpointReader(tmp_path) as reader:
        assert reader.names() == [name]
        np.testing.assert_array_equal(reader.load(name), weight)


def test_an_array_may_be_used_again(tmp_path):
    buffer = np.zeros((2, 3), np.float16)
    view = buffer.view()
    view.flags.writeable = False
    with CheckpointWriter(tmp_path) as writer:
        for i, given in enumerate([buffer, view, buffer[1:], memoryview(buffer)]):
            buffer[:] = i
            writer.add(str(i), given)
        buffer[:] = 4
        writer.add_sparse("4", buffer)
        buffer[:] = 5
    with CheckpointReader(tmp_path) as reader:
        for name in reader.names():
            np.testing.assert_array_equal(reader.load(name), int(name))


def test_arrays_of_jax_need_no_copy():
    array = np.asarray(jnp.ones((2, 3)))
    assert not arrays.may_change(array)
    assert not arrays.may_change(array.T)
    assert arrays.may_change(array.copy()[1:])


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "foreign"])
def test_no_model_folder(tmp_path, kind):
    folder = tmp_path / "x"
    if kind == "file":
        folder.write_text("hello")
    elif kind != "missing":
        folder.mkdir()
    if kind == "foreign":
        (folder / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"expected .*, got"):
        CheckpointReader(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file(tmp_path, keep):
    write(tmp_path, {"a": random_sparse((9, 9), np.float16)}, {"a"})
    path = tmp_path / checkpoint.WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="expected a whole safetensors file"):
        CheckpointReader(tmp_path)


def test_a_reader_that_was_closed(tmp_path):
    weight = random_sparse((9, 9), np.float16)
    write(tmp_path, {"a": weight, "b": weight}, {"a"})
    reader = CheckpointReader(tmp_path)
    reader.close()
    reader.close()
    for call in (reader.load, reader.load_rows, reader.nnz, reader.counted_nnz):
        with pytest.raises(CheckpointError, match="a: expected a reader that is open"):
            call("a")
    with pytest.raises(CheckpointError, match="b: expected a reader that is open"):
        reader.load("b")


def test_what_only_sparse_weights_have(tmp_path):
    write(tmp_path, {"b": random_sparse((9, 9), np.float16)}, ())
    with CheckpointReader(tmp_path) as reader:
        for call in (reader.nnz, reader.counted_nnz, reader.load_rows):
            with pytest.raises(CheckpointError, match="'b': expected a sparse weight"):
                call("b")
            with pytest.raises(KeyError, match="gone"):
                call("gone")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    write(tmp_path, {"a": random_sparse((9, 9), np.float16)}, {"a"})

    def refuse(path, *args):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    # Not by the file's mode: tests may run as root.
    monkeypatch.setattr(tensor_file, "open", refuse, raising=False)
    with pytest.raises(CheckpointError, match=r"file, got Permission denied$"):
        CheckpointReader(tmp_path)


def test_a_file_that_git_lfs_did_not_download(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / checkpoint.WEIGHTS_NAME).write_text(pointer)
    with pytest.raises(CheckpointError, match="got a Git LFS pointer"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("remove", [False, True])
def test_file_that_changes_while_it_is_open(tmp_path, remove):
    write(tmp_path, {"a": random_sparse((9, 9), np.float16)}, set())
    path = tmp_path / checkpoint.WEIGHTS_NAME
    with CheckpointReader(tmp_path) as reader:
        if remove:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-1])
        found = "No such file" if remove else "bytes: expected 162, got fewer"
        with pytest.raises(CheckpointError, match=found):
            reader.load("a")


@pytest.mark.parametrize(
    "file_name",
    [
        "../out.safetensors",
        "/etc/x.safetensors",
        "",
        ".",
        3,
        "a\0.safetensors",
        "x.bin",
    ],
)
def test_index_must_stay_inside(tmp_path, file_name):
    folder = tmp_path / "model"
    write(folder, {"a": np.zeros(3, np.float32)}, ())
    (folder / checkpoint.WEIGHTS_NAME).rename(tmp_path / "out.safetensors")
    index = {"weight_map": {"a": file_name}}
    (folder / checkpoint.INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="file of the folder"):
        CheckpointReader(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "expected JSON"),
        ("[]", "expected object"),
        ("{}", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors is missing"),
        ('{"weight_map": {"b": "model.safetensors"}}', "'b'.*is missing"),
        (b"\xff\xfe", "expected JSON"),
    ],
)
def test_bad_index(tmp_path, index, message):
    write(tmp_path, {"a": np.zeros(3, np.float32)}, ())
    index = index.encode() if isinstance(index, str) else index
    (tmp_path / checkpoint.INDEX_NAME).write_bytes(index)
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(tmp_path)


def rewrite(folder, change, metadata=None):
    """Changes the tensors or the metadata of a written file."""
    path = folder / checkpoint.WEIGHTS_NAME
    tensors = {name: array.copy() for name, array in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata=metadata or sparse_metadata())


def sparse_metadata(shape=(4, 6), dtype=HALVES[0]):
    entry = checkpoint.SparseEntry(shape, dtype)
    return checkpoint.format_metadata({"a": entry})


@pytest.mark.parametrize(
    ("change", "meta", "message"),
    [
        (lambda t: t.pop("a.bitmap"), None, "'a.bitmap' is missing"),
        (lambda t: t.pop("a.values"), None, "'a.values' is missing"),
        (lambda t: t.update(a=t["a.values"]), None, "both sparse and dense"),
        (lambda t: t["a.bitmap"].fill(0), None, "number of values"),
        (lambda t: None, sparse_metadata((4, 7)), "bitmap shape"),
        (lambda t: None, sparse_metadata((4, 6), HALVES[1]), "expected bfloat16"),
    ],
)
def test_hostile_tensors(tmp_path, change, meta, message):
    write(tmp_path, {"a": random_sparse((4, 6), np.float16)}, {"a"})
    rewrite(tmp_path, change, meta)
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(tmp_path).load("a")


def test_equal_content_gives_equal_bytes(tmp_path):
    tensors = {"é": np.zeros(3), "b": np.ones(2, np.float16)}
    for i in range(8):
        checkpoint.save_tensors(tmp_path / str(i), tensors, {})
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    loaded = load_file(tmp_path / "0")
    assert loaded.keys() == tensors.keys()


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_single_files(tmp_path, damage):
    weight = np.array([[0, 1.5], [2, 0]], np.float16)
    size, names = checkpoint_files.write_file(
        tmp_path / "a", {"x": np.ones(2)}, {"w": weight}
    )
    assert size == 16 + 1 + 4
    assert names == ["w.bitmap", "w.values", "x"]
    checkpoint_files.write_file(tmp_path / "b", {"y": np.ones(1)}, {})
    checkpoint_files.merge_files([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    found = checkpoint_files.read_file(tmp_path / "c")
    assert found.keys() == {"w", "x", "y"}
    np.testing.assert_array_equal(found["w"], weight)
    if damage == "truncated":
        (tmp_path / "c").write_bytes((tmp_path / "c").read_bytes()[:-1])
        message = "expected a whole safetensors file"
    else:
        entries = {"gone": checkpoint.SparseEntry((1, 1), weight.dtype)}
        checkpoint.save_tensors(tmp_path / "c", {"y": np.ones(1)}, entries)
        message = "the tensor 'gone.bitmap' is missing"
    with pytest.raises(CheckpointError, match=message):
        checkpoint_files.read_file(tmp_path / "c")


@pytest.mark.parametrize("shard_bytes", [0, -1, 1.5, True, "1GB", None])
def test_bad_shard_bytes(tmp_path, shard_bytes):
    with pytest.raises(ValueError, match="expected shard_bytes of at least 1, got"):
        checkpoint.CheckpointWriter(tmp_path, shard_bytes=shard_bytes)
    assert not list(tmp_path.iterdir())
