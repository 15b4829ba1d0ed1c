"""Folders that appear whole or not at all, full disks included."""

import contextlib
import errno
import os
import resource
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from flashjax.checkpoint import (
    CheckpointError,
    CheckpointReader,
    CheckpointWriter,
    atomic_folder,
    writer,
)


def siblings(path):
    return sorted(p.name for p in path.parent.iterdir())


def test_atomic_folder_creates(tmp_path):
    target = tmp_path / "deep" / "model"
    with atomic_folder(target) as folder:
        (folder / "config.json").write_text("{}")
        assert not target.exists()
    assert siblings(target) == ["model"]
    assert (target / "config.json").read_text() == "{}"


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "io"), ValueError("x"), KeyboardInterrupt()]
)
def test_atomic_folder_leaves_nothing(tmp_path, error):
    target = tmp_path / "model"

    def fill():
        with atomic_folder(target) as folder:
            (folder / "half").write_text("half")
            raise error

    with pytest.raises(type(error)):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_atomic_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(CheckpointError, match=r"file/model: expected a folder that can"),
        atomic_folder(tmp_path / "file" / "model"),
    ):
        pass
    assert (tmp_path / "file").read_text() == "x"


def old_model(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("old")
    return target


def refused(target, message, overwrite=False):
    ran = False
    with (
        pytest.raises(CheckpointError, match=message),
        atomic_folder(target, overwrite=overwrite),
    ):
        ran = True
    return not ran


def test_atomic_folder_refuses_existing(tmp_path):
    target = old_model(tmp_path)
    assert refused(target, "expected a new or empty folder")
    assert refused(target / "config.json", "got a file")
    assert siblings(target) == ["model"]


def test_atomic_folder_overwrites_as_a_whole(tmp_path):
    target = old_model(tmp_path)
    (target / "stale").write_text("old")
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert siblings(target) == ["model"]
    assert [p.name for p in target.iterdir()] == ["config.json"]
    assert (target / "config.json").read_text() == "new"


def test_atomic_folder_overwrites_only_models(tmp_path):
    target = tmp_path / "home"
    (target / "letters").mkdir(parents=True)
    assert refused(target, "only a model folder", overwrite=True)
    (target / "letters").rename(target / "letters.txt")
    (target / "letters.txt").rmdir()
    (target / "letters.txt").write_text("dear")
    assert refused(target, r"no config\.json", overwrite=True)
    assert (target / "letters.txt").exists()


def test_overwrites_where_folders_cannot_be_exchanged(tmp_path, monkeypatch):
    target = old_model(tmp_path)
    monkeypatch.setattr("flashjax.atomic_folder._exchange", lambda a, b: False)
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert siblings(target) == ["model"]
    assert (target / "config.json").read_text() == "new"


def test_atomic_folder_keeps_the_old_one(tmp_path, monkeypatch):
    target = old_model(tmp_path)
    monkeypatch.setattr("flashjax.atomic_folder._exchange", lambda a, b: False)
    rename = Path.rename

    def failing(source, destination):
        if source.suffix == ".tmp":
            raise OSError(errno.EIO, "io")
        return rename(source, destination)

    monkeypatch.setattr(Path, "rename", failing)
    with (
        pytest.raises(OSError, match="io"),
        atomic_folder(target, overwrite=True) as folder,
    ):
        (folder / "config.json").write_text("new")
    assert siblings(target) == ["model"]
    assert (target / "config.json").read_text() == "old"


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("where", ["write", "safetensors", "fsync"])
def test_disk_full(tmp_path, monkeypatch, existing, where):
    target = old_model(tmp_path) if existing else tmp_path / "model"
    before = siblings(target)

    def full(*unused, **unused_too):
        if where == "safetensors":
            raise SafetensorError("I/O error: full (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(writer, "save_file", full)
    with pytest.raises(CheckpointError, match=r"not saved.*No space left.*bytes free"):
        save(target, 3, overwrite=existing)
    assert siblings(target) == before
    if existing:
        assert (target / "config.json").read_text() == "old"


def save(target, size, overwrite=False):
    with (
        atomic_folder(target, overwrite=overwrite) as folder,
        CheckpointWriter(folder) as tensors,
    ):
        tensors.add("a", np.ones(size, np.float32))
        tensors.close()


@pytest.fixture
def small_files_only():
    """Files may have 100 kB, as if the disk were full then."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_that_does_not_fit(tmp_path, small_files_only):
    target = old_model(tmp_path)
    with pytest.raises(CheckpointError, match=r"not saved.*File too large"):
        save(target, 1_000_000, overwrite=True)
    assert siblings(target) == ["model"]
    assert (target / "config.json").read_text() == "old"


def test_what_fails_while_a_shard_is_written(tmp_path, monkeypatch):
    begun = threading.Event()

    def full(*unused):
        begun.wait()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "save_tensors", full)
    with CheckpointWriter(tmp_path, shard_bytes=1) as tensors:
        tensors.add("a", np.ones(3))  # does not wait
        begun.set()
        with pytest.raises(OSError, match="No space"):
            tensors.add("b", np.ones(3))
        with pytest.raises(OSError, match="No space"):
            tensors.close()


def test_an_error_waits_for_the_shard_that_is_written(tmp_path, monkeypatch):
    begun, ended = threading.Event(), []

    def slow(*unused):
        begun.set()
        time.sleep(0.1)
        ended.append(True)

    monkeypatch.setattr(writer, "save_and_sync", slow)

    def interrupted():
        with CheckpointWriter(tmp_path, shard_bytes=1) as tensors:
            tensors.add("a", np.ones(3))
            begun.wait()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert ended


def add(tensors, *names):
    for name in names:
        tensors.add(name, np.full(3, ord(name)))


@pytest.mark.parametrize("old", [1, 1 << 30])
@pytest.mark.parametrize("new", [1, 1 << 30])
def test_a_folder_with_weights_is_refused(tmp_path, old, new):
    with CheckpointWriter(tmp_path, shard_bytes=old) as tensors:
        add(tensors, "a", "b")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    found = "model-00001-of-00002.*index" if old == 1 else r"model\.safetensors$"
    with pytest.raises(CheckpointError, match=f"without weights, got.* {found}"):
        CheckpointWriter(tmp_path, shard_bytes=new)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "name",
    ["model.safetensors.index.json", "part-00000.safetensors", "model.safetensors"],
)
def test_what_is_left_of_weights_is_refused(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=f"without weights, got one .* {name}"):
        CheckpointWriter(tmp_path)


def test_other_files_of_a_folder_are_kept(tmp_path):
    for name in ("config.json", "model-card.md", "adapter.safetensors"):
        (tmp_path / name).write_text("x")
    with CheckpointWriter(tmp_path) as tensors:
        add(tensors, "a")
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("shard_bytes", [1, 1 << 30])
def test_two_writers_in_a_folder(tmp_path, shard_bytes):
    with CheckpointWriter(tmp_path) as first:
        with CheckpointWriter(tmp_path, shard_bytes) as second:
            add(second, "a", "b")
        add(first, "c")
        with pytest.raises(CheckpointError, match="expected a folder without weights"):
            first.close()
    with CheckpointReader(tmp_path) as reader:
        assert reader.names() == ["a", "b"]
        assert reader.load("b")[0] == ord("b")
    assert not list(tmp_path.glob("part-*"))


@pytest.mark.parametrize("kind", ["nothing", "a file"])
def test_a_writer_needs_a_folder(tmp_path, kind):
    folder = tmp_path / "model"
    if kind == "a file":
        folder.touch()
    with pytest.raises(CheckpointError, match=f"model: expected .* folder, got {kind}"):
        CheckpointWriter(folder)


@pytest.mark.parametrize("shard_bytes", [1, 1 << 30])
def test_a_block_without_an_error_closes(tmp_path, shard_bytes):
    with CheckpointWriter(tmp_path, shard_bytes) as tensors:
        add(tensors, "a", "b")
    with CheckpointReader(tmp_path) as reader:
        assert reader.names() == ["a", "b"]
    before = siblings(tmp_path / "x")
    assert tensors.close() == tensors.close() == 48
    assert siblings(tmp_path / "x") == before
    for method in (tensors.add, tensors.add_sparse):
        with pytest.raises(CheckpointError, match="expected a writer that is open"):
            method("c", np.eye(3, dtype=np.float16))


@pytest.mark.parametrize("shard_bytes", [1, 1 << 30])
def test_a_block_with_an_error_leaves_no_files(tmp_path, shard_bytes):
    (tmp_path / "config.json").touch()

    def interrupted():
        with CheckpointWriter(tmp_path, shard_bytes) as tensors:
            add(tensors, "a", "b")
            writers.append(tensors)
            raise KeyboardInterrupt

    writers = []
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert siblings(tmp_path / "x") == ["config.json"]
    for call in (writers[0].close, lambda: add(writers[0], "c")):
        with pytest.raises(CheckpointError, match="open, got one that has failed"):
            call()


@pytest.mark.parametrize("name", ["-00002-of", "index"])
def test_a_close_that_fails_leaves_no_files(tmp_path, monkeypatch, name):
    rename, write_text = Path.rename, Path.write_text

    def failing(function):
        def call(path, argument, *rest):
            if name in str(path) + str(argument)[:200]:
                raise OSError(errno.EIO, "io")
            return function(path, argument, *rest)

        return call

    monkeypatch.setattr(Path, "rename", failing(rename))
    monkeypatch.setattr(Path, "write_text", failing(write_text))
    with CheckpointWriter(tmp_path, shard_bytes=1) as tensors:
        add(tensors, "a", "b")
        with pytest.raises(OSError, match="io"):
            tensors.close()
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_was_caught_is_raised_at_the_end(tmp_path, monkeypatch):
    def full(path, *unused):
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "save_tensors", full)

    def ignoring():
        with CheckpointWriter(tmp_path, shard_bytes=1) as tensors:
            add(tensors, "a")
            with contextlib.suppress(OSError):
                add(tensors, "b")

    with pytest.raises(OSError, match="No space"):
        ignoring()
    assert list(tmp_path.iterdir()) == []
