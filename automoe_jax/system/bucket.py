"""A workdir in a bucket (gs://, s3://, or another URL of fsspec): a copy here, kept the same.

Programs work on the copy. An index in the bucket lists its files by size and time of change; it is
written after the files that it names and before files are removed, so that a process that is
killed at any point leaves a whole workdir, as of its last `push`.
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

from automoe_jax.system import files, user_cache
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
    def of(cls, url: str) -> "Bucket":
        """The copy is in the user's cache, and stays there: the next start fetches what differs."""
        url = url.rstrip("/")
        name = url.rpartition("/")[2] + "-" + hashlib.sha256(url.encode()).hexdigest()[:12]
        return cls(url, user_cache.folder() / "workdirs" / name)

    def pull(self):
        """Fetches what is new in the bucket, and removes what is gone from it.

        What was never in the bucket stays. `UserError` if the bucket cannot be read.
        """
        with _told(f"{self.url} cannot be read"):
            fs, root = _open(self.url)
            there = _index(fs, root)
            before = _read(self.copy / INDEX)
            for name in before.keys() - there.keys():
                self._remove(self.copy / name)
            here = self._here()
            for name, entry in there.items():
                if here.get(name) != entry:
                    self._fetch(fs, f"{root}/{name}", name, entry)
            if there:
                files.write_json(self.copy / INDEX, {"version": 1, "files": there})

    def push(self):
        """Sends what has changed here, and removes what is gone. `UserError` if it cannot."""
        with _pushing, _told(f"{self.url} cannot be written to; the copy is {self.copy}"):
            fs, root = _open(self.url)
            there, here = _index(fs, root), self._here()
            if here == there:
                return
            sent: Entries = {}
            for name, entry in here.items():
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    if there.get(name) != entry:
                        self._send(fs, f"{root}/{name}", name, entry)
                    sent[name] = entry
            index = {"version": 1, "files": sent}
            fs.makedirs(root, exist_ok=True)
            fs.pipe_file(f"{root}/{INDEX}", json.dumps(index).encode())
            files.write_json(self.copy / INDEX, index)
            for name in there.keys() - sent.keys():
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
        temporary = path.with_name(f".{path.name}.tmp")
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


def folder_of(path: str) -> Path:
    """The folder that a path names; for a URL its copy here, fetched."""
    if not is_url(path):
        return files.expanded(path)
    found = Bucket.of(path)
    found.pull()
    return found.copy
