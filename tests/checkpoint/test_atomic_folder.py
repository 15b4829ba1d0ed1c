"""Folders that appear whole or not at all, full disks included."""

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
