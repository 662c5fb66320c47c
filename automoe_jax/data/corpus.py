"""One interface to parallel text: splits of raw line pairs."""

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from automoe_jax.data import parallel_text, phrases
from automoe_jax.data.config import DataConfig
from automoe_jax.data.parallel_text import LinePair, Part
from automoe_jax.system import files
from automoe_jax.system.errors import UserError


class Split(Protocol):
    """Line pairs by index, as raw bytes: they may not be text."""

    def __len__(self) -> int: ...

    def read(self, indices: Iterable[int]) -> list[LinePair]: ...


class TfdsSplit:
    """A split of a TFDS data source with `Translation` features."""

    def __init__(self, source, source_lang: str, target_lang: str):
        self._source = source
        self._langs = source_lang, target_lang

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: Iterable[int]) -> list[LinePair]:
        rows = self._source.__getitems__(list(indices))
        return [(row[self._langs[0]], row[self._langs[1]]) for row in rows]


def open_corpus(config: DataConfig, folder: Path, *, unused: bool = False) -> dict[str, Split]:
    """Opens the splits of a corpus, "train" and "valid" among them.

    Prepares it the first time: WMT in `config.data_dir`, others in `folder`, `corpus/` of a run;
    again if the text has changed since and is `unused`, as nothing was made from it. Raises
    `UserError` if the text is missing, is not text, its sides differ in length, or has changed
    since `folder` was prepared.
    """
    if config.kind == "tfds":
        # Saves 0.25 s of start-up (TFDS) where no corpus is opened.
        from automoe_jax.data import wmt  # noqa: PLC0415

        sources = wmt.open_sources(config.name, config.data_dir)
        languages = set(config.name.split("/")[-1].split("-"))
        if {config.source_lang, config.target_lang} != languages:
            raise UserError(
                f"data.source_lang and data.target_lang are {config.source_lang} and "
                f"{config.target_lang}, but {config.name} has {' and '.join(sorted(languages))}"
            )
    else:
        sources = _prepared_sources(config, folder, unused=unused)
    pair = config.source_lang, config.target_lang
    return {name: TfdsSplit(source, *pair) for name, source in sources.items()}


def _prepared_sources(config: DataConfig, folder: Path, *, unused: bool) -> dict[str, Any]:
    """Data sources of phrases or local text, prepared once in `folder`."""
    # Saves 0.25 s of start-up (TFDS) where no corpus is opened.
    from automoe_jax.data import tfds_pairs  # noqa: PLC0415

    mark = folder / "corpus.json"
    languages = (config.source_lang, config.target_lang)
    stored = files.read_json(mark, "corpus") if mark.exists() else None
    if stored and config.path and not files.expanded(config.path).exists():
        # The text may be deleted once it is prepared.
        return tfds_pairs.sources(folder, languages, stored["splits"])
    splits, fingerprint = _readers(config)
    if not stored or (unused and stored["fingerprint"] != fingerprint):
        shutil.rmtree(folder, ignore_errors=True)  # of a killed run
        tfds_pairs.write(folder, languages, splits)
        files.write_json(mark, {"version": 1, "fingerprint": fingerprint, "splits": list(splits)})
    else:
        _refuse_changed(config, folder, stored["fingerprint"], fingerprint)
    return tfds_pairs.sources(folder, languages, splits)


def taken_out(config: DataConfig) -> list[str]:
    """The splits of local text that are taken out of its training text; none if it is gone."""
    folder = files.expanded(config.path)
    if config.kind != "parallel_text" or not folder.is_dir():
        return []
    found = parallel_text.find_splits(folder, config.source_lang, config.target_lang)
    return [name for name, own in found.items() if isinstance(own, Part) and name != "train"]


def check_unchanged(config: DataConfig, folder: Path):
    """`UserError` if `folder` was prepared from local text that has changed since.

    Text that is gone, and TFDS datasets, which have versions, pass. Reads both ends of each file.
    """
    mark = folder / "corpus.json"
    if config.kind == "parallel_text" and mark.exists() and files.expanded(config.path).exists():
        stored = files.read_json(mark, "corpus")["fingerprint"]
        _refuse_changed(config, folder, stored, _readers(config)[1])


def _refuse_changed(config: DataConfig, folder: Path, stored: str, fingerprint: str):
    if stored != fingerprint:
        raise UserError(
            f"the text of {config.path or config.kind} has changed since {folder} was made "
            "from it; use a new --workdir"
        )


def _readers(config: DataConfig) -> tuple[Mapping[str, Callable[[], Iterable[LinePair]]], str]:
    """A reader of each split, and a fingerprint that changes when the text does."""
    languages = (config.source_lang, config.target_lang)
    if config.kind == "phrases":
        if set(languages) != {"en", "de"}:
            raise UserError(
                f"data.kind phrases has English (en) and German (de), not {' and '.join(languages)}"
            )
        sizes = {name: getattr(config, f"{name}_pairs") for name in ("train", "valid", "test")}
        readers = {x: functools.partial(_phrases, x, n, languages) for x, n in sizes.items()}
        return readers, _fingerprint(languages, [sizes])
    found = parallel_text.find_splits(files.expanded(config.path), *languages)
    identity = [pair.fingerprint() for pair in found.values()]
    return {name: pair.read for name, pair in found.items()}, _fingerprint(languages, identity)


def _fingerprint(languages: tuple[str, str], identity: list) -> str:
    return hashlib.sha256(json.dumps([languages, *identity]).encode()).hexdigest()


def _phrases(name: str, size: int, languages: tuple[str, str]) -> Iterable[LinePair]:
    for english, german in phrases.pairs(name, size):
        pair = {"en": english.encode(), "de": german.encode()}
        yield pair[languages[0]], pair[languages[1]]
