"""Files that one process at a time writes."""

import errno
import fcntl
import os
from typing import IO, Any


def try_lock(file: IO[Any]) -> bool:
    """Locks an open file until it is closed, against all that lock it too.

    Returns:
      False if somebody else has it, or has removed it since it was opened. True where
      the file system has no locks: one process is the rule.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except FileNotFoundError:
        return False
