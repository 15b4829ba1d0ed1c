"""Folders that appear whole or not at all."""

import contextlib
import ctypes
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
    path: str | os.PathLike[str], *, overwrite: bool = False
) -> Iterator[Path]:
    """Gives a temporary sibling folder that becomes ``path`` when the block succeeds.

    Whatever goes wrong, ``path`` is as it was before and the temporary folder is gone.
    A process that is killed leaves ``path`` as it was or as it was to be, and perhaps
    the temporary folder, ``.NAME.*.tmp``. (On file systems that cannot exchange two
    folders there is a moment at which the old one is ``.NAME.*.old``.)

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
    check_target(target, overwrite)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
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
        sync_files(temporary)
        check_target(target, overwrite)
        replace_folder(temporary, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = disk_full_reason(error, target)
        if reason is None:
            if isinstance(error, OSError):
                raise
            raise CheckpointError(f"{target}: not saved: {error}") from error
        raise CheckpointError(
            f"{target}: not saved, nothing was left behind: {reason}"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync_files(folder: Path) -> None:
    """Waits until a folder's files are on the disk: it can turn out full only then."""
    for file in folder.rglob("*"):
        if file.is_file():
            sync_file(file)
    _sync_folder(folder)


def sync_file(file: Path) -> None:
    """Waits until a file is on the disk."""
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems do not sync folders.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)


def disk_full_reason(error: Exception, target: Path) -> str | None:
    """What the system says of a full disk and the room there is; None: it is not full.

    Args:
      error: raised while a file was written, by the system or by safetensors.
      target: what could not be written.
    """
    code = _error_number(error)
    if code not in _DISK_FULL:
        return None
    there = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(there).free
    return f"{os.strerror(code)} ({free:,} bytes free)"


def check_target(target: Path, overwrite: bool) -> None:
    """Checks that a folder can be written.

    Raises:
      CheckpointError: it is a file; or holds something, and overwrite is False or it is
        no model folder.
    """
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


def replace_folder(temporary: Path, target: Path) -> None:
    """Moves a folder to where there is none, or another that is removed."""
    if not target.exists():
        temporary.rename(target)
        _sync_folder(target.parent)
        return
    if _exchange(temporary, target):
        _sync_folder(target.parent)
        shutil.rmtree(temporary, ignore_errors=True)
        return
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.old")
    target.rename(old)
    try:
        temporary.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two folders in a single step, where the system can."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = ctypes.c_int(-100), ctypes.c_uint(2)  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


def _error_number(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # safetensors reports what the system said as text.
    found = re.search(r"os error (\d+)", str(error))
    return int(found.group(1)) if found else None
