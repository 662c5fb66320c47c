"""A folder of parallel text: `<split>.<lang>`, plain or gzipped, one sentence a line."""

import dataclasses
import gzip
import hashlib
import itertools
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from automoe_jax.system.errors import UserError

LinePair = tuple[bytes, bytes]

_TEST = re.compile(r"test\w*")
_END = 1 << 20


@dataclasses.dataclass(frozen=True)
class FilePair:
    """The source and target file of one split."""

    source: Path
    target: Path

    def read(self) -> Iterator[LinePair]:
        """Yields line pairs; `UserError` if a file is not text or the sides differ in length."""
        lines = itertools.zip_longest(read_lines(self.source), read_lines(self.target))
        i = -1
        for i, (a, b) in enumerate(lines):
            if a is None or b is None:
                counts = [i, i + 1 + sum(1 for _ in lines)]
                n_source, n_target = counts if a is None else counts[::-1]
                raise UserError(
                    f"{self.source} has {n_source} lines but {self.target} has {n_target}; "
                    "parallel text needs the same number on both sides"
                )
            yield a, b
        if i < 0:
            raise UserError(f"{self.source} is empty; at least one pair is needed")

    def fingerprint(self) -> list:
        """JSON that changes when the files do: names, sizes and hashes of both ends."""
        return [[x.name, x.stat().st_size, _ends(x)] for x in (self.source, self.target)]


def _ends(path: Path) -> str:
    """Hash of the first and last MiB."""
    with path.open("rb") as f:
        content = f.read(_END)
        f.seek(max(path.stat().st_size - _END, 0))
        return hashlib.sha256(content + f.read()).hexdigest()


def find_splits(folder: Path, source_lang: str, target_lang: str) -> dict[str, FilePair]:
    """The splits of a folder: train and valid, which must exist, and every test* of two sides.

    `UserError` where one is missing, or one side of `test`.
    """
    sides = f"{source_lang} and .{target_lang}"
    wanted = f"train.{sides}, valid.{sides}, and to be scored test.{sides} (each plain or .gz)"
    if folder == Path():
        raise UserError(
            f"data.path is empty; give --config.data.path=DIR of a folder with {wanted}"
        )
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"corpus folder {folder} {what}; data.path must hold {wanted}")

    def find(name: str, lang: str) -> Path | None:
        paths = (folder / f"{name}.{lang}{suffix}" for suffix in ("", ".gz"))
        return next((path for path in paths if path.is_file()), None)

    names = {"train", "valid", "test"}
    for path in folder.iterdir():
        name, _, lang = path.name.removesuffix(".gz").rpartition(".")
        if lang == source_lang and _TEST.fullmatch(name):
            names.add(name)
    splits = {}
    # What is needed first: of a folder in other languages, the training text is named.
    for name in sorted(names, key=lambda name: (name.startswith("test"), name)):
        source, target = find(name, source_lang), find(name, target_lang)
        if source and target:
            splits[name] = FilePair(source, target)
        elif name in ("train", "valid") or (name == "test" and (source or target)):
            missing = f"{name}.{target_lang if source else source_lang}"
            raise UserError(f"corpus folder {folder} has no {missing}; needed: {wanted}")
    return {name: splits[name] for name in sorted(splits)}


def read_lines(path: Path) -> Iterator[bytes]:
    """Lines of a file without line ends; `UserError` if it is not text or not whole."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as f:
            for i, line in enumerate(f):
                if b"\0" in line:
                    raise UserError(
                        f"{path} is not text: line {i + 1} has a zero byte; give UTF-8 text with "
                        "one sentence a line"
                    )
                yield line.rstrip(b"\r\n")
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise UserError(f"{path} is not a whole gzip file: {e}") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from None
