"""Files that one process at a time writes."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


def try_lock(file: IO[Any]) -> bool:
    """Locks a file, open for writing, until it is closed, against all that lock it too.

    Returns:
      False if somebody else has it, or has removed it since it was opened. True where
      the file system has no locks: one process is the rule.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits until nobody else is in a block with the same file.

    The file is made and stays. Where the file system has no locks, nobody waits.

    Raises:
      OSError: the file cannot be made.
    """
    with open(path, "ab") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
