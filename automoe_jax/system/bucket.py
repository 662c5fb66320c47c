"""A workdir in a bucket (gs://, s3://, or another URL of fsspec): a copy here, kept the same.

Programs work on the copy. An index in the bucket lists its files by size and time of change. It is
written after the files that it names and before others are removed, so that a process that is
killed at any point leaves the files of its last `push` (those that programs append to or replace
may be newer). A file that differs here and there is that of the side which changed it since the
last `push` or `pull`.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from automoe_jax.system import files, locks, user_cache
from automoe_jax.system.errors import UserError
from automoe_jax.system.locks import LOCK

INDEX = ".index.json"  # in the bucket and, as of the last push or pull, in the copy
PUSH_SECONDS = 60.0  # between two pushes while a program runs
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://.+")
AT_ONCE = 1 << 20  # bytes of a file that is read before it is sent: it may grow meanwhile
# Of this machine alone, or not finished.
_KEPT_HERE = (LOCK, INDEX, ".jax_cache", ".timing")
_UNFINISHED = re.compile(r"\.tmp$|\.tmp/|orbax-checkpoint-tmp")
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}

_TRIES = 5  # of a push whose files are removed meanwhile
_pushing = threading.Lock()  # one push at a time
Entries = dict[str, list[int]]  # path in the workdir -> size in bytes, time of change in ns


def is_url(path: str | Path) -> bool:
    """True for a path that is not a file system's."""
    return isinstance(path, str) and bool(_URL.match(path))


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A folder at a URL, and its copy on this machine."""

    url: str
    copy: Path

    @classmethod
    def of(cls, url: str, process: int = 0) -> "Bucket":
        """The bucket with the copy of a process of a pod, which may share a machine with others.

        It is in the user's cache, and stays there: the next start fetches what differs.
        """
        url = url.rstrip("/")
        name = url.rpartition("/")[2] + "-" + hashlib.sha256(url.encode()).hexdigest()[:12]
        name += f"-{process}" if process else ""
        return cls(url, user_cache.folder() / "workdirs" / name)

    def pull(self, *, exact: bool = False, only: Callable[[str], bool] = lambda name: True):
        """Fetches what has changed in the bucket, and removes what is gone from it.

        What has changed here stays; with `exact` it is lost, and the copy holds the bucket's files
        alone. `only` says which names to fetch.

        Raises:
          UserError: the bucket cannot be read, or is gone while the copy has files of it.
        """
        with _told(f"{self.url} cannot be read"):
            before = {} if exact else _read(self.copy / INDEX)
            fs, root = _open(self.url)
            there = _index(fs, root)
            if before and not there:
                raise UserError(
                    f"{self.url} is gone; its copy is {self.copy}: move it away to begin again"
                )
            here = self._here()
            for name, entry in here.items():
                if name not in there and (exact or before.get(name) == entry):
                    self._remove(self.copy / name)
            synced = {name: entry for name, entry in before.items() if name in there}
            for name, entry in there.items():
                if not only(name) or (name in before and before[name] == entry):
                    continue
                if here.get(name) != entry:
                    self._fetch(fs, f"{root}/{name}", name, entry)
                synced[name] = entry
            if synced:
                files.write_json(self.copy / INDEX, {"version": 1, "files": synced})

    def push(self):
        """Makes the bucket hold what the copy does. `UserError` if it cannot."""
        with _pushing, _told(f"{self.url} cannot be written to; the copy is {self.copy}"):
            fs, root = _open(self.url)
            there, here = _index(fs, root), self._here()
            if here == there:
                return
            sent = dict(there)
            for _ in range(_TRIES):
                try:
                    for name, entry in here.items():
                        if sent.get(name) != entry:
                            self._send(fs, f"{root}/{name}", name, entry)
                            sent[name] = entry
                    break
                except FileNotFoundError:  # a checkpoint, say, was removed meanwhile: look again
                    here = self._here()
            else:
                raise UserError(
                    f"{self.url}: files of {self.copy} vanish faster than they are sent"
                )
            index = {"version": 1, "files": here}
            fs.makedirs(root, exist_ok=True)
            fs.pipe_file(f"{root}/{INDEX}", json.dumps(index).encode())
            files.write_json(self.copy / INDEX, index)
            for name in sent.keys() - here.keys():
                with contextlib.suppress(FileNotFoundError):
                    fs.rm_file(f"{root}/{name}")

    @contextlib.contextmanager
    def kept(self, note: Callable[[str], None]) -> Iterator[None]:
        """Pushes every `PUSH_SECONDS` within a `with`, and at its end, however it ends.

        `note` takes a line when a push within fails; the next one sends what is missing.
        """
        done = threading.Event()

        def repeat():
            while not done.wait(PUSH_SECONDS):
                try:
                    self.push()
                except UserError as e:
                    note(str(e))

        thread = threading.Thread(target=repeat, name="push", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.push()

    def _here(self) -> Entries:
        """The files of the copy."""
        found: Entries = {}
        for folder, folders, names in os.walk(self.copy):
            folders[:] = [name for name in folders if name not in _KEPT_HERE]
            for name in names:
                path = Path(folder, name)
                inside = path.relative_to(self.copy).as_posix()
                if name in _KEPT_HERE or _UNFINISHED.search(inside):
                    continue
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    about = path.stat()
                    found[inside] = [about.st_size, about.st_mtime_ns]
        return found

    def _send(self, fs: Any, to: str, name: str, entry: list[int]):
        fs.makedirs(to.rpartition("/")[0], exist_ok=True)
        if entry[0] < AT_ONCE:
            fs.pipe_file(to, (self.copy / name).read_bytes())
        else:
            fs.put_file(str(self.copy / name), to)

    def _fetch(self, fs: Any, source: str, name: str, entry: list[int]):
        path = self.copy / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        fs.get_file(source, str(temporary))
        os.utime(temporary, ns=(entry[1], entry[1]))
        temporary.replace(path)

    def _remove(self, path: Path):
        """Removes a file, and the folders that it leaves empty."""
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty
            while (path := path.parent) != self.copy:
                path.rmdir()


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it; `UserError` without its package."""
    import fsspec  # noqa: PLC0415

    scheme = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as e:
        extra = _EXTRAS.get(scheme)
        what = f"pip install 'automoe_jax[{extra}]'" if extra else str(e)
        raise UserError(f"{url} needs another package: {what}") from None
    except ValueError as e:
        raise UserError(f"{url}: {e}; give a folder, or a URL as gs://BUCKET/RUN") from None


def _index(fs: Any, root: str) -> Entries:
    try:
        return json.loads(fs.cat_file(f"{root}/{INDEX}"))["files"]
    except FileNotFoundError:
        return {}


def _read(path: Path) -> Entries:
    return files.read_json(path, "index")["files"] if path.exists() else {}


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Turns what a file system raises into a `UserError` that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # of many libraries, with kinds of their own
        raise UserError(f"{what}: {type(e).__name__}: {e}") from None


def folder_of(path: str, only: Callable[[str], bool] = lambda name: True) -> Path:
    """The folder that a path names; for a URL its copy here, fetched as `pull` does.

    A copy that a program works on is what this program sees, as it is.
    """
    if not is_url(path):
        return files.expanded(path)
    found = Bucket.of(path)
    with locks.held_if_free(found.copy) as free:
        if free:
            found.pull(only=only)
    return found.copy
