"""The user's own cache: folders of code that is loaded and run, which nobody else may write."""

import os
import tempfile
from pathlib import Path

_OTHERS_MAY_WRITE = 0o022


def folder() -> Path:
    """`$XDG_CACHE_HOME/automoe_jax`, else `~/.cache/automoe_jax`, mode 0700.

    Where that cannot be written, a folder of this user among the temporary ones. `OSError` where
    neither can be had for this user alone.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    try:
        return private(Path(base) / "automoe_jax")
    except OSError:
        return private(Path(tempfile.gettempdir()) / f"automoe_jax-{os.getuid()}")


def private(path: Path) -> Path:
    """A folder for this user alone, made if need be; `OSError` where others may write to it."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = path.stat()
    if about.st_uid != os.getuid():
        raise PermissionError(f"{path} belongs to somebody else")
    if about.st_mode & _OTHERS_MAY_WRITE:
        raise PermissionError(f"{path} can be written by others")
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written")
    return path
