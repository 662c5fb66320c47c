"""Group `data` of a config: the corpus."""

import dataclasses

from automoe_jax.system import checks
from automoe_jax.system.errors import UserError

KINDS = ("phrases", "parallel_text", "tfds")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Source, languages and sizes of the corpus.

    Attributes:
      kind: "phrases" (embedded), "parallel_text" (a folder) or "tfds" (WMT).
      source_lang, target_lang: codes as in the file names.
      path: folder with train|valid|test.<lang>[.gz], for "parallel_text"; without valid, it and
        test, if there is none, are taken out of train: 1,000 pairs each, one in 20 of a small text.
      name: `wmt14_translate/de-en`, `wmt14_translate/fr-en` or `wmt19_translate/de-en`, for "tfds".
      data_dir: folder of TFDS, for "tfds".
      train_pairs, valid_pairs, test_pairs: sizes, for "phrases".
      max_length: of tokens on a side, eos included; training and validation skip longer pairs.
    """

    kind: str
    source_lang: str
    target_lang: str
    path: str = ""
    name: str = ""
    data_dir: str = "~/tensorflow_datasets"
    train_pairs: int = 50_000
    valid_pairs: int = 1_000
    test_pairs: int = 1_000
    max_length: int = 128

    def __post_init__(self):
        checks.one_of(self, "data.", kind=KINDS)
        if self.path and self.kind != "parallel_text":
            raise UserError(
                f"data.path is {self.path!r}, but data.kind is {self.kind}, which has no path; use "
                "data.kind=parallel_text"
            )
        if self.source_lang == self.target_lang:
            raise UserError(f"data.source_lang and data.target_lang are both {self.source_lang!r}")
        checks.at_least(1, self, "data.", "train_pairs", "valid_pairs", "test_pairs", "max_length")
