"""One interface to parallel text: splits of raw line pairs, stored and read by TFDS.

No TensorFlow: builders write ArrayRecord files, `as_data_source` reads them at random.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import tensorflow_datasets as tfds

from automoe_jax.data import parallel_text, phrases
from automoe_jax.data.config import DataConfig
from automoe_jax.system import files
from automoe_jax.system.errors import UserError

Lines = tuple[bytes, bytes]


class Split(Protocol):
    """Line pairs by index. Raw bytes: whether they are text is for the reader to find out."""

    def __len__(self) -> int: ...

    def read(self, indices: Iterable[int]) -> list[Lines]: ...


class TfdsSplit:
    """A split of a TFDS data source with `Translation` features."""

    def __init__(self, source, source_lang: str, target_lang: str):
        self._source = source
        self._langs = source_lang, target_lang

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: Iterable[int]) -> list[Lines]:
        rows = self._source.__getitems__(list(indices))
        return [(row[self._langs[0]], row[self._langs[1]]) for row in rows]


class LinePairs(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of a corpus whose splits are given as functions that yield line pairs."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        *,
        languages: tuple[str, str],
        splits: Mapping[str, Callable[[], Iterable[Lines]]],
        data_dir: Path,
    ):
        self._languages = languages
        self._splits = splits
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.Translation(languages=self._languages),
            disable_shuffling=True,  # test sets keep their order
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {name: self._generate_examples(name) for name in self._splits}

    def _generate_examples(self, name: str):  # pyright: ignore[reportIncompatibleMethodOverride]
        for i, pair in enumerate(self._splits[name]()):
            yield i, dict(zip(self._languages, pair, strict=True))


def open_corpus(config: DataConfig, folder: Path) -> dict[str, Split]:
    """Prepares a corpus in `folder` where that has not been done, and opens its splits.

    Args:
      config: what to open.
      folder: `corpus/` of a workdir; WMT stays in `config.data_dir`.

    Returns:
      Splits by name; "train" and "valid" are always there.

    Raises:
      UserError: the text is missing, is not text, its sides differ in length, or has changed
        since `folder` was prepared.
    """
    if config.kind == "tfds":
        from automoe_jax.data import wmt  # noqa: PLC0415 (imports all of TFDS's translation sets)

        sources = wmt.open_sources(config.name, config.data_dir)
        languages = set(config.name.split("/")[-1].split("-"))
        if {config.source_lang, config.target_lang} != languages:
            raise UserError(
                f"data.source_lang and data.target_lang are {config.source_lang} and "
                f"{config.target_lang}, but {config.name} has {' and '.join(sorted(languages))}"
            )
    else:
        sources = _open_prepared(config, folder)
    return {
        name: TfdsSplit(source, config.source_lang, config.target_lang)
        for name, source in sources.items()
    }


def _open_prepared(config: DataConfig, folder: Path):
    """Data sources of phrases or local text, prepared once in `folder`."""
    mark = folder / "corpus.json"
    if mark.exists() and config.path and not files.expanded(config.path).exists():
        # The text has served its purpose; what was made of it is here.
        names = files.read_json(mark, "corpus")["splits"]
        splits = dict.fromkeys(names, tuple)
        return _stored(config, folder, splits)
    splits: dict[str, Callable[[], Iterable[Lines]]]
    languages = (config.source_lang, config.target_lang)
    if config.kind == "phrases":
        sizes = {
            "train": config.train_pairs,
            "valid": config.valid_pairs,
            "test": config.test_pairs,
        }
        splits = {name: _phrases(name, size, languages) for name, size in sizes.items()}
        print_ = json.dumps([languages, sizes])
    else:
        found = parallel_text.find_splits(files.expanded(config.path), *languages)
        splits = {name: pair.read for name, pair in found.items()}
        print_ = json.dumps([languages, *(pair.fingerprint() for pair in found.values())])
    fingerprint = hashlib.sha256(print_.encode()).hexdigest()
    if mark.exists():
        if files.read_json(mark, "corpus")["fingerprint"] != fingerprint:
            raise UserError(
                f"the text of {config.path or config.kind} has changed since {folder} was made "
                "from it; use a new --workdir"
            )
    else:
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
        _quietly(_builder(config, folder, splits).download_and_prepare)
        content = {"version": 1, "fingerprint": fingerprint, "splits": list(splits)}
        files.write_json(mark, content)
    return _stored(config, folder, splits)


def _builder(config: DataConfig, folder: Path, splits) -> Any:
    languages = (config.source_lang, config.target_lang)
    return _quietly(lambda: LinePairs(languages=languages, splits=splits, data_dir=folder))


def _stored(config: DataConfig, folder: Path, splits):
    builder = _builder(config, folder, splits)
    return {name: builder.as_data_source(split=name) for name in splits}


def _phrases(name: str, size: int, languages: tuple[str, str]):
    if set(languages) != {"en", "de"}:
        raise UserError(
            f"data.kind phrases has English (en) and German (de), not {' and '.join(languages)}"
        )

    def read() -> Iterable[Lines]:
        for english, german in phrases.pairs(name, size):
            pair = {"en": english.encode(), "de": german.encode()}
            yield pair[languages[0]], pair[languages[1]]

    return read


def _quietly(call):
    """Runs a TFDS call without its bars and notes, which speak of things nobody asked about."""
    tfds.disable_progress_bar()
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with files.no_stdout():
            return call()
    finally:
        logger.setLevel(level)
