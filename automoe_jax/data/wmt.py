"""WMT corpora through TFDS, with HAT's validation and test sets.

HAT (section 4.1) validates and tests on newstest2013 and 2014 for WMT'14 En-De, as TFDS does; on
newstest2012 with 2013, and 2014, for WMT'14 En-Fr; on newstest2017 and 2018 for WMT'19 En-De. For
the last two TFDS has other splits (En-Fr validates on 2013 alone; WMT'19 validates on 2018 and has
no test split) but the same sets, so a builder of our own reads HAT's choice of them.

Training text is that of the year (WMT'14: Europarl v7, Common Crawl, News Commentary v9, and for
French also UN and Giga-Fr-En; WMT'19: Europarl v9, ParaCrawl v3, Common Crawl, News Commentary v14,
Wiki Titles, Rapid 2019). HAT trains En-De on fairseq's copy of WMT'16, which is nearly the same.
"""

import functools
import urllib.parse
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import resource
from tensorflow_datasets.core.utils import py_utils
from tensorflow_datasets.translate import wmt, wmt14, wmt19

from automoe_jax.data.network import reachable
from automoe_jax.system import files
from automoe_jax.system.errors import UserError

_VERSION = tfds.core.Version("1.0.0")


class WmtHatEval(wmt.WmtTranslate):
    """HAT's validation and test sets that differ from TFDS's splits."""

    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS's way)
        wmt.WmtConfig(
            name=name,
            language_pair=languages,
            version=_VERSION,
            subsets={tfds.Split("validation"): valid, tfds.Split("test"): test},
        )
        for name, languages, valid, test in (
            ("wmt14", ("fr", "en"), ["newstest2012", "newstest2013"], ["newstest2014"]),
            ("wmt19", ("de", "en"), ["newstest2017"], ["newstest2018"]),
        )
    ]

    @py_utils.classproperty
    @classmethod
    @functools.cache
    def url_infos(cls):  # wmt19_translate downloads the archive with all these sets
        return wmt19.Wmt19Translate.url_infos


# name -> (builder of the training text, its config, config of `WmtHatEval` if that evaluates)
CORPORA = {
    "wmt14_translate/de-en": (wmt14.Wmt14Translate, "de-en", None),
    "wmt14_translate/fr-en": (wmt14.Wmt14Translate, "fr-en", "fr-en.wmt14"),
    "wmt19_translate/de-en": (wmt19.Wmt19Translate, "de-en", "de-en.wmt19"),
}


def open_sources(name: str, data_dir: str):
    """Data sources "train", "valid" and "test", downloaded and prepared the first time."""
    if name not in CORPORA:
        raise UserError(f"data.name is {name!r}; allowed: {', '.join(CORPORA)}")
    builder_class, config, evaluation = CORPORA[name]
    folder = files.expanded(data_dir)
    train = _prepared(builder_class, config, folder, name)
    other = train if evaluation is None else _prepared(WmtHatEval, evaluation, folder, name)
    return {
        "train": train.as_data_source(split="train"),
        "valid": other.as_data_source(split="validation"),
        "test": other.as_data_source(split="test"),
    }


def _prepared(builder_class, config: str, folder: Path, name: str) -> Any:
    builder = builder_class(config=config, data_dir=folder, file_format="array_record")
    if builder.is_prepared():
        return builder
    missing = _missing_downloads(builder, folder)
    for url in missing:
        if not reachable(url):
            raise UserError(
                f"{name} is not prepared in {folder} and {urllib.parse.urlsplit(url).netloc} "
                f"cannot be reached: place {' '.join(missing)} in {folder / 'downloads/manual'}, "
                f"or copy {builder.data_path} from a machine where it is prepared as array_record"
            )
    builder.download_and_prepare()
    return builder


def _missing_downloads(builder, folder: Path) -> list[str]:
    """URLs that are neither in TFDS's folder of manual downloads nor in its cache."""
    source, _ = builder.builder_config.language_pair
    infos = builder.url_infos
    missing = []
    for name in dict.fromkeys(s for subset in builder.subsets.values() for s in subset):
        for url in wmt.DATASET_MAP[name].get_url(source):
            info = infos.get(url)
            manual = folder / "downloads" / "manual" / (info.filename if info else "")
            cached = resource.get_dl_fname(url, info.checksum if info else None)
            if (info and manual.is_file()) or (folder / "downloads" / cached).exists():
                continue
            if url not in missing:
                missing.append(url)
    return missing
