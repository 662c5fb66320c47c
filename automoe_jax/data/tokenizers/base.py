"""The interface of tokenizers, and how their folders are written.

A tokenizer is a folder (`tokenizer/` of a run or an export) whose `tokenizer.json` names its kind:
`sentencepiece` (one joint vocabulary, trained on the corpus), `bpe` (of a published fairseq model)
or `ids` (the text is token ids).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from automoe_jax.system import files

INFO = "tokenizer.json"
SideName = Literal["source", "target"]
WordBorders = tuple[np.ndarray, np.ndarray]


class Tokenizer(Protocol):
    """Text to ids and back. Ids: bos 0, pad 1, eos 2, unk 3.

    `content` is equal for tokenizers that encode alike. `lowercase` is true if text loses its case,
    so that translations have none. `encode` puts eos at the end; `decode`
    takes target ids, drops special ones, and writes a mark for unknown ones. `word_borders` has
    two arrays (V,): the tokens that end a word, and those that start one; None where the vocabulary
    is not known. `pieces` has the text of each token, a blank before the first one of a word; that
    of bos, pad and eos is empty.
    """

    @property
    def kind(self) -> str: ...
    @property
    def vocab_sizes(self) -> tuple[int, int]: ...
    @property
    def content(self) -> bytes: ...
    @property
    def lowercase(self) -> bool: ...
    def encode(self, sentences: Sequence[str], side: SideName = "source") -> list[list[int]]: ...
    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]: ...
    def word_borders(self, side: SideName) -> WordBorders | None: ...
    def pieces(self, ids: Sequence[int], side: SideName) -> list[str]: ...


def write_folder(folder: Path, info: dict, fill: Callable[[Path], object]):
    """Writes a tokenizer's folder at once: `info` into `tokenizer.json`, other files by `fill`."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    fill(temporary)
    files.write_json(temporary / INFO, {"version": 1, **info})
    temporary.replace(folder)
