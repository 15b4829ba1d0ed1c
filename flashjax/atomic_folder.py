"""Folders that appear whole or not at all."""

import contextlib
import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class CheckpointError(ValueError):
    """A folder or file that cannot be read or written as a checkpoint."""


@contextlib.contextmanager
def atomic_folder(
    path: str | os.PathLike, *, overwrite: bool = False
) -> Iterator[Path]:
    """Gives a temporary sibling folder that becomes ``path`` when the block succeeds.

    Whatever goes wrong, ``path`` is as it was before and the temporary folder is gone.

    Args:
      path: the folder to write.
      overwrite: replace an existing model folder as a whole.

    Yields:
      The folder to write into.

    Raises:
      CheckpointError: ``path`` is a file, or holds something and overwrite is False, or
        is no model folder that could safely be replaced, or cannot be made; or the disk
        is full.
    """
    target = Path(path).resolve()
    _check_target(target, overwrite)
    unique = uuid.uuid4().hex[:12]
    temporary = target.with_name(f".{target.name}.{unique}.tmp")
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
        except OSError as error:
            if error.errno in _DISK_FULL:
                raise
            raise CheckpointError(
                f"{target}: expected a folder that can be made, got: {error.strerror}"
            ) from error
        yield temporary
        # A disk can also turn out full only when the data reaches it.
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as handle:
                    os.fsync(handle.fileno())
        _check_target(target, overwrite)
        _replace_folder(temporary, target, unique)
    except (OSError, SafetensorError) as error:
        code = _error_number(error)
        if code not in _DISK_FULL:
            if isinstance(error, OSError):
                raise
            raise CheckpointError(f"{target}: not saved: {error}") from error
        shutil.rmtree(temporary, ignore_errors=True)
        there = next(parent for parent in target.parents if parent.exists())
        free = shutil.disk_usage(there).free
        raise CheckpointError(
            f"{target}: not saved, nothing was left behind: {os.strerror(code)} "
            f"({free:,} bytes free)"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_target(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise CheckpointError(f"{target}: expected a new or empty folder, got a file")
    content = list(target.iterdir())
    if not content:
        return
    if not overwrite:
        raise CheckpointError(
            f"{target}: expected a new or empty folder, got one that holds "
            f"{len(content)} files (overwrite replaces it)"
        )
    # Overwriting removes all that is in there, so it must look like one of ours.
    folders = [p.name for p in content if p.is_dir()]
    if folders or not any(
        p.name == "config.json" or p.suffix == ".safetensors" for p in content
    ):
        holds = f"the folder {folders[0]}" if folders else "no config.json"
        raise CheckpointError(
            f"{target}: only a model folder can be overwritten, got one with {holds}"
        )


def _replace_folder(temporary: Path, target: Path, unique: str) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    old = target.with_name(f".{target.name}.{unique}.old")
    target.rename(old)
    try:
        temporary.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _error_number(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # safetensors reports what the system said as text.
    found = re.search(r"os error (\d+)", str(error))
    return int(found.group(1)) if found else None
