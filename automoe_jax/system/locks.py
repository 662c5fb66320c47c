"""Locks on folders, which end with the process that holds them."""

import contextlib
import fcntl
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from automoe_jax.system.errors import UserError

LOCK = ".lock"
# Descriptors of the locks of this process, by device and inode. The system releases a lock when
# its descriptor is closed: at the end of the process, however it ends.
_held: dict[tuple[int, int], int] = {}


def hold(folder: Path):
    """Locks a folder until this process ends; again is allowed.

    Raises `UserError`, which names the process, if another one holds the lock. On a file system
    without locks nothing is locked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    status = os.fstat(file)
    inode = status.st_dev, status.st_ino
    if inode in _held:
        os.close(file)
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(_this_process()).encode(), 0)
    except BlockingIOError:
        holder = _name(os.pread(file, 4096, 0))
        os.close(file)
        raise UserError(
            f"{folder} is in use by {holder}; wait until it ends, stop it, or name another "
            "--workdir"
        ) from None
    except OSError:
        pass  # no locks on this file system, or no room to say whose it is
    _held[inode] = file


@contextlib.contextmanager
def held_if_free(folder: Path) -> Iterator[bool]:
    """Locks a folder within a `with`; False if it is locked already, by whatever process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        status = os.fstat(file.fileno())
        free = (status.st_dev, status.st_ino) not in _held
        if free:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                free = False
            except OSError:
                pass  # no locks on this file system
        yield free


def _this_process() -> dict[str, str | int]:
    command = " ".join(Path(arg).name if arg == sys.argv[0] else arg for arg in sys.argv)
    return {"pid": os.getpid(), "host": platform.node(), "command": command}


def _name(content: bytes) -> str:
    """The holder in words, from the content of its lock."""
    try:
        holder = json.loads(content)
        return f"process {holder['pid']} on {holder['host']} ({holder['command'][:200]})"
    except (ValueError, KeyError, TypeError):
        return "another process"
