"""A folder of parallel text: `<split>.<lang>`, plain or gzipped, one sentence a line."""

import dataclasses
import functools
import gzip
import hashlib
import itertools
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from automoe_jax.system.errors import UserError

LinePair = tuple[bytes, bytes]

_TEST = re.compile(r"test\w*")
_END = 1 << 20
# Pairs of a split that is taken out of a training text; of a small text, one in so many lines.
TAKEN_OUT, AT_MOST_ONE_IN = 1000, 20
# Names that others give to validation text.
_ALSO_VALID = ("dev", "val", "validation")


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


@dataclasses.dataclass(frozen=True)
class Division:
    """A training text out of which other splits are taken.

    Those are pairs whose source line occurs once, chosen by its hash: where in the text a pair is
    does not matter, and no source line is in two splits.
    """

    text: FilePair
    others: tuple[str, ...]  # splits that are taken out

    @functools.cached_property
    def split_of(self) -> dict[int, str]:
        """The split of each source line that is taken out, by its hash; reads the text once.

        `UserError` as `FilePair.read`, or if the text has too few lines.
        """
        hashes = np.fromiter((_hash(source) for source, _ in self.text.read()), np.uint64)
        found, counts = np.unique(hashes, return_counts=True)
        once = found[counts == 1]
        each = min(TAKEN_OUT, len(once) // AT_MOST_ONE_IN)
        if not each:
            raise UserError(
                f"{self.text.source} has {len(once)} lines that occur once, too few to take "
                f"{' and '.join(self.others)} out of them; give files of these, or at least "
                f"{AT_MOST_ONE_IN} such lines"
            )
        names = np.repeat(self.others, each).tolist()
        return dict(zip(once[: len(names)].tolist(), names, strict=True))


@dataclasses.dataclass(frozen=True)
class Part:
    """One split of a divided training text: one that is taken out, or what is left for training."""

    whole: Division
    name: str

    def read(self) -> Iterator[LinePair]:
        """Yields line pairs; `UserError` as `Division.split_of`."""
        split_of = self.whole.split_of
        for pair in self.whole.text.read():
            if split_of.get(_hash(pair[0]), "train") == self.name:
                yield pair

    def fingerprint(self) -> list:
        """As `FilePair.fingerprint`."""
        return [self.name, TAKEN_OUT, *self.whole.text.fingerprint()]


def _hash(line: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "little")


def find_splits(folder: Path, source_lang: str, target_lang: str) -> dict[str, FilePair | Part]:
    """The splits of a folder: train, valid, and every test* of two sides.

    Without validation text, it and `test`, if there is none, are taken out of the training text.
    `UserError` where there is no training text, or one side of another is missing.
    """
    wanted = (
        f"train.{source_lang} and train.{target_lang} (each plain or .gz), and the same of valid "
        "and test; without valid, both are taken out of train"
    )
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
        elif name == "train" or (name in ("valid", "test") and (source or target)):
            missing = f"{name}.{target_lang if source else source_lang}"
            needed = f"needed: {wanted}" if name == "train" else "give both sides or neither"
            raise UserError(f"corpus folder {folder} has no {missing}; {needed}")
    whole: dict[str, FilePair | Part] = {name: splits[name] for name in sorted(splits)}
    if "valid" in splits:
        return whole
    for name in _ALSO_VALID:
        if found := find(name, source_lang):
            raise UserError(f"corpus folder {folder} has {found.name}; rename it to valid")
    others = tuple(name for name in ("valid", "test") if name not in splits)
    divided = Division(splits["train"], others)
    return whole | {name: Part(divided, name) for name in ("train", *others)}


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
