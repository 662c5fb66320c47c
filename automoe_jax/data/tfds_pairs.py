"""Line pairs in ArrayRecord files, written and read at random by TFDS without TensorFlow."""

import contextlib
import io
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from automoe_jax.data.parallel_text import LinePair

Readers = Mapping[str, Callable[[], Iterable[LinePair]]]


class LinePairs(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of a corpus; a function for each split yields its line pairs."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, languages: tuple[str, str], splits: Readers, data_dir: Path):
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


def write(folder: Path, languages: tuple[str, str], splits: Readers):
    """Writes the line pairs of every split to `folder`."""
    _quietly(_builder(folder, languages, splits).download_and_prepare)


def sources(folder: Path, languages: tuple[str, str], names: Iterable[str]) -> dict[str, Any]:
    """TFDS data sources of what `write` wrote, by split."""
    builder = _builder(folder, languages, dict.fromkeys(names, tuple))
    return {name: builder.as_data_source(split=name) for name in builder._splits}


def _builder(folder: Path, languages: tuple[str, str], splits: Readers) -> Any:
    return _quietly(lambda: LinePairs(languages=languages, splits=splits, data_dir=folder))


def _quietly(call):
    """Runs a TFDS call without its progress bars and warnings."""
    tfds.disable_progress_bar()
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return call()
    finally:
        logger.setLevel(level)
